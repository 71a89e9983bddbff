"""Losses of a token's own log-odds: Unilogit by name, and any objective."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.calls import dispatch
from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.calls.options import CallOptions
from unilogit_kernels.calls.vocab_parallel import VocabParallel, on_all_ranks
from unilogit_kernels.functional.documented import documented
from unilogit_kernels.functional.shifting import shifting
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.objectives import Objective

ObjectiveLike = str | Objective | Callable[..., Tensor]
"""A name from `objectives.REGISTRY`, an instance, or a differentiable function of the log-odds, or
of other statistics (`objectives.of_statistics`)."""

_UNILOGIT = {"reverse": "unilogit", "forward": "unilogit_forward"}


@documented
@on_all_ranks
@shifting
def unilogit_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = False,
    direction: str = "reverse",
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
) -> Tensor:
    """Unilogit (arXiv 2505.06027): drive the label's probability to 1/V by self-distillation.

    The target q is the model's own distribution with the label's logit rewritten so that it gets
    probability 1/V; no gradient flows through q. The loss is KL(p || q), or KL(q || p) for the
    forward direction, in nats.

    Args:
        direction: `"reverse"` (the paper's) or `"forward"`.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or `[...]` for `"none"` with 0 at
        ignored positions. With every label ignored it is 0, attached to the graph.

    Example:
        >>> import torch
        >>> from unilogit_kernels import unilogit_loss
        >>> logits = torch.randn(4, 1000, requires_grad=True)
        >>> loss = unilogit_loss(logits, torch.tensor([1, 2, 3, -100]))
        >>> loss.backward()
        >>> bool(logits.grad[3].eq(0).all())
        True
    """
    resolved = objectives.resolve(_unilogit(direction))
    call_options = CallOptions(
        ignore_index,
        softcap,
        logit_scale,
        vocab_size,
        backend,
        reduction,
        token_weights,
        num_items_in_batch,
        vocab_parallel,
    )
    return dispatch.objective_of(*dispatch.from_logits(logits, labels, call_options), resolved)


@documented
@on_all_ranks
@shifting
def linear_unilogit_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    shift: bool = False,
    direction: str = "reverse",
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> Tensor:
    """`unilogit_loss` of `hidden @ weight.T + bias`, without ever holding these logits.

    Positions that are ignored or have weight 0 are dropped before the first GEMM. Gradients are
    computed in the forward pass and scaled in the backward (with `reduction="none"`, logits are
    recomputed in the backward); a frozen operand costs nothing.

    Args:
        direction: `"reverse"` (the paper's) or `"forward"`.

    Returns:
        The loss, float32 (float64 for float64 operands): a scalar, or `[...]` for `"none"` with 0
        at ignored positions. With every label ignored it is 0, attached to the graph.

    Raises:
        TypeError: A dtype is not supported, or dtypes are mixed outside autocast.

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
    resolved = objectives.resolve(_unilogit(direction))
    call_options = CallOptions(
        ignore_index,
        softcap,
        logit_scale,
        vocab_size,
        backend,
        reduction,
        token_weights,
        num_items_in_batch,
        vocab_parallel,
    )
    described = dispatch.from_linear(hidden, weight, bias, labels, call_options, options, adapter)
    return dispatch.objective_of(*described, resolved)


@documented
@on_all_ranks
@shifting
def objective_loss(
    logits: Tensor,
    labels: Tensor,
    objective: ObjectiveLike,
    *,
    shift: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
) -> Tensor:
    """Any loss of the family: an objective of the log-odds, weighted and reduced over tokens.

    Args:
        objective: A name (`"unilogit"`, `"unilogit_forward"`, `"cross_entropy"`,
            `"gradient_ascent"`, ...), an `objectives.Objective`, or your own differentiable
            function from log-odds `[n]` to losses `[n]`. Registered objectives are finished in one
            pass; a function goes through `target_log_odds` and plain autograd.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or `[...]` for `"none"` with 0 at
        ignored positions. With every label ignored it is 0, attached to the graph.

    Raises:
        ValueError: A shape, device or option does not fit, or the objective is unknown.

    Example:
        >>> import torch
        >>> from unilogit_kernels import objective_loss
        >>> logits, labels = torch.randn(4, 1000), torch.arange(4)
        >>> focal = lambda d: torch.sigmoid(-d) ** 2 * torch.nn.functional.softplus(-d)
        >>> objective_loss(logits, labels, focal).shape
        torch.Size([])
    """
    call_options = CallOptions(
        ignore_index,
        softcap,
        logit_scale,
        vocab_size,
        backend,
        reduction,
        token_weights,
        num_items_in_batch,
        vocab_parallel,
    )
    resolved = objectives.resolve(objective)
    return dispatch.objective_of(*dispatch.from_logits(logits, labels, call_options), resolved)


@documented
@on_all_ranks
@shifting
def linear_objective_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: ObjectiveLike,
    *,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> Tensor:
    """`objective_loss` of `hidden @ weight.T + bias`, without ever holding these logits.

    Args:
        objective: A name (`"unilogit"`, `"unilogit_forward"`, `"cross_entropy"`,
            `"gradient_ascent"`, ...), an `objectives.Objective`, or your own differentiable
            function from log-odds `[n]` to losses `[n]`. Registered objectives are finished in one
            call; a function goes through `linear_target_log_odds` and plain autograd.

    Returns:
        The loss, float32 (float64 for float64 operands): a scalar, or `[...]` for `"none"` with 0
        at ignored positions. With every label ignored it is 0, attached to the graph.

    Raises:
        TypeError: A dtype is not supported, or dtypes are mixed outside autocast.
        ValueError: A shape, device or option does not fit, or the objective is unknown.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_objective_loss
        >>> hidden, weight = torch.randn(5, 16), torch.randn(1000, 16)
        >>> linear_objective_loss(hidden, weight, torch.arange(5), "cross_entropy").shape
        torch.Size([])
    """
    call_options = CallOptions(
        ignore_index,
        softcap,
        logit_scale,
        vocab_size,
        backend,
        reduction,
        token_weights,
        num_items_in_batch,
        vocab_parallel,
    )
    resolved = objectives.resolve(objective)
    described = dispatch.from_linear(hidden, weight, bias, labels, call_options, options, adapter)
    return dispatch.objective_of(*described, resolved)


def _unilogit(direction: str) -> str:
    if direction not in _UNILOGIT:
        raise ValueError(f"direction must be 'reverse' or 'forward', got {direction!r}")
    return _UNILOGIT[direction]
