"""Rows that cannot matter cost nothing: the others are gathered before the first GEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels import row_state
from unilogit_kernels.loops import Gradients, linear_gradient, linear_objective, linear_state
from unilogit_kernels.plan import Plan, plan_linear
from unilogit_kernels.projection import GemmDtypes, LinearHead, Needs
from unilogit_kernels.rows import RowProblem, Weighted


def compacted_log_odds(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, rows: RowProblem
) -> tuple[Tensor, Tensor]:
    """Log-odds `[n]` and states `[3, n]`; rows that are not active get 0 and an empty state."""
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    n, dtype = hidden.shape[0], dtypes.exact
    index = _active_index(active)
    log_odds = hidden.new_zeros(n, dtype=dtype)
    state = row_state.empty_state(n, hidden.device, dtype)
    if index is not None and index.numel() == 0:
        return log_odds, state
    head, part = _select(hidden, weight, bias, rows, dtypes, index)
    plan = _plan(head, part, hidden.dtype, Needs(False, False, False), visits=1)
    part_state = linear_state(head, part, plan)
    part_log_odds = row_state.log_odds(part_state, part.labels, part.vocab_size)
    if index is None:
        return part_log_odds, part_state
    state[:, index] = part_state
    return log_odds.index_copy_(0, index, part_log_odds), state


def compacted_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowProblem,
    needs: Needs,
    state: Tensor,
    slope: Tensor,
) -> Gradients:
    """`linear_gradient` of the rows whose slope is not 0."""
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    index = _active_index(slope != 0)
    if index is not None and index.numel() == 0:
        return _zero_gradients(hidden, weight, dtypes, needs)
    head, part = _select(hidden, weight, bias, rows, dtypes, index)
    plan = _plan(head, part, hidden.dtype, needs, visits=1)
    if index is not None:
        state, slope = state[:, index], slope[index]
    gradients = linear_gradient(head, part, plan, needs, state, slope)
    return _scatter(gradients, hidden, index)


def compacted_objective(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowProblem,
    needs: Needs,
    weighted: Weighted,
) -> tuple[Tensor, Gradients]:
    """`linear_objective` of the rows whose weight is not 0."""
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    index = _active_index(weighted.row_weight != 0)
    if index is not None and index.numel() == 0:
        return weighted.factor.new_zeros(()), _zero_gradients(hidden, weight, dtypes, needs)
    head, part = _select(hidden, weight, bias, rows, dtypes, index)
    plan = _plan(head, part, hidden.dtype, needs, visits=2)
    if index is not None:
        weighted = weighted._replace(row_weight=weighted.row_weight[index])
    loss, gradients = linear_objective(head, part, plan, needs, weighted)
    return loss, _scatter(gradients, hidden, index)


def _active_index(active: Tensor) -> Tensor | None:
    """Positions of the active rows, or None if all are."""
    index = active.nonzero()[:, 0]
    return None if 0 < index.numel() == active.numel() else index


def _select(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowProblem,
    dtypes: GemmDtypes,
    index: Tensor | None,
) -> tuple[LinearHead, RowProblem]:
    if index is not None:
        hidden = hidden[index]
        rows = rows._replace(labels=rows.labels[index])
    return LinearHead(hidden.to(dtypes.operands), weight, bias, dtypes), rows


def _plan(
    head: LinearHead, rows: RowProblem, input_dtype: torch.dtype, needs: Needs, *, visits: int
) -> Plan:
    n, h = head.hidden.shape
    device_type = head.hidden.device.type
    return plan_linear(
        n, h, rows.vocab_size, head.dtypes, input_dtype, device_type, needs, visits=visits
    )


def _scatter(gradients: Gradients, hidden: Tensor, index: Tensor | None) -> Gradients:
    if index is None or gradients.hidden is None:
        return gradients
    full = gradients.hidden.new_zeros(hidden.shape)
    return gradients._replace(hidden=full.index_copy_(0, index, gradients.hidden))


def _zero_gradients(hidden: Tensor, weight: Tensor, dtypes: GemmDtypes, needs: Needs) -> Gradients:
    return Gradients(
        hidden.new_zeros(hidden.shape, dtype=dtypes.results) if needs.hidden else None,
        weight.new_zeros(weight.shape, dtype=dtypes.results) if needs.weight else None,
        weight.new_zeros(weight.shape[0], dtype=dtypes.exact) if needs.bias else None,
    )
