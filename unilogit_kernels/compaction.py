"""Rows that cannot matter cost nothing: the others are gathered before the first GEMM."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import row_state
from unilogit_kernels.kept import KeptLogits
from unilogit_kernels.loops import (
    Gradients,
    VocabularyLoop,
    linear_gradient,
    linear_objective,
    linear_state,
)
from unilogit_kernels.memory import allocate
from unilogit_kernels.plan import (
    LinearOptions,
    LinearShape,
    plan_keeping,
    plan_linear,
)
from unilogit_kernels.projection import GemmDtypes, LinearHead, Needs
from unilogit_kernels.rows import RowProblem, Weighted
from unilogit_kernels.selection import active_index, significant, spread

NOTHING = Needs(hidden=False, weight=False, bias=False)
EVERYTHING = Needs(hidden=True, weight=True, bias=True)


class LinearInputs(NamedTuple):
    """The operands of a fused linear call as they are given, and how to run it.

    Attributes:
        hidden: `[n, h]`.
        weight: `[V, h]`.
        bias: `[V]` or None.
        logits_dtype: What the logits are rounded to, or None for the most that the device can.
        options: How the call may run.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits_dtype: torch.dtype | None
    options: LinearOptions

    @property
    def dtypes(self) -> GemmDtypes:
        """The dtypes around the GEMMs."""
        return GemmDtypes.of(self.hidden.dtype, self.hidden.device.type, self.logits_dtype)

    def shape(self, n: int, vocab_size: int, needs: Needs) -> LinearShape:
        """What the cut of a call on `n` of the tokens depends on."""
        device_type = self.hidden.device.type
        h, dtype = self.hidden.shape[1], self.hidden.dtype
        return LinearShape(n, h, vocab_size, self.dtypes, dtype, device_type, needs)

    def positions(self, active: Tensor) -> Tensor | None:
        """Positions of the active rows, or None for all; always None where `compact` is off."""
        return active_index(active) if self.options.compact else None

    def head(self, active: Tensor, index: Tensor | None) -> LinearHead:
        """The lm_head on the rows `index`, or on all of them with inactive ones cleared."""
        hidden = self.hidden
        if index is not None:
            hidden = hidden[index]
        elif not self.options.compact:
            # Their gradient rows are 0, and 0 * NaN is not.
            hidden = hidden.masked_fill(~active[:, None], 0.0)
        dtypes = self.dtypes
        return LinearHead(hidden.to(dtypes.operands), self.weight, self.bias, dtypes)

    def new_gradients(self, vocab_size: int, needs: Needs) -> Gradients:
        """Gradients to be written; rows that carry no probability have theirs."""
        results, exact = self.dtypes.results, self.dtypes.exact
        hidden = weight = bias = None
        if needs.hidden:
            hidden = allocate(self.hidden.shape, results, self.hidden.device)
        if needs.weight:
            weight = allocate(self.weight.shape, results, self.weight.device)
            weight[vocab_size:] = 0
        if needs.bias:
            bias = self.weight.new_zeros(self.weight.shape[0], dtype=exact)
        return Gradients(hidden, weight, bias)


