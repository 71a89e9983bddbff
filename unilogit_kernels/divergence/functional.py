"""Losses against a reference model as functions: names and docstrings, reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilogit_kernels import calls
from unilogit_kernels.divergence import inputs
from unilogit_kernels.divergence.closed_form import Rewrite
from unilogit_kernels.inputs import LossCall, cast_for_autocast
from unilogit_kernels.ops import divergence as ops
from unilogit_kernels.ops.arguments import NO_GRADIENT, NO_GRADIENTS
from unilogit_kernels.ops.divergence import HeadPair, LogitsPair, Weights
from unilogit_kernels.ops.linear import Active
from unilogit_kernels.ops.registration import any_tangent
from unilogit_kernels.rows import weigh


def kl_loss(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None = None,
    *,
    rewrite: Rewrite | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL divergence from a reference model, whose label entry may be rewritten first.

    - KL to the starting model as retain loss (KL minimisation, NPO-KL): no rewrite.
    - UnDIAL (arXiv 2402.10052) with the starting model as teacher: `Shift(gamma)`. The paper's
      cross-entropy to the soft target is this KL plus the target's entropy, a constant.
    - Unilogit's target (arXiv 2505.06027) from the starting model: `Uniform()` and
      `direction="reverse"`.

    Args:
        logits: The student's, `[..., V]`, float32, bfloat16, float16 or float64, any strides.
        ref_logits: The teacher's, `[..., V]`; no gradient flows to it. It may have another dtype,
            but float64 on one side needs float64 on the other.
        labels: int64 or int32 `[...]`, in `[0, vocab_size)` or `ignore_index`; None for all
            positions (then `rewrite` must be None). Without a rewrite, labels only say which
            positions count.
        rewrite: What becomes of the teacher's label entry: `Shift(gamma)`, `Uniform()`, `Mask()`,
            or None for the teacher as it is.
        direction: `"forward"` for KL(teacher || student), `"reverse"` for KL(student || teacher).
        temperature: Divides both models' logits. The loss is not multiplied by its square.
        ignore_index: Label of positions that contribute nothing, whatever their logits hold.
        reduction: `"mean"`, `"sum"` or `"none"`.
        token_weights: `[...]`, a constant factor per token, of either sign. It does not enter the
            mean's denominator.
        num_items_in_batch: Denominator of the mean; default: the number of positions that count by
            their label.
        softcap: The student caps its logits as `softcap * tanh(z / softcap)` (Gemma 2).
        ref_softcap: The same for the teacher.
        logit_scale: The student multiplies its logits by this, before the cap.
        ref_logit_scale: The same for the teacher.
        vocab_size: Number of real tokens where a vocabulary is padded; must be given if the two
            are padded differently.
        backend: Name of a backend, or None for the best one of the device.

    Returns:
        The loss in nats, float32 (float64 for float64 logits): a scalar, or `[...]` for `"none"`
        with 0 at ignored positions. With every position ignored it is 0, attached to the graph.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape, device or option does not fit.
        IndexError: A label is out of range. On accelerators, where checking would synchronise, its
            row becomes NaN instead, unless `UNILOGIT_KERNELS_CHECK_LABELS=1` is set.
        RuntimeError: The backend cannot run here.

    Example:
        >>> import torch
        >>> from unilogit_kernels import Shift, kl_loss
        >>> ref_logits = torch.randn(4, 1000)
        >>> logits = ref_logits.clone().requires_grad_()
        >>> kl_loss(logits, ref_logits).item()
        0.0
        >>> labels = torch.tensor([1, 2, 3, -100])
        >>> kl_loss(logits, ref_logits, labels, rewrite=Shift(10.0)).backward()
        >>> bool(logits.grad[3].eq(0).all())
        True
    """
    ref_logits = _detached(ref_logits)
    pair = inputs.describe_logits(
        logits,
        ref_logits,
        labels,
        rewrite=rewrite,
        direction=direction,
        temperature=temperature,
        ref_softcap=ref_softcap,
        ref_logit_scale=ref_logit_scale,
        ignore_index=ignore_index,
        reduction=reduction,
        token_weights=token_weights,
        num_items_in_batch=num_items_in_batch,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=backend,
    )
    flat, ref_flat = (x.reshape(-1, x.shape[-1]) for x in (logits, ref_logits))
    values = ops.divergence(LogitsPair(flat, ref_flat), pair.rows()).values
    return _reduce(values, pair.call)


