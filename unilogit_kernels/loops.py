"""The chunk loops of a fused linear call: GEMMs, row kernels and objectives, tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import row_state
from unilogit_kernels.kept import Kept, KeptInGradient
from unilogit_kernels.memory import allocate
from unilogit_kernels.one_visit import gradient_in_one_visit
from unilogit_kernels.plan import LinearOptions, Plan, slices, token_groups, token_tiles
from unilogit_kernels.projection import LinearHead, multiply
from unilogit_kernels.rows import RowProblem, Weighted, finish_rows, row_slope
from unilogit_kernels.selection import gather_in_place, significant, spread, worthwhile_index


class Gradients(NamedTuple):
    """Gradients of a fused linear call, each in `GemmDtypes.results`, or None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# ---- vocabulary chunks -------------------------------------------------------------------------


@dataclass(frozen=True)
class VocabularyLoop:
    """The visits of the vocabulary order: statistics of all columns, then gradients.

    Attributes:
        head: With the tokens that count.
        rows: Their labels, and the kernels.
        plan: The cut.
        kept: What the first visit keeps for the second, if anything.
        index: Ascending, which of the first visit's tokens these are; None for all of them.
    """

    head: LinearHead
    rows: RowProblem
    plan: Plan
    kept: Kept | None = None
    index: Tensor | None = None

    def select(self, index: Tensor) -> VocabularyLoop:
        """The loop over some of the tokens, after the first visit saw all of them."""
        head = replace(self.head, hidden=self.head.hidden[index])
        rows = self.rows._replace(labels=self.rows.labels[index])
        still_kept = int((index < self.plan.kept_tokens).sum())
        plan = replace(self.plan, kept_tokens=still_kept)
        return VocabularyLoop(head, rows, plan, self.kept, index)

    def statistics(self, first_token: int = 0) -> Tensor:
        """The complete states of the tokens from `first_token` on, `[3, m]`.

        Logits are kept where there is room; otherwise one tile of them exists at a time.
        """
        head, rows, plan, kept = self.head, self.rows, self.plan, self.kept
        tiles = [t for t in token_tiles(head.hidden.shape[0], plan) if t.start >= first_token]
        states = [self._empty_state(tokens) for tokens in tiles]
        if not tiles:
            return self._empty_state(slice(0, 0))
        scratch = self._buffer(_longest(tiles) * plan.tile_columns, head.dtypes.logits)
        for columns in slices(rows.vocab_size, plan.columns):
            weight = head.weight_columns(columns)
            for tokens, state in zip(tiles, states, strict=True):
                place = None if kept is None or kept.finished else kept.place(tokens, columns)
                for part, here in _parts(columns, plan):
                    tile = tile_view(scratch, tokens, part) if place is None else place[:, here]
                    head.project(tokens, part, weight[here], out=tile)
                    rows.kernels.log_odds_update(
                        tile, rows.labels[tokens], part.start, state, rows.transform
                    )
        return torch.cat(states, dim=1)

    def finish_kept_rows(
        self, kept: KeptInGradient, slope_of: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        """States of the kept tokens, whose gradient rows are finished into `kept`.

        They go by token chunks: `slope_of(state, tokens)` needs the statistics of its tokens alone.
        """
        head, rows, plan = self.head, self.rows, self.plan
        vocabulary = slice(0, rows.vocab_size)
        buffer = self._buffer(plan.row_tokens * rows.vocab_size, head.dtypes.logits)
        states = []
        for tokens in slices(kept.tokens, plan.row_tokens):
            logits, labels = tile_view(buffer, tokens, vocabulary), rows.labels[tokens]
            state = self._empty_state(tokens)
            for part in slices(rows.vocab_size, plan.row_columns):
                head.project(tokens, part, head.weight_columns(part), out=logits[:, part])
                rows.kernels.log_odds_update(
                    logits[:, part], labels, part.start, state, rows.transform
                )
            slope = slope_of(state, tokens)
            for columns in slices(rows.vocab_size, plan.columns):
                out = kept.place(tokens, columns)
                assert out is not None
                rows.kernels.log_odds_gradient(
                    logits[:, columns], labels, columns.start, state, slope, out, rows.transform
                )
            states.append(state)
        return torch.cat(states, dim=1)

    def gradients(self, state: Tensor, slope: Tensor, gradients: Gradients) -> None:
        """Write the gradients of `sum_i slope_i d_i`: `hidden`'s has a row for each token."""
        head, plan = self.head, self.plan
        d_hidden, d_weight, d_bias = gradients
        exact = head.dtypes.exact
        groups = token_groups(head.hidden.shape[0], plan)
        scratch = self._gradient_scratch(groups)
        hidden_sum = d_hidden
        if d_hidden is not None and d_hidden.dtype != exact:
            hidden_sum = torch.empty_like(d_hidden, dtype=exact)
        # Several groups add up in float32, and not where something kept is still to be read.
        in_gradient = self.kept is not None and self.kept.in_gradient
        adds_up = len(groups) > 1 and (in_gradient or head.dtypes.results != exact)
        for columns in slices(self.rows.vocab_size, plan.columns):
            weight = head.weight_columns(columns)
            weight_sum = None
            if d_weight is not None:
                weight_sum = d_weight[columns]
                if adds_up:
                    weight_sum = torch.empty_like(weight_sum, dtype=exact)
            for i, tiles in enumerate(groups):
                tokens = slice(tiles[0].start, tiles[-1].stop)
                out = tile_view(scratch[1], tokens, columns)
                for tile in tiles:
                    here = slice(tile.start - tokens.start, tile.stop - tokens.start)
                    self._gradient_rows(tile, columns, weight, state, slope, scratch[0], out[here])
                if hidden_sum is not None:
                    multiply(out, weight, hidden_sum[tokens], accumulate=columns.start > 0)
                if weight_sum is not None:
                    multiply(out.t(), head.hidden[tokens], weight_sum, accumulate=i > 0)
                if d_bias is not None:
                    d_bias[columns] += out.sum(0, dtype=exact)
            if d_weight is not None and weight_sum is not None and adds_up:
                d_weight[columns] = weight_sum
        if d_hidden is not None and hidden_sum is not None and hidden_sum is not d_hidden:
            d_hidden.copy_(hidden_sum)

    def _gradient_scratch(self, groups: list[list[slice]]) -> tuple[Tensor | None, Tensor]:
        """A tile of logits, None where they pass through the rows' memory, and a chunk of rows."""
        plan, dtypes = self.plan, self.head.dtypes
        tokens = max(group[-1].stop - group[0].start for group in groups)
        row_scratch = self._buffer(tokens * plan.columns, dtypes.operands)
        if dtypes.operands == dtypes.logits and plan.tile_columns >= plan.columns:
            return None, row_scratch
        longest = _longest([tile for group in groups for tile in group])
        return self._buffer(longest * plan.tile_columns, dtypes.logits), row_scratch

    def _gradient_rows(
        self,
        tokens: slice,
        columns: slice,
        weight: Tensor,
        state: Tensor,
        slope: Tensor,
        scratch: Tensor | None,
        out: Tensor,
    ) -> None:
        """Gradient rows `[tokens, columns]`: as kept, or from logits kept or projected again."""
        rows = self.rows
        source, index = self._kept_tile(tokens, columns)
        if source is not None and self.kept is not None and self.kept.finished:
            _take(source, index, out)
            return
        for part, here in _parts(columns, self.plan):
            logits = out if scratch is None else tile_view(scratch, tokens, part)
            if source is None:
                self.head.project(tokens, part, weight[here], out=logits)
            elif index is None:
                logits = source[:, here]
            else:
                _take(source[:, here], index, logits)
            rows.kernels.log_odds_gradient(
                logits,
                rows.labels[tokens],
                part.start,
                state[:, tokens].contiguous(),
                slope[tokens],
                out[:, here],
                rows.transform,
            )

    def _kept_tile(self, tokens: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        """What is kept of a tile, and which rows of it to take (None for all)."""
        kept = self.kept
        if kept is None or (kept.in_gradient and tokens.stop > self.plan.kept_tokens):
            return None, None
        if self.index is None:
            return kept.place(tokens, columns), None
        return kept.place(slice(0, kept.tokens), columns), self.index[tokens]

    def _empty_state(self, tokens: slice) -> Tensor:
        count, device = tokens.stop - tokens.start, self.head.hidden.device
        return row_state.empty_state(count, device, self.head.dtypes.exact)

    def _buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        return allocate((elements,), dtype, self.head.hidden.device)


def _parts(columns: slice, plan: Plan) -> list[tuple[slice, slice]]:
    """Tiles of a chunk: which columns of the vocabulary, and which of the chunk."""
    parts = slices(columns.stop, plan.tile_columns, start=columns.start)
    return [(p, slice(p.start - columns.start, p.stop - columns.start)) for p in parts]


def _take(source: Tensor, index: Tensor | None, out: Tensor) -> None:
    """`out = source[index]`, or all of it."""
    if index is None:
        out.copy_(source)
    else:
        torch.index_select(source, 0, index, out=out)


def _longest(tiles: list[slice]) -> int:
    return max(int(tile.stop - tile.start) for tile in tiles)


def tile_view(scratch: Tensor, tokens: slice, columns: slice) -> Tensor:
    """A contiguous `[tokens, columns]` view of the front of a flat buffer."""
    shape = (tokens.stop - tokens.start, columns.stop - columns.start)
    return scratch[: shape[0] * shape[1]].view(shape)


# ---- token chunks ------------------------------------------------------------------------------


def by_tokens(
    head: LinearHead,
    rows: RowProblem,
    plan: Plan,
    gradients: Gradients,
    gradient_rows: Callable[[slice, Tensor, Tensor], Tensor | None],
) -> None:
    """For each chunk of tokens: project, gradient rows, the gradients' GEMMs.

    The weight's gradient adds up over the chunks, in float32.

    `gradient_rows(tokens, logits, out)` writes them and returns which rows count, or None for all.
    """
    vocabulary = slice(0, rows.vocab_size)
    weight, dtypes, device = head.weight_columns(vocabulary), head.dtypes, head.hidden.device
    elements = plan.tokens * rows.vocab_size
    buffer = row_buffer = allocate((elements,), dtypes.logits, device)
    if dtypes.operands != dtypes.logits:
        row_buffer = allocate((elements,), dtypes.operands, device)
    d_weight = weight_sum = None
    if gradients.weight is not None:
        d_weight = weight_sum = gradients.weight[vocabulary]
        if d_weight.dtype != dtypes.exact:
            weight_sum = allocate(d_weight.shape, dtypes.exact, device)
    for tokens in slices(head.hidden.shape[0], plan.tokens):
        logits = tile_view(buffer, tokens, vocabulary)
        out = tile_view(row_buffer, tokens, vocabulary)
        hidden = head.hidden[tokens]
        for part in slices(rows.vocab_size, plan.tile_columns):
            head.project(tokens, part, weight[part], out=logits[:, part])
        index = gradient_rows(tokens, logits, out)
        if index is not None:
            out, hidden = gather_in_place(out, index), hidden[index]
        if gradients.hidden is not None:
            d_hidden = gradients.hidden[tokens]
            multiply(out, weight, d_hidden[: out.shape[0]])
            if index is not None:
                spread(d_hidden, index)
        if weight_sum is not None:
            multiply(out.t(), hidden, weight_sum, accumulate=tokens.start > 0)
        if gradients.bias is not None:
            gradients.bias[vocabulary] += out.sum(0, dtype=dtypes.exact)
    if d_weight is not None and weight_sum is not None and weight_sum is not d_weight:
        d_weight.copy_(weight_sum)


# ---- the two kinds of call ---------------------------------------------------------------------


def linear_state(
    head: LinearHead, rows: RowProblem, plan: Plan, kept: Kept | None = None
) -> Tensor:
    """The complete state `[3, n]` of the logits of `head`."""
    return VocabularyLoop(head, rows, plan, kept).statistics()


def linear_gradient(
    loop: VocabularyLoop, state: Tensor, slope: Tensor, gradients: Gradients
) -> None:
    """Gradients of `sum_i slope_i d_i`, with logits kept from the forward or projected again."""
    if loop.plan.order == "vocabulary_chunks":
        loop.gradients(state, slope, gradients)
        return
    rows = loop.rows

    def gradient_rows(tokens: slice, logits: Tensor, out: Tensor) -> None:
        part = rows.at(tokens)
        part_state = state[:, tokens].contiguous()
        part.kernels.log_odds_gradient(
            logits, part.labels, 0, part_state, slope[tokens], out, part.transform
        )

    by_tokens(loop.head, rows, loop.plan, gradients, gradient_rows)


def linear_objective(
    head: LinearHead,
    rows: RowProblem,
    plan: Plan,
    weighted: Weighted,
    gradients: Gradients,
    options: LinearOptions,
) -> Tensor:
    """Losses `[n]` before weights, and gradients, in one call: 3 GEMMs, 2 with a frozen weight."""
    fold = head.dtypes.rows_hold_factor
    if plan.order == "token_chunks":
        values = head.hidden.new_empty(head.hidden.shape[0], dtype=head.dtypes.exact)
        drop = _InactiveRows(options, rows)

        def gradient_rows(tokens: slice, logits: Tensor, out: Tensor) -> Tensor | None:
            part = rows.at(tokens)
            values[tokens] = finish_rows(logits, part, weighted.at(tokens), out, fold_factor=fold)
            return drop.active(out, part.labels)

        by_tokens(head, rows, plan, gradients, gradient_rows)
    else:
        values = _objective_by_columns(head, rows, plan, weighted, gradients, options)
    if not fold:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(weighted.factor)
    return values


def _objective_by_columns(
    head: LinearHead,
    rows: RowProblem,
    plan: Plan,
    weighted: Weighted,
    gradients: Gradients,
    options: LinearOptions,
) -> Tensor:
    """The vocabulary orders of `linear_objective`."""
    dtypes, vocab_size = head.dtypes, rows.vocab_size

    def slope_of(state: Tensor, tokens: slice) -> Tensor:
        part = weighted.at(tokens)
        log_odds = row_state.log_odds(state, rows.labels[tokens], vocab_size)
        weight = part.slope_weight(fold_factor=dtypes.rows_hold_factor)
        return row_slope(part.objective, log_odds, weight, vocab_size)

    def values_of(state: Tensor) -> Tensor:
        log_odds = row_state.log_odds(state, rows.labels, vocab_size)
        return weighted.objective.value(log_odds, vocab_size)

    if plan.order == "one_visit":
        assert gradients.hidden is not None
        return values_of(gradient_in_one_visit(head, rows, plan, slope_of, gradients.hidden))
    kept = None
    if gradients.weight is not None and plan.kept_tokens:
        dtype = dtypes.operands if plan.keeps_rows else dtypes.logits
        kept = KeptInGradient(gradients.weight, dtype, plan.kept_tokens, finished=plan.keeps_rows)
    loop = VocabularyLoop(head, rows, plan, kept)
    states = []
    if kept is not None and kept.finished:
        states.append(loop.finish_kept_rows(kept, slope_of))
    states.append(loop.statistics(first_token=plan.kept_tokens if states else 0))
    state = torch.cat(states, dim=1)
    if any(gradient is not None for gradient in gradients):
        everything = slice(0, head.hidden.shape[0])
        slope = significant(slope_of(state, everything), options.skip_below)
        index = worthwhile_index(slope != 0) if options.compact else None
        if index is not None:
            _some_gradients(loop, index, state, slope, gradients)
        else:
            loop.gradients(state, slope, gradients)
    return values_of(state)


def _some_gradients(
    loop: VocabularyLoop, index: Tensor, state: Tensor, slope: Tensor, gradients: Gradients
) -> None:
    """Gradients of the rows `index`; those of the others are 0."""
    hidden = gradients.hidden
    if index.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    if hidden is not None:
        gradients = gradients._replace(hidden=hidden[: index.numel()])
    loop.select(index).gradients(state[:, index], slope[index], gradients)
    if hidden is not None:
        spread(hidden, index)


class _InactiveRows:
    """Finds rows of a token chunk that have no gradient, to spare their GEMM.

    A row's slope is its gradient at the label's column, unless a softcap is flat there. Where the
    slopes of the whole batch are not known yet, `skip_below` is taken of the largest so far, so a
    row skipped here is one that the bound of `selection.significant` allows.
    """

    def __init__(self, options: LinearOptions, rows: RowProblem) -> None:
        self._skip_below = options.skip_below
        # On accelerators each chunk would synchronise, for nothing unless rows are to be skipped.
        on_cpu = rows.labels.device.type == "cpu"
        self._looks = options.compact and not rows.transform.softcap
        self._looks &= on_cpu or options.skip_below > 0
        self._largest = torch.zeros((), device=rows.labels.device)

    def active(self, gradient_rows: Tensor, labels: Tensor) -> Tensor | None:
        """Positions of the rows that count, or None for all."""
        if not self._looks or gradient_rows.shape[0] == 0:
            return None
        column = labels.clamp(0, gradient_rows.shape[1] - 1)[:, None]
        size = gradient_rows.gather(1, column)[:, 0].abs().float()
        self._largest = torch.maximum(self._largest, size.amax())
        skipped = (size == 0) | (size < self._skip_below * self._largest)
        return worthwhile_index(~skipped)
