"""The losses as functions. Names and docstrings live here; the work is done in the layers below.

Labels are compared with the logits of the same position. For a causal language model, where the
logits of position t predict token t + 1, pass `shift_labels(input_ids)` as labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.calls import dispatch
from unilogit_kernels.objectives import Objective

ObjectiveLike = str | Objective | Callable[[Tensor], Tensor]
"""A name from `objectives.REGISTRY`, an instance, or a differentiable function of the log-odds."""

_UNILOGIT = {"reverse": "unilogit", "forward": "unilogit_forward"}


def unilogit_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    direction: str = "reverse",
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Unilogit (arXiv 2505.06027): drive the label's probability to 1/V by self-distillation.

    The target q is the model's own distribution with the label's logit rewritten so that it gets
    probability 1/V; no gradient flows through q. The loss is KL(p || q), or KL(q || p) for the
    forward direction, in nats.

    Args:
        logits: `[..., V]`, float32, bfloat16, float16 or float64, any strides.
        labels: int64 or int32 `[...]`, in `[0, vocab_size)` or `ignore_index`. Not shifted here.
        direction: `"reverse"` (the paper's) or `"forward"`.
        ignore_index: Label of positions that contribute nothing, whatever their logits hold.
        reduction: `"mean"`, `"sum"` or `"none"`.
        token_weights: `[...]`, a constant factor per token, of either sign. It does not enter the
            mean's denominator.
        num_items_in_batch: Denominator of the mean, at least 1 (smaller numbers count as 1), for
            gradient accumulation: an int, or a tensor on any device. Default: the number of
            labels that are not `ignore_index`.
        softcap: The model caps its logits as `softcap * tanh(z / softcap)` (Gemma 2).
        logit_scale: The model multiplies its logits by this, before the cap (Cohere; Granite
            divides, so pass the reciprocal).
        vocab_size: Number of real tokens where the vocabulary is padded; the columns beyond have
            no probability and get zero gradient.
        backend: Name of a backend, or None for the best one of the device.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or `[...]` for `"none"` with 0 at
        ignored positions. With every label ignored it is 0, attached to the graph.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape, device or option does not fit.
        IndexError: A label is out of range. On accelerators, where checking would synchronise, its
            row becomes NaN instead, unless `UNILOGIT_KERNELS_CHECK_LABELS=1` is set.
        RuntimeError: The backend cannot run here.

    Example:
        >>> import torch
        >>> from unilogit_kernels import unilogit_loss
        >>> logits = torch.randn(4, 1000, requires_grad=True)
        >>> loss = unilogit_loss(logits, torch.tensor([1, 2, 3, -100]))
        >>> loss.backward()
        >>> bool(logits.grad[3].eq(0).all())
        True
    """
    return objective_loss(
        logits,
        labels,
        _unilogit(direction),
        ignore_index=ignore_index,
        reduction=reduction,
        token_weights=token_weights,
        num_items_in_batch=num_items_in_batch,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=backend,
    )


def linear_unilogit_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    direction: str = "reverse",
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    skip_below: float = 0.0,
    compact: bool = True,
) -> Tensor:
    """`unilogit_loss` of `hidden @ weight.T + bias`, without ever holding these logits.

    Positions that are ignored or have weight 0 are dropped before the first GEMM. Gradients are
    computed in the forward pass and scaled in the backward; a frozen operand costs nothing.

    Args:
        hidden: `[..., H]`, the hidden states that enter the lm_head.
        weight: `[V, H]`, the lm_head's weight, in hidden's dtype (any dtype under autocast).
        labels: As in `unilogit_loss`.
        bias: `[V]` or None.
        direction: As in `unilogit_loss`.
        ignore_index: As in `unilogit_loss`.
        reduction: As in `unilogit_loss`. With `"none"`, logits are recomputed in the backward.
        token_weights: As in `unilogit_loss`.
        num_items_in_batch: As in `unilogit_loss`.
        softcap: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.
        memory_budget: Bytes that buffers of logits and partial sums may take beside operands and
            gradients; default 256 MiB on GPUs, 64 MiB on CPU. See `explain_plan`.
        logits_dtype: What the logits are rounded to before their statistics. Default: float32
            where the device's GEMM can write it (GPUs, and CPUs on which float32 GEMMs are the
            faster ones), else hidden's dtype. hidden's dtype reproduces an eager Hugging Face
            model; float32 on CPU takes float32 GEMMs.
        skip_below: Tokens whose slope (weight times `f'(d)`) is below this share of the largest
            get no gradient. Default 0: only exact zeros are skipped, and on CPU none of a frozen
            `weight`, whose gradient comes along with the loss. A skipped token's own gradient is
            off by at most `2 * skip_below * max slope * max |W_j|`.
        compact: Whether tokens that cannot matter are dropped before each GEMM. Counting them
            synchronises a GPU; False does without, for CUDA graphs, at full cost.

    Returns:
        As `unilogit_loss`.

    Raises:
        TypeError: As `unilogit_loss`; also for mixed dtypes outside autocast.
        ValueError: As `unilogit_loss`.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_unilogit_loss
        >>> hidden = torch.randn(2, 3, 16, requires_grad=True)
        >>> lm_head = torch.nn.Linear(16, 1000, bias=False)
        >>> labels = torch.randint(0, 1000, (2, 3))
        >>> linear_unilogit_loss(hidden, lm_head.weight, labels).backward()
        >>> hidden.grad.shape
        torch.Size([2, 3, 16])
    """
    return linear_objective_loss(
        hidden,
        weight,
        labels,
        _unilogit(direction),
        bias=bias,
        ignore_index=ignore_index,
        reduction=reduction,
        token_weights=token_weights,
        num_items_in_batch=num_items_in_batch,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=backend,
        memory_budget=memory_budget,
        logits_dtype=logits_dtype,
        skip_below=skip_below,
        compact=compact,
    )


