"""Rows that cannot matter cost nothing: the others are gathered before the first GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.fused_linear.active_rows import active_index, counting, significant
from unilogit_kernels.fused_linear.budget import HeadShape, LinearShape, saved_capacity
from unilogit_kernels.fused_linear.gemm import EVERYTHING, NOTHING, GemmDtypes, LinearHead, Needs
from unilogit_kernels.fused_linear.loops import linear_gradient, linear_loss, linear_state
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.fused_linear.plan import plan_linear, plan_saving
from unilogit_kernels.fused_linear.saved import SavedBeside
from unilogit_kernels.fused_linear.tiles import Gradients, Heads
from unilogit_kernels.fused_linear.vocabulary_chunks import VocabularyLoop
from unilogit_kernels.rows.contract import RowLoss, Rows, weigh


class HeadInputs(NamedTuple):
    """The operands of one model as they are given; see `LinearHead`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    inner: Tensor | None = None
    up: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the low-rank term; 0 for none."""
        return 0 if self.up is None else self.up.shape[1]


class LinearInputs(NamedTuple):
    """The operands of a fused linear call as they are given, and how to run it.

    Attributes:
        own: Those of the model that learns.
        options: How the call may run.
        reference: The operands of the reference model, if there is one.
    """

    own: HeadInputs
    options: LinearOptions
    reference: HeadInputs | None = None

    @property
    def hidden(self) -> Tensor:
        """`[n, h]`."""
        return self.own.hidden

    @property
    def dtypes(self) -> GemmDtypes:
        """The dtypes around the GEMMs."""
        return self._dtypes_of(self.hidden)

    def shape(self, n: int, columns: int, needs: Needs) -> LinearShape:
        """What the cut of a call on `n` of the tokens depends on; `columns` as of `Rows`."""
        device_type = self.hidden.device.type
        h, dtype = self.hidden.shape[1], self.hidden.dtype
        reference = None
        if self.reference is not None:
            hidden, rank = self.reference.hidden, self.reference.rank
            reference = HeadShape(hidden.shape[1], self._dtypes_of(hidden), hidden.dtype, rank)
        columns = columns or 1  # of a shard of padding: nothing is cut
        return LinearShape(
            n, h, columns, self.dtypes, dtype, device_type, needs, reference, self.own.rank
        )

    def positions(self, active: Tensor) -> Tensor | None:
        """Positions of the active rows, or None for all; always None where `compact` is off."""
        return active_index(active) if self.options.compact else None

    def head(self, active: Tensor, index: Tensor | None) -> LinearHead:
        """The lm_head on the rows `index`, or on all of them with inactive ones cleared."""
        return self._head(self.own, active, index)

    def heads(self, active: Tensor, index: Tensor | None) -> Heads:
        """The lm_heads of all models, the student's first."""
        own = self.head(active, index)
        if self.reference is None:
            return (own,)
        return own, self._head(self.reference, active, index)

    def new_gradients(self, columns: int, needs: Needs) -> Gradients:
        """Gradients to be written; rows that carry no probability have theirs."""
        results, exact = self.dtypes.results, self.dtypes.exact
        own, bias = self.own, None

        def empty(wanted: bool, like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if not wanted or like is None:
                return None
            return allocate(like.shape, dtype, like.device)

        weight = empty(needs.weight, own.weight, results)
        up = empty(needs.up, own.up, exact)
        for gradient in (weight, up):
            if gradient is not None:
                gradient[columns:] = 0
        if needs.bias:
            bias = own.weight.new_zeros(own.weight.shape[0], dtype=exact)
        hidden = empty(needs.hidden, own.hidden, results)
        return Gradients(hidden, weight, bias, empty(needs.inner, own.inner, exact), up)

    def new_saved(self, columns: int, *, needs_grad: bool) -> list[Tensor]:
        """Memory for each model's logits that are saved for a backward, as the budget leaves it."""
        shape = self.shape(self.hidden.shape[0], columns, EVERYTHING)
        elements = saved_capacity(shape, self.options) if needs_grad and columns else 0
        return [self.hidden.new_empty((elements,), dtype=h.dtypes.logits) for h in shape.heads]

    def _dtypes_of(self, hidden: Tensor) -> GemmDtypes:
        return GemmDtypes.of(hidden.dtype, hidden.device.type, self.options.logits_dtype)

    def _head(self, inputs: HeadInputs, active: Tensor, index: Tensor | None) -> LinearHead:
        hidden, weight, bias, inner, up = inputs
        if index is None and not self.options.compact:
            # Their gradient rows are 0, and 0 * NaN is not.
            hidden = hidden.masked_fill(~active[:, None], 0.0)
            inner = None if inner is None else inner.masked_fill(~active[:, None], 0.0)
        head = LinearHead(hidden, weight, bias, self._dtypes_of(hidden), inner, up)
        return head if index is None else head.at(index)


def compacted_values(
    inputs: LinearInputs, active: Tensor, rows: Rows, memory: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Values `[..., n]` and states `[k, n]`; rows that are not active get 0 and an empty state.

    Args:
        inputs: Operands and options.
        active: bool `[n]`.
        rows: Labels and kernels.
        memory: 1-d, one in the logits' dtype of each model: filled with as many of them as fit.
    """
    n, dtype = inputs.hidden.shape[0], inputs.dtypes.exact
    index = inputs.positions(active)
    state = rows.empty_state(n, inputs.hidden.device, dtype)
    if n == 0 or (index is not None and index.numel() == 0):
        return torch.zeros_like(rows.values(state)), state
    heads = inputs.heads(active, index)
    part = rows if index is None else rows.at(index)
    m = heads[0].hidden.shape[0]
    shape = inputs.shape(m, rows.columns, NOTHING)
    plan = plan_linear(shape, inputs.options, passes=1)
    if memory[0].numel():
        plan = plan_saving(shape, inputs.options, m)
    part_state = linear_state(heads, part, plan, SavedBeside(memory, m))
    part_values = part.values(part_state)
    if index is None:
        return torch.where(active, part_values, 0.0), part_state
    state[:, index] = part_state
    values = part_values.new_zeros(*part_values.shape[:-1], n)
    return values.index_copy_(-1, index, part_values), state


def compacted_gradient(
    inputs: LinearInputs,
    active: Tensor,
    rows: Rows,
    needs: Needs,
    state: Tensor,
    upstream: Tensor,
    saved: Sequence[Tensor],
) -> Gradients:
    """Gradients of `sum_i upstream_i values_i`, for the rows whose upstream gradient counts.

    Args:
        inputs: As in the forward.
        active: As in the forward.
        rows: As in the forward.
        needs: Which gradients are wanted.
        state: From the forward.
        upstream: `[..., n]`.
        saved: What the forward saved.
    """
    gradients = inputs.new_gradients(rows.columns, needs)
    upstream = significant(torch.where(active, upstream, 0.0), inputs.options.skip_below)
    counts = counting(upstream)
    index = inputs.positions(counts)
    if upstream.numel() == 0 or (index is not None and index.numel() == 0):
        gradients.zero()
        return gradients
    heads = inputs.heads(counts, index)
    m = heads[0].hidden.shape[0]
    shape, shared = inputs.shape(m, rows.columns, needs), rows.shard is not None
    plan = plan_linear(shape, inputs.options, passes=1, shared=shared)
    saved_logits, position = None, None
    if saved[0].numel():
        # The cut of the forward, which saw every active row.
        first = inputs.positions(active)
        forward_tokens = active.numel() if first is None else first.numel()
        shape = inputs.shape(forward_tokens, rows.columns, needs)
        plan = plan_saving(shape, inputs.options, m)
        saved_logits = SavedBeside(saved, forward_tokens)
        if index is not None:
            position = (active.cumsum(0) - 1)[index] if first is not None else index
    if index is not None:
        rows = rows.at(index)
        state, upstream = state[:, index], upstream[..., index]
    part = gradients if index is None else gradients.of_first(m)
    linear_gradient(
        VocabularyLoop(heads, rows, plan, saved_logits, position), state, upstream, part
    )
    if index is not None:
        gradients.spread(index)
    return gradients


def compacted_loss(inputs: LinearInputs, loss: RowLoss, needs: Needs) -> tuple[Tensor, Gradients]:
    """Weighted losses and gradients, from the rows whose weight is not 0.

    The losses are `[n]`, or `[2, n]` where a part of them is reported.
    """
    active = loss.row_weight != 0
    index = inputs.positions(active)
    columns, shared = loss.rows.columns, loss.rows.shard is not None
    gradients = inputs.new_gradients(columns, needs)
    if active.numel() == 0 or (index is not None and index.numel() == 0):
        nothing = torch.zeros_like(loss.row_weight)
        gradients.zero()
        return torch.stack((nothing, nothing)) if loss.reports else nothing, gradients
    heads = inputs.heads(active, index)
    m = heads[0].hidden.shape[0]
    shape = inputs.shape(m, columns, needs)
    plan = plan_linear(
        shape,
        inputs.options,
        passes=2,
        coupled=loss.coupled,
        adds_up=loss.adds_up,
        shared=shared,
    )
    part = gradients
    if index is not None:
        loss, part = loss.at(index), gradients.of_first(m)
    losses = weigh(loss.row_weight, linear_loss(heads, loss, plan, part, inputs.options))
    if index is not None:
        everywhere = losses.new_zeros(*losses.shape[:-1], active.numel())
        losses = everywhere.index_copy_(-1, index, losses)
        gradients.spread(index)
    return losses, gradients
