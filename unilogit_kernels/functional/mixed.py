"""Mixed batches: several objectives in one call, each for its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.calls import dispatch
from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.calls.options import CallOptions
from unilogit_kernels.calls.validation import LossCall
from unilogit_kernels.calls.vocab_parallel import VocabParallel, on_all_ranks
from unilogit_kernels.functional.documented import documented
from unilogit_kernels.functional.shifting import shifting
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.objectives import Objective
from unilogit_kernels.ops.heads import Operands


class MixedLoss(NamedTuple):
    """What a mixed batch gives.

    Attributes:
        loss: 0-d, the weighted sum of the parts, differentiable.
        parts: `[K]`, the loss of each objective on its own tokens, unweighted and detached; 0 for
            one of weight 0, which is not computed.

    Example:
        >>> import torch
        >>> loss, parts = MixedLoss(torch.tensor(3.0), torch.tensor([1.0, 2.0]))
        >>> bool(loss == parts.sum())
        True
    """

    loss: Tensor
    parts: Tensor


@documented
@on_all_ranks
@shifting
def mixed_loss(
    logits: Tensor,
    labels: Tensor,
    parts: Sequence[str | Objective],
    segments: Tensor,
    *,
    shift: bool = False,
    weights: Sequence[float] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: Tensor | Sequence[int] | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
) -> MixedLoss:
    """`sum_k weights[k] * objective_loss(tokens of segment k, parts[k])`, in one call.

    Args:
        parts: K objectives: registered names or instances. The tensors of a sequence objective are
            those of all sequences of the batch; only its own count.
        segments: int64 `[...]`: the index of the part that each token belongs to.
        weights: K factors, 1 each by default.
        reduction: `"mean"`, of each part over its own tokens (or sequences), or `"sum"`.
        num_items_in_batch: K denominators of the means, for gradient accumulation.

    Returns:
        The loss and its parts.

    Raises:
        TypeError: A dtype is not supported, or a part is a function.
        ValueError: A shape, device or option does not fit, or the numbers of parts, weights and
            denominators differ.

    Example:
        >>> import torch
        >>> logits, labels = torch.randn(4, 1000, requires_grad=True), torch.arange(4)
        >>> segments = torch.tensor([0, 0, 1, 1])
        >>> result = mixed_loss(logits, labels, ["unilogit", "cross_entropy"], segments)
        >>> result.loss.backward()
        >>> result.parts.shape
        torch.Size([2])
    """
    resolved, factors, items = _described(parts, segments, weights, reduction, num_items_in_batch)
    call_options = CallOptions(
        ignore_index,
        softcap,
        logit_scale,
        vocab_size,
        backend,
        reduction,
        token_weights,
        vocab_parallel=vocab_parallel,
    )
    operands, call = dispatch.from_logits(logits, labels, call_options)
    return _mixed(operands, call, segments, resolved, factors, items)


@documented
@on_all_ranks
@shifting
def linear_mixed_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    parts: Sequence[str | Objective],
    segments: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    shift: bool = False,
    weights: Sequence[float] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: Tensor | Sequence[int] | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> MixedLoss:
    """`mixed_loss` of `hidden @ weight.T + bias`, without ever holding these logits.

    Forget and retain rows of a batch then share one sequence of GEMMs and one backward.

    Args:
        parts: K objectives: registered names or instances. The tensors of a sequence objective are
            those of all sequences of the batch; only its own count.
        segments: int64 `[...]`: the index of the part that each token belongs to.
        weights: K factors, 1 each by default.
        reduction: `"mean"`, of each part over its own tokens (or sequences), or `"sum"`.
        num_items_in_batch: K denominators of the means, for gradient accumulation.

    Returns:
        The loss and its parts.

    Raises:
        TypeError: A dtype is not supported or mixed outside autocast, or a part is a function.
        ValueError: A shape, device or option does not fit, or the numbers of parts, weights and
            denominators differ.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(4, 16), torch.randn(1000, 16, requires_grad=True)
        >>> parts, segments = ["unilogit", "cross_entropy"], torch.tensor([0, 0, 1, 1])
        >>> result = linear_mixed_loss(
        ...     hidden, weight, torch.arange(4), parts, segments, weights=[0.1, 1.0]
        ... )
        >>> result.loss.backward()
    """
    resolved, factors, items = _described(parts, segments, weights, reduction, num_items_in_batch)
    call_options = CallOptions(
        ignore_index,
        softcap,
        logit_scale,
        vocab_size,
        backend,
        reduction,
        token_weights,
        vocab_parallel=vocab_parallel,
    )
    operands, call = dispatch.from_linear(
        hidden, weight, bias, labels, call_options, options, adapter
    )
    return _mixed(operands, call, segments, resolved, factors, items)


def _mixed(
    operands: Operands,
    call: LossCall,
    segments: Tensor,
    parts: list[Objective],
    weights: list[float],
    items: Tensor | None,
) -> MixedLoss:
    items = None if items is None else items.to(call.row_weight.device)
    return MixedLoss(*dispatch.mixture_of(operands, call, parts, segments, weights, items))


def _described(
    parts: Sequence[str | Objective],
    segments: Tensor,
    weights: Sequence[float] | None,
    reduction: str,
    num_items_in_batch: Tensor | Sequence[int] | None,
) -> tuple[list[Objective], list[float], Tensor | None]:
    if not parts or isinstance(parts, str):
        raise ValueError(f"parts must be a sequence of objectives, got {parts!r}")
    resolved: list[Objective] = []
    for part in parts:
        objective = objectives.resolve(part)
        if not objectives.is_registered(objective):
            raise TypeError(
                "each of parts must be the name of a registered objective or an instance of one, "
                f"got {part!r}"
            )
        resolved.append(objective)
    if not isinstance(segments, Tensor) or segments.dtype not in (torch.int64, torch.int32):
        given = getattr(segments, "dtype", type(segments).__name__)
        raise TypeError(f"segments must be an int64 or int32 tensor, got {given}")
    factors = [1.0] * len(parts) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(parts):
        raise ValueError(f"weights must be {len(parts)} numbers, one per part, got {len(factors)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be one of mean, sum, got {reduction!r}")
    if num_items_in_batch is None:
        return resolved, factors, None
    if reduction != "mean":
        raise ValueError(
            "num_items_in_batch are the denominators of reduction='mean', "
            f"got reduction={reduction!r}"
        )
    items = torch.as_tensor(num_items_in_batch).detach()
    if items.shape != (len(parts),):
        raise ValueError(
            f"num_items_in_batch must hold {len(parts)} numbers, one per part, "
            f"got shape {list(items.shape)}"
        )
    return resolved, factors, items