def compacted_log_odds(
    inputs: LinearInputs, active: Tensor, rows: RowProblem, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-odds `[n]` and states `[3, n]`; rows that are not active get 0 and an empty state.

    Args:
        inputs: Operands and options.
        active: bool `[n]`.
        rows: Labels and kernels.
        keep: 1-d, in the logits' dtype: filled with as many of the logits as fit.
    """
    n, dtype = inputs.hidden.shape[0], inputs.dtypes.exact
    index = inputs.positions(active)
    log_odds = inputs.hidden.new_zeros(n, dtype=dtype)
    state = row_state.empty_state(n, inputs.hidden.device, dtype)
    if n == 0 or (index is not None and index.numel() == 0):
        return log_odds, state
    head = inputs.head(active, index)
    part = rows if index is None else rows._replace(labels=rows.labels[index])
    m = head.hidden.shape[0]
    shape = inputs.shape(m, rows.vocab_size, NOTHING)
    plan = plan_linear(shape, inputs.options, visits=1)
    if keep.numel():
        plan = plan_keeping(shape, inputs.options, m)
    part_state = linear_state(head, part, plan, KeptLogits(keep, m))
    part_log_odds = row_state.log_odds(part_state, part.labels, part.vocab_size)
    if index is None:
        return torch.where(active, part_log_odds, 0.0), part_state
    state[:, index] = part_state
    return log_odds.index_copy_(0, index, part_log_odds), state


def compacted_gradient(
    inputs: LinearInputs,
    active: Tensor,
    rows: RowProblem,
    needs: Needs,
    state: Tensor,
    slope: Tensor,
    kept: Tensor,
) -> Gradients:
    """Gradients of `sum_i slope_i d_i`, for the rows whose slope counts.

    Args:
        inputs: As in the forward.
        active: As in the forward.
        rows: As in the forward.
        needs: Which gradients are wanted.
        state: From the forward.
        slope: `[n]`.
        kept: What the forward kept.
    """
    gradients = inputs.new_gradients(rows.vocab_size, needs)
    slope = significant(torch.where(active, slope, 0.0), inputs.options.skip_below)
    counts = slope != 0
    index = inputs.positions(counts)
    if slope.numel() == 0 or (index is not None and index.numel() == 0):
        return _zeroed(gradients)
    head = inputs.head(counts, index)
    m = head.hidden.shape[0]
    plan = plan_linear(inputs.shape(m, rows.vocab_size, needs), inputs.options, visits=1)
    saved, position = None, None
    if kept.numel():
        # The cut of the forward, which saw every active row.
        first = inputs.positions(active)
        forward_tokens = slope.numel() if first is None else first.numel()
        shape = inputs.shape(forward_tokens, rows.vocab_size, needs)
        plan = plan_keeping(shape, inputs.options, m)
        saved = KeptLogits(kept, forward_tokens)
        if index is not None:
            position = (active.cumsum(0) - 1)[index] if first is not None else index
    if index is not None:
        rows = rows._replace(labels=rows.labels[index])
        state, slope = state[:, index], slope[index]
    part = gradients
    if index is not None and gradients.hidden is not None:
        part = gradients._replace(hidden=gradients.hidden[:m])
    linear_gradient(VocabularyLoop(head, rows, plan, saved, position), state, slope, part)
    return _spread(gradients, index)


def compacted_objective(
    inputs: LinearInputs, rows: RowProblem, needs: Needs, weighted: Weighted
) -> tuple[Tensor, Gradients]:
    """Weighted losses `[n]` and gradients, from the rows whose weight is not 0."""
    active = weighted.row_weight != 0
    index = inputs.positions(active)
    gradients = inputs.new_gradients(rows.vocab_size, needs)
    if active.numel() == 0 or (index is not None and index.numel() == 0):
        return torch.zeros_like(weighted.row_weight), _zeroed(gradients)
    head = inputs.head(active, index)
    m = head.hidden.shape[0]
    shape = inputs.shape(m, rows.vocab_size, needs)
    plan = plan_linear(shape, inputs.options, visits=2, coupled=weighted.objective.coupled)
    part, every_weight = gradients, weighted.row_weight
    if index is not None:
        rows = rows._replace(labels=rows.labels[index])
        weighted = weighted.at(index)
        if gradients.hidden is not None:
            part = gradients._replace(hidden=gradients.hidden[:m])
    losses = weighted.weigh(linear_objective(head, rows, plan, weighted, part, inputs.options))
    if index is not None:
        losses = torch.zeros_like(every_weight).index_copy_(0, index, losses)
    return losses, _spread(gradients, index)


def _spread(gradients: Gradients, index: Tensor | None) -> Gradients:
    if index is not None and gradients.hidden is not None:
        spread(gradients.hidden, index)
    return gradients


def _zeroed(gradients: Gradients) -> Gradients:
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()
    return gradients
