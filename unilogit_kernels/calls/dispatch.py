"""From what a user passes to what an operator takes: shared by every loss of the log-odds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import objectives, ops
from unilogit_kernels.calls import validation
from unilogit_kernels.calls.low_rank import LowRank, check_low_rank, term_of
from unilogit_kernels.calls.options import CallOptions
from unilogit_kernels.calls.sharded import local_heads, local_logits
from unilogit_kernels.calls.validation import LossCall
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds
from unilogit_kernels.maths.statistics import Statistics
from unilogit_kernels.objectives import (
    Mixture,
    Objective,
    SequenceObjective,
    StatisticsFunction,
)
from unilogit_kernels.ops.arguments import (
    NO_GRADIENT,
    Logits,
    TokenRows,
    WeightedObjective,
)
from unilogit_kernels.ops.derivatives import any_tangent
from unilogit_kernels.ops.heads import NO_GRADIENTS, Head, Operands
from unilogit_kernels.ops.linear import Active
from unilogit_kernels.rows.contract import weigh


def from_logits(logits: Tensor, labels: Tensor, options: CallOptions) -> tuple[Operands, LossCall]:
    """Validate a call on logits `[..., V]`; see `validation.describe_logits`."""
    (logits,), labels, options = local_logits([("logits", logits)], labels, options)
    call = validation.describe_logits(logits, labels, options)
    return Logits(validation.as_rows(logits)), call


def from_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: CallOptions,
    linear: LinearOptions | None,
    adapter: LowRank | None = None,
) -> tuple[Operands, LossCall]:
    """Validate a call on hidden states and an lm_head.

    Raises:
        TypeError: See `validation.describe_linear` and `low_rank.check_low_rank`.
        ValueError: See there.
        RuntimeError: See there.
    """
    heads, labels, options = local_heads([("", (hidden, weight, bias))], labels, options)
    ((hidden, weight, bias),) = heads
    hidden, weight = validation.cast_for_autocast(hidden), validation.cast_for_autocast(weight)
    bias = None if bias is None else validation.cast_for_autocast(bias)
    call = validation.describe_linear(
        hidden, weight, bias, labels, options, linear or LinearOptions()
    )
    adapter = check_low_rank(adapter, hidden, weight)
    rows = validation.as_rows(hidden)
    return Head(rows, weight, bias, *term_of(adapter, rows, call.row_weight != 0)), call


def objective_of(
    operands: Operands, call: LossCall, objective: Objective | Callable[..., Tensor]
) -> Tensor:
    """The reduced loss of any objective.

    Raises:
        ValueError: The objective's tensors do not fit the labels, or a function's result.
    """
    if isinstance(objective, SequenceObjective):
        objective, call = _place_sequences(objective, call)
    elif isinstance(objective, Objective):
        objective = _flatten(objective, call)
    return _reduced(operands, call, objective)[0]


def loss_and_report(
    operands: Operands, call: LossCall, objective: Objective
) -> tuple[Tensor, Tensor]:
    """The reduced loss of an objective that reports a part of it, and that part, detached."""
    loss, reported = _reduced(operands, call, objective)
    assert reported is not None
    return loss, reported.detach()


def _reduced(
    operands: Operands, call: LossCall, objective: Objective | Callable[..., Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the part of it that the objective reports, if it does."""
    if call.reduction != "none" and objectives.is_registered(objective):
        loss, losses = finish(operands, call, objective)
        return loss, call.factor * losses[1].sum() if losses.dim() > 1 else None
    losses, reported = _losses(operands, call, objective)
    if call.reduction != "none":
        return call.factor * losses.sum(), None
    if isinstance(objective, SequenceObjective):
        return losses.reshape(call.shape[:-1]) if objective.members == 1 else losses, None
    return losses.reshape(call.shape), None if reported is None else reported.reshape(call.shape)


def finish(operands: Operands, call: LossCall, objective: Objective) -> tuple[Tensor, Tensor]:
    """The loss (0-d) and the weighted losses (detached); gradients are computed at once.

    The losses are `[n]`, or `[2, n]` with the part that the objective reports.
    """
    if any_tangent(operands):
        # What is finished in one pass has no tangents; the values of rows do.
        losses, reported = _losses(operands, call, objective)
        rows = losses if reported is None else torch.stack((losses, reported))
        return call.factor * losses.sum(), rows.detach()
    token_rows = _rows(call, objective.needs)
    loss = WeightedObjective(call.row_weight, call.factor, *objectives.pack(objective))
    if isinstance(operands, Logits):
        found = ops.logits.objective_loss(operands, token_rows, loss, NO_GRADIENT)
        return found.loss, found.losses
    finished = ops.linear.linear_objective_loss(
        operands, token_rows, loss, call.linear, NO_GRADIENTS
    )
    return finished.loss, finished.losses


def log_odds(operands: Operands, call: LossCall) -> Tensor:
    """The log-odds `[n]`, differentiable; 0 where a row does not count."""
    return statistics(operands, call, PLAIN).seen.log_odds


class Found(NamedTuple):
    """What rows hold.

    Attributes:
        seen: Differentiable, `[n]` each; 0 where a row does not count.
        column: The runner-up's token, int64 `[n]`; empty where nobody asked for it.
        state: Complete, `[k, n]`, not differentiable.
    """

    seen: Statistics
    column: Tensor
    state: Tensor


