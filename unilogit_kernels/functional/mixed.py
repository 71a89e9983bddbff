"""Mixed batches: several objectives in one call, each for its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.calls import dispatch
from unilogit_kernels.calls.validation import LossCall
from unilogit_kernels.objectives import Objective
from unilogit_kernels.ops.arguments import Operands


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


def mixed_loss(
    logits: Tensor,
    labels: Tensor,
    parts: Sequence[str | Objective],
    segments: Tensor,
    *,
    weights: Sequence[float] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: Tensor | Sequence[int] | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> MixedLoss:
    """`sum_k weights[k] * objective_loss(tokens of segment k, parts[k])`, in one call.

    Args:
        logits: As in `unilogit_loss`.
        labels: As in `unilogit_loss`.
        parts: K objectives: registered names or instances. The tensors of a sequence objective are
            those of all sequences of the batch; only its own count.
        segments: int64 `[...]`: the index of the part that each token belongs to.
        weights: K factors, 1 each by default.
        ignore_index: As in `unilogit_loss`.
        reduction: `"mean"`, of each part over its own tokens (or sequences), or `"sum"`.
        token_weights: As in `unilogit_loss`.
        num_items_in_batch: K denominators of the means, for gradient accumulation.
        softcap: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.

    Returns:
        The loss and its parts.

    Raises:
        TypeError: As `unilogit_loss`; also for a part that is a function.
        ValueError: As `unilogit_loss`; also where the numbers of parts, weights and denominators
            differ.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

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
    operands, call = dispatch.from_logits(
        logits,
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        token_weights=token_weights,
        num_items_in_batch=None,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=backend,
    )
    return _mixed(operands, call, resolved, segments, factors, items)


def linear_mixed_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    parts: Sequence[str | Objective],
    segments: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Sequence[float] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: Tensor | Sequence[int] | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    skip_below: float = 0.0,
    compact: bool = True,
) -> MixedLoss:
    """`mixed_loss` of `hidden @ weight.T + bias`, without ever holding these logits.

    Forget and retain rows of a batch then share one sequence of GEMMs and one backward.

    Args:
        hidden: As in `linear_unilogit_loss`.
        weight: As in `linear_unilogit_loss`.
        labels: As in `unilogit_loss`.
        parts: As in `mixed_loss`.
        segments: As in `mixed_loss`.
        bias: `[V]` or None.
        weights: As in `mixed_loss`.
        ignore_index: As in `unilogit_loss`.
        reduction: As in `mixed_loss`.
        token_weights: As in `unilogit_loss`.
        num_items_in_batch: As in `mixed_loss`.
        softcap: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.
        memory_budget: As in `linear_unilogit_loss`.
        logits_dtype: As in `linear_unilogit_loss`.
        skip_below: As in `linear_unilogit_loss`.
        compact: As in `linear_unilogit_loss`.

    Returns:
        As `mixed_loss`.

    Raises:
        TypeError: As `linear_unilogit_loss` and `mixed_loss`.
        ValueError: As `mixed_loss`.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

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
    operands, call = dispatch.from_linear(
        hidden,
        weight,
        bias,
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        token_weights=token_weights,
        num_items_in_batch=None,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=backend,
        memory_budget=memory_budget,
        logits_dtype=logits_dtype,
        skip_below=skip_below,
        compact=compact,
    )
    return _mixed(operands, call, resolved, segments, factors, items)


def _mixed(
    operands: Operands,
    call: LossCall,
    parts: list[Objective],
    segments: Tensor,
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