def objective_loss(
    logits: Tensor,
    labels: Tensor,
    objective: ObjectiveLike,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Any loss of the family: an objective of the log-odds, weighted and reduced over tokens.

    Args:
        logits: As in `unilogit_loss`.
        labels: As in `unilogit_loss`.
        objective: A name (`"unilogit"`, `"unilogit_forward"`, `"cross_entropy"`,
            `"gradient_ascent"`, ...), an `objectives.Objective`, or your own differentiable
            function from log-odds `[n]` to losses `[n]`. Registered objectives are finished in one
            pass; a function goes through `target_log_odds` and plain autograd.
        ignore_index: As in `unilogit_loss`.
        reduction: As in `unilogit_loss`.
        token_weights: As in `unilogit_loss`.
        num_items_in_batch: As in `unilogit_loss`.
        softcap: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.

    Returns:
        As `unilogit_loss`.

    Raises:
        TypeError: As `unilogit_loss`.
        ValueError: As `unilogit_loss`; also for an unknown objective.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> from unilogit_kernels import objective_loss
        >>> logits, labels = torch.randn(4, 1000), torch.arange(4)
        >>> focal = lambda d: torch.sigmoid(-d) ** 2 * torch.nn.functional.softplus(-d)
        >>> objective_loss(logits, labels, focal).shape
        torch.Size([])
    """
    function = objectives.resolve(objective)
    operands, call = dispatch.from_logits(
        logits,
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        token_weights=token_weights,
        num_items_in_batch=num_items_in_batch,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=backend,
    )
    return dispatch.objective_of(operands, call, function)


def linear_objective_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: ObjectiveLike,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    skip_below: float = 0.0,
    compact: bool = True,
) -> Tensor:
    """`objective_loss` of `hidden @ weight.T + bias`, without ever holding these logits.

    Args:
        hidden: As in `linear_unilogit_loss`.
        weight: As in `linear_unilogit_loss`.
        labels: As in `unilogit_loss`.
        objective: As in `objective_loss`.
        bias: `[V]` or None.
        ignore_index: As in `unilogit_loss`.
        reduction: As in `linear_unilogit_loss`.
        token_weights: As in `unilogit_loss`.
        num_items_in_batch: As in `unilogit_loss`.
        softcap: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.
        memory_budget: As in `linear_unilogit_loss`.
        logits_dtype: As in `linear_unilogit_loss`.
        skip_below: As in `linear_unilogit_loss`.
        compact: As in `linear_unilogit_loss`.

    Returns:
        As `unilogit_loss`.

    Raises:
        TypeError: As `linear_unilogit_loss`.
        ValueError: As `objective_loss`.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_objective_loss
        >>> hidden, weight = torch.randn(5, 16), torch.randn(1000, 16)
        >>> linear_objective_loss(hidden, weight, torch.arange(5), "cross_entropy").shape
        torch.Size([])
    """
    function = objectives.resolve(objective)
    operands, call = dispatch.from_linear(
        hidden,
        weight,
        bias,
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        token_weights=token_weights,
        num_items_in_batch=num_items_in_batch,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=backend,
        memory_budget=memory_budget,
        logits_dtype=logits_dtype,
        skip_below=skip_below,
        compact=compact,
    )
    return dispatch.objective_of(operands, call, function)


def _unilogit(direction: str) -> str:
    if direction not in _UNILOGIT:
        raise ValueError(f"direction must be 'reverse' or 'forward', got {direction!r}")
    return _UNILOGIT[direction]