def statistics(operands: Operands, call: LossCall, needs: RowNeeds) -> Found:
    """What losses see of the rows, one pass over the vocabulary."""
    active, rows = call.row_weight != 0, _rows(call, needs)
    if isinstance(operands, Logits):
        values, column, state = ops.logits.log_odds(operands, rows)
    else:
        values, column, state, *_ = ops.linear.linear_log_odds(
            operands, Active(active), rows, call.linear, NO_GRADIENT
        )
    return Found(Statistics.of(torch.where(active, values, 0.0), needs), column, state)


def mixture_of(
    operands: Operands,
    call: LossCall,
    parts: Sequence[Objective],
    segments: Tensor,
    weights: Sequence[float],
    num_items: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of several objectives' losses, and each of them `[K]`, detached.

    `call` is described with `reduction="mean"` or `"sum"` and no `num_items_in_batch`.

    Raises:
        ValueError: A tensor of an objective does not fit the labels.
    """
    segments = _token_tensor("segments", segments, call)
    counted = call.row_weight != 0
    placed: list[Objective] = []
    items: list[Tensor] = []
    for index, part in enumerate(parts):
        mine = counted & (segments == index)
        if isinstance(part, SequenceObjective):
            part = part.placed(mine.reshape(call.shape))
            items.append(part.groups())
        else:
            part = _flatten(part, call)
            items.append(mine.sum())
        placed.append(part)
    dtype = call.row_weight.dtype
    counts = torch.stack(items).to(dtype) if num_items is None else num_items.to(dtype)
    counts = counts.clamp(min=1) if call.reduction == "mean" else torch.ones_like(counts)
    factor_of = counts.new_tensor(list(weights))
    # One common denominator stays outside, so that rows are of order 1 where float16 stores them.
    common = counts.sum()
    row_factor = torch.zeros_like(call.row_weight)
    for index, factor in enumerate((factor_of * common / counts).unbind()):
        row_factor = torch.where(segments == index, factor, row_factor)
    call = call._replace(row_weight=call.row_weight * row_factor, factor=common.reciprocal())
    total, losses = finish(operands, call, Mixture(tuple(placed), segments))
    sums = torch.stack([torch.where(segments == k, losses, 0.0).sum() for k in range(len(parts))])
    return total, torch.where(factor_of == 0, 0.0, call.factor * sums / factor_of)


def _rows(call: LossCall, needs: RowNeeds) -> TokenRows:
    """What describes the rows to an operator."""
    assert call.labels is not None
    return TokenRows(
        call.labels,
        call.ignore_index,
        *call.transform,
        call.vocab_size,
        call.shard.first_column,
        call.shard.columns,
        call.shard.group,
        call.shard.owners,
        needs.bits,
        call.backend,
    )


def _token_tensor(name: str, tensor: Tensor, call: LossCall) -> Tensor:
    """A tensor of one number per token, checked, detached and flattened."""
    if tensor.shape != call.shape:
        raise ValueError(
            f"{name} must have the labels' shape {list(call.shape)}, got {list(tensor.shape)}"
        )
    if tensor.device != call.row_weight.device:
        raise ValueError(
            f"{name} must be on the labels' device {call.row_weight.device}, got {tensor.device}"
        )
    return tensor.detach().reshape(-1)


def _flatten(objective: Objective, call: LossCall) -> Objective:
    name = f"the per-token tensors of objective {objective.name!r}"
    return objective.map_tokens(lambda tensor: _token_tensor(name, tensor, call))


def _place_sequences(
    objective: SequenceObjective, call: LossCall
) -> tuple[SequenceObjective, LossCall]:
    if len(call.shape) < 1:
        raise ValueError(
            f"objective {objective.name!r} is of sequences: labels must have shape [..., T]"
        )
    counted = call.row_weight != 0
    if call.weighted:
        raise ValueError(f"objective {objective.name!r} is of sequences and takes no token_weights")
    objective = objective.placed(counted.reshape(call.shape))
    factor = call.factor
    if call.reduction == "mean" and not call.items_given:
        factor = objective.groups().clamp(min=1).to(factor.dtype).reciprocal()
    return objective, call._replace(factor=factor)


def _losses(
    operands: Operands, call: LossCall, objective: Objective | Callable[..., Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The weighted losses `[n]`, differentiable; of sequences one each (they take no weights).

    And the part of them that the objective reports, `[n]`, if it does.
    """
    if not isinstance(objective, Objective):
        if isinstance(objective, StatisticsFunction):
            values = objective(statistics(operands, call, objective.needs).seen)
        else:
            values = objective(log_odds(operands, call))
        if values.shape != call.row_weight.shape:
            raise ValueError(
                f"objective must return one loss per token, shape {list(call.row_weight.shape)}, "
                f"got {list(values.shape)}"
            )
        return weigh(call.row_weight, values), None
    seen = statistics(operands, call, objective.needs).seen
    if isinstance(objective, SequenceObjective):
        return objective.per_sequence(seen.log_odds), None
    losses = weigh(call.row_weight, objective.of_rows(seen, call.vocab_size))
    if not objective.reports:
        return losses, None
    return losses, weigh(call.row_weight, objective.report(seen, call.vocab_size))