def linear_kl_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor | None = None,
    *,
    rewrite: Rewrite | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    compact: bool = True,
) -> Tensor:
    """`kl_loss` of two models' lm_heads, without ever holding either model's logits.

    Positions that are ignored or have weight 0 are dropped before the first GEMM. Gradients are
    computed in the forward pass and scaled in the backward; a frozen operand costs nothing. The
    teacher's operands never get a gradient; they may be the student's own (a shared lm_head).

    There is no `skip_below` as in `linear_unilogit_loss`: no slope in front of a row's gradient
    tells its size before it is computed. The divergence bounds it (forward by `sqrt(2 KL)`,
    Pinsker), but float32 knows a KL to about 1e-7, and so this bound to no better than 5e-4.

    Args:
        hidden: The student's, `[..., H]`, the hidden states that enter its lm_head.
        weight: The student's lm_head, `[V, H]`, in hidden's dtype (any dtype under autocast).
        ref_hidden: The teacher's, `[..., H']`; sizes may differ.
        ref_weight: The teacher's lm_head, `[V, H']`.
        labels: As in `kl_loss`.
        rewrite: As in `kl_loss`.
        direction: As in `kl_loss`.
        temperature: As in `kl_loss`.
        bias: The student's, `[V]` or None.
        ref_bias: The teacher's, `[V]` or None.
        ignore_index: As in `kl_loss`.
        reduction: As in `kl_loss`. With `"none"`, logits are recomputed in the backward.
        token_weights: As in `kl_loss`.
        num_items_in_batch: As in `kl_loss`.
        softcap: As in `kl_loss`.
        ref_softcap: As in `kl_loss`.
        logit_scale: As in `kl_loss`.
        ref_logit_scale: As in `kl_loss`.
        vocab_size: As in `kl_loss`.
        backend: As in `kl_loss`.
        memory_budget: As in `linear_unilogit_loss`. `explain_plan(..., ref_h=H')` says what a call
            makes of it.
        logits_dtype: As in `linear_unilogit_loss`, of both models' logits.
        compact: As in `linear_unilogit_loss`.

    Returns:
        As `kl_loss`.

    Raises:
        TypeError: As `kl_loss`; also for mixed dtypes of one model outside autocast.
        ValueError: As `kl_loss`.
        IndexError: As `kl_loss`.
        RuntimeError: As `kl_loss`.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_kl_loss
        >>> lm_head, teacher_head = torch.nn.Linear(16, 1000), torch.nn.Linear(32, 1000)
        >>> hidden = torch.randn(5, 16, requires_grad=True)
        >>> loss = linear_kl_loss(
        ...     hidden, lm_head.weight, torch.randn(5, 32), teacher_head.weight,
        ...     bias=lm_head.bias, ref_bias=teacher_head.bias,
        ... )
        >>> loss.backward()
        >>> hidden.grad.shape, teacher_head.weight.grad
        (torch.Size([5, 16]), None)
    """
    student = hidden, weight, bias = _for_autocast(hidden, weight, bias)
    teacher = _for_autocast(*(_detached(x) for x in (ref_hidden, ref_weight, ref_bias)))
    pair = inputs.describe_linear(
        student,
        teacher,
        labels,
        rewrite=rewrite,
        direction=direction,
        temperature=temperature,
        ref_softcap=ref_softcap,
        ref_logit_scale=ref_logit_scale,
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
        compact=compact,
    )
    call = pair.call
    heads = HeadPair(_flat(hidden), weight, bias, _flat(teacher[0]), *teacher[1:])
    rows, options = pair.rows(), calls.options(call)
    if call.reduction == "none" or any_tangent(student):
        # What is finished in one pass has no tangents; the values of rows do.
        active = Active(call.row_weight != 0)
        found = ops.linear_divergence(heads, active, rows, options, NO_GRADIENT)
        return _reduce(found.values, call)
    weights = Weights(call.row_weight, call.factor)
    return ops.linear_divergence_loss(heads, rows, weights, options, NO_GRADIENTS).loss


def count_ignored_positions(labels: Tensor, vocab_size: int, ignore_index: int = -100) -> Tensor:
    """Labels with which every position counts, as in OpenUnlearning's `compute_undial_loss`.

    That implementation of UnDIAL averages over prompt and padding too, and indexes the vocabulary
    with their label -100, from its end: there the teacher's token `V - 100` is lowered. With these
    labels `kl_loss(..., rewrite=Shift(beta))` has the same gradients (its loss is less by the
    target's entropy, a constant). For comparisons with it only: leave ignored labels as they are
    for the method of the paper.

    Args:
        labels: int64 or int32 `[...]`.
        vocab_size: V, the columns of the logits.
        ignore_index: Negative, at least `-vocab_size`.

    Returns:
        `[...]`, all in `[0, vocab_size)`.

    Raises:
        ValueError: `ignore_index` does not index the vocabulary from its end.

    Example:
        >>> import torch
        >>> count_ignored_positions(torch.tensor([5, -100]), vocab_size=1000)
        tensor([  5, 900])
    """
    if not -vocab_size <= ignore_index < 0:
        raise ValueError(f"ignore_index must be in [{-vocab_size}, 0), got {ignore_index}")
    return torch.where(labels == ignore_index, vocab_size + ignore_index, labels)


def _detached(teacher: Any) -> Any:
    return teacher.detach() if isinstance(teacher, Tensor) else teacher


def _for_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    bias = None if bias is None else cast_for_autocast(bias)
    return cast_for_autocast(hidden), cast_for_autocast(weight), bias


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _reduce(values: Tensor, call: LossCall) -> Tensor:
    losses = weigh(call.row_weight, values)
    if call.reduction == "none":
        return losses.reshape(call.shape)
    return call.factor * losses.sum()
