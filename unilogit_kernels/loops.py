"""The chunk loops of a fused linear call: GEMMs, row kernels and losses, tile by tile.

They run on one lm_head or on two, that of a model which learns and that of its reference: what is a
tile of logits here is then a tile of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.kept import Kept, KeptInGradient
from unilogit_kernels.memory import allocate, tile_view
from unilogit_kernels.one_visit import gradient_in_one_visit
from unilogit_kernels.plan import LinearOptions, Plan, slices, token_groups
from unilogit_kernels.projection import LinearHead, OperandRows, multiply
from unilogit_kernels.rows import RowLoss, RowProblem, Rows, float16_scale
from unilogit_kernels.selection import (
    counting,
    gather_in_place,
    significant,
    spread,
    worthwhile_index,
)

Heads = tuple[LinearHead, ...]
"""The lm_heads of a call, the one that learns first."""


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
        heads: With the tokens that count; the first one learns.
        rows: Their labels, and the kernels.
        plan: The cut.
        kept: What the first visit keeps for the second, if anything.
        index: Ascending, which of the first visit's tokens these are; None for all of them.
    """

    heads: Heads
    rows: Rows
    plan: Plan
    kept: Kept | None = None
    index: Tensor | None = None

    @property
    def student(self) -> LinearHead:
        """The head that learns."""
        return self.heads[0]

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self.student.hidden.shape[0]

    def select(self, index: Tensor) -> VocabularyLoop:
        """The loop over some of the tokens, after the first visit saw all of them."""
        heads = tuple(replace(head, hidden=head.hidden[index]) for head in self.heads)
        still_kept = int((index < self.plan.kept_tokens).sum())
        plan = replace(self.plan, kept_tokens=still_kept)
        return VocabularyLoop(heads, self.rows.at(index), plan, self.kept, index)

    def statistics(self, first_token: int = 0) -> Tensor:
        """The complete states of the tokens from `first_token` on, `[k, m]`.

        Logits are kept where there is room; otherwise one tile of them exists at a time.
        """
        plan, kept = self.plan, self.kept
        groups = token_groups(self.tokens, plan, start=first_token)
        tiles = [tile for group in groups for tile in group]
        if not tiles:
            return _empty_state(self.heads, self.rows, slice(0, 0))
        states = {t.start: _empty_state(self.heads, self.rows, t) for t in tiles}
        buffers = _logit_buffers(self.heads, _longest(tiles) * plan.tile_columns)
        operand_rows = OperandRows(self.heads, _longest([_whole(group) for group in groups]))
        for columns in slices(self.rows.vocab_size, plan.columns):
            weights = _weights(self.heads, columns)
            for group in groups:
                together = _whole(group)
                hidden = operand_rows.at(together)
                for tokens in group:
                    place = None if kept is None or kept.finished else kept.place(tokens, columns)
                    rows, inside = self.rows.at(tokens), _inside(tokens, together)
                    own = [x[inside] for x in hidden]
                    for part, here in _parts(columns, plan):
                        logits = [tile_view(buffer, tokens, part) for buffer in buffers]
                        if place is not None:
                            logits = [tile[:, here] for tile in place]
                        _project(self.heads, own, part, [w[here] for w in weights], logits)
                        rows.update(logits, part.start, states[tokens.start])
            del weights  # copies in another dtype, if they are: never two chunks of them
        return torch.cat([*states.values()], dim=1)

    def finish_kept_rows(
        self, kept: KeptInGradient, slope_of: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        """States of the kept tokens, whose gradient rows are finished into `kept`.

        They go by token chunks: `slope_of(state, tokens)` needs the statistics of its tokens alone.
        """
        heads, plan = self.heads, self.plan
        vocabulary = slice(0, self.rows.vocab_size)
        buffers = _logit_buffers(heads, plan.row_tokens * self.rows.vocab_size)
        operand_rows = OperandRows(heads, plan.row_tokens)
        states = []
        for tokens in slices(kept.tokens, plan.row_tokens):
            rows, hidden = self.rows.at(tokens), operand_rows.at(tokens)
            logits = [tile_view(buffer, tokens, vocabulary) for buffer in buffers]
            state = _empty_state(heads, rows, tokens)
            for part in slices(rows.vocab_size, plan.row_columns):
                tiles = [z[:, part] for z in logits]
                _project(heads, hidden, part, _weights(heads, part), tiles)
                rows.update(tiles, part.start, state)
            slope = slope_of(state, tokens)
            for columns in slices(rows.vocab_size, plan.columns):
                place = kept.place(tokens, columns)
                assert place is not None
                tiles = [z[:, columns] for z in logits]
                rows.gradient(tiles, columns.start, state, slope, place[0])
            states.append(state)
        return torch.cat(states, dim=1)

    def gradients(self, state: Tensor, slope: Tensor, gradients: Gradients) -> None:
        """Write the gradients for a `slope` `[..., n]`: `hidden`'s has a row for each token."""
        student, plan = self.student, self.plan
        d_hidden, d_weight, d_bias = gradients
        dtypes = student.dtypes
        exact = dtypes.exact
        groups = token_groups(self.tokens, plan)
        longest = _longest([_whole(group) for group in groups])
        operand_rows = OperandRows(self.heads, longest)
        scratch, row_scratch = self._gradient_scratch(groups, longest)
        hidden_sum = d_hidden
        if d_hidden is not None and d_hidden.dtype != exact:
            hidden_sum = torch.empty_like(d_hidden, dtype=exact)
        # Several groups add up in float32, and not where something kept is still to be read.
        in_gradient = self.kept is not None and self.kept.in_gradient
        adds_up = len(groups) > 1 and (in_gradient or dtypes.results != exact)
        for columns in slices(self.rows.vocab_size, plan.columns):
            weights = _weights(self.heads, columns)
            weight_sum = None
            if d_weight is not None:
                weight_sum = d_weight[columns]
                if adds_up:
                    weight_sum = torch.empty_like(weight_sum, dtype=exact)
            for i, tiles in enumerate(groups):
                tokens = _whole(tiles)
                hidden = operand_rows.at(tokens)
                out = tile_view(row_scratch, tokens, columns)
                for tile in tiles:
                    here = _inside(tile, tokens)
                    rows = [x[here] for x in hidden]
                    self._gradient_rows(
                        tile, rows, columns, weights, state, slope, scratch, out[here]
                    )
                if hidden_sum is not None:
                    multiply(out, weights[0], hidden_sum[tokens], accumulate=columns.start > 0)
                if weight_sum is not None:
                    multiply(out.t(), hidden[0], weight_sum, accumulate=i > 0)
                if d_bias is not None:
                    d_bias[columns] += out.sum(0, dtype=exact)
            if d_weight is not None and weight_sum is not None and adds_up:
                d_weight[columns] = weight_sum
            del weights, weight_sum  # as in `statistics`
        if d_hidden is not None and hidden_sum is not None and hidden_sum is not d_hidden:
            d_hidden.copy_(hidden_sum)

    def _gradient_scratch(
        self, groups: list[list[slice]], tokens: int
    ) -> tuple[list[Tensor | None], Tensor]:
        """A tile of each head's logits, and a chunk of rows.

        No tile of the learning head's where its logits pass through the rows' memory.
        """
        plan, dtypes = self.plan, self.student.dtypes
        rows = _buffer(self.student, tokens * plan.columns, dtypes.operands)
        longest = _longest([tile for group in groups for tile in group])
        through_rows = dtypes.operands == dtypes.logits and plan.tile_columns >= plan.columns
        own = [] if not through_rows else [None]
        others = self.heads[len(own) :]
        return [*own, *_logit_buffers(others, longest * plan.tile_columns)], rows

    def _gradient_rows(
        self,
        tokens: slice,
        hidden: list[Tensor],
        columns: slice,
        weights: list[Tensor],
        state: Tensor,
        slope: Tensor,
        scratch: list[Tensor | None],
        out: Tensor,
    ) -> None:
        """Gradient rows `[tokens, columns]`: as kept, or from logits kept or projected again."""
        sources, index = self._kept_tiles(tokens, columns)
        if sources is not None and self.kept is not None and self.kept.finished:
            _take(sources[0], index, out)
            return
        rows = self.rows.at(tokens)
        state, slope = state[:, tokens].contiguous(), slope[..., tokens].contiguous()
        for part, here in _parts(columns, self.plan):
            logits = [out if s is None else tile_view(s, tokens, part) for s in scratch]
            if sources is None:
                _project(self.heads, hidden, part, [w[here] for w in weights], logits)
            elif index is None:
                logits = [source[:, here] for source in sources]
            else:
                for source, tile in zip(sources, logits, strict=True):
                    _take(source[:, here], index, tile)
            rows.gradient(logits, part.start, state, slope, out[:, here])

    def _kept_tiles(
        self, tokens: slice, columns: slice
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """What is kept of a tile, and which rows of it to take (None for all)."""
        kept = self.kept
        if kept is None or (kept.in_gradient and tokens.stop > self.plan.kept_tokens):
            return None, None
        if self.index is None:
            return kept.place(tokens, columns), None
        return kept.place(slice(0, kept.tokens), columns), self.index[tokens]


# ---- tiles -------------------------------------------------------------------------------------


def _weights(heads: Heads, columns: slice) -> list[Tensor]:
    return [head.weight_columns(columns) for head in heads]


def _project(
    heads: Heads,
    hidden: list[Tensor],
    columns: slice,
    weights: list[Tensor],
    logits: list[Tensor],
) -> None:
    for head, rows, weight, tile in zip(heads, hidden, weights, logits, strict=True):
        head.project(rows, columns, weight, out=tile)


def _logit_buffers(heads: Heads, elements: int) -> list[Tensor]:
    """Flat memory for so many logits of each head."""
    return [_buffer(head, elements, head.dtypes.logits) for head in heads]


def _buffer(head: LinearHead, elements: int, dtype: torch.dtype) -> Tensor:
    return allocate((elements,), dtype, head.hidden.device)


def _empty_state(heads: Heads, rows: Rows, tokens: slice) -> Tensor:
    student = heads[0]
    return rows.empty_state(tokens.stop - tokens.start, student.hidden.device, student.dtypes.exact)


def _parts(columns: slice, plan: Plan) -> list[tuple[slice, slice]]:
    """Tiles of a chunk: which columns of the vocabulary, and which of the chunk."""
    parts = slices(columns.stop, plan.tile_columns, start=columns.start)
    return [(part, _inside(part, columns)) for part in parts]


def _take(source: Tensor, index: Tensor | None, out: Tensor) -> None:
    """`out = source[index]`, or all of it."""
    if index is None:
        out.copy_(source)
    else:
        torch.index_select(source, 0, index, out=out)


def _whole(tiles: list[slice]) -> slice:
    """Consecutive tiles as one."""
    return slice(tiles[0].start, tiles[-1].stop)


def _inside(tile: slice, tiles: slice) -> slice:
    """Where a tile lies in others that hold it."""
    return slice(tile.start - tiles.start, tile.stop - tiles.start)


def _longest(tiles: list[slice]) -> int:
    return max(int(tile.stop - tile.start) for tile in tiles)


# ---- token chunks ------------------------------------------------------------------------------


def by_tokens(
    heads: Heads,
    rows: Rows,
    plan: Plan,
    gradients: Gradients,
    gradient_rows: Callable[[slice, list[Tensor], Tensor], Tensor | None],
) -> None:
    """For each chunk of tokens: project, gradient rows, the gradients' GEMMs.

    The weight's gradient adds up over the chunks, in float32.

    `gradient_rows(tokens, logits, out)` writes them and returns which rows count, or None for all.
    """
    vocabulary, student = slice(0, rows.vocab_size), heads[0]
    weights, dtypes, device = _weights(heads, vocabulary), student.dtypes, student.hidden.device
    elements = plan.tokens * rows.vocab_size
    buffers = _logit_buffers(heads, elements)
    row_buffer = buffers[0]
    if dtypes.operands != dtypes.logits:
        row_buffer = allocate((elements,), dtypes.operands, device)
    d_weight = weight_sum = None
    if gradients.weight is not None:
        d_weight = weight_sum = gradients.weight[vocabulary]
        if d_weight.dtype != dtypes.exact:
            weight_sum = allocate(d_weight.shape, dtypes.exact, device)
    operand_rows = OperandRows(heads, plan.tokens)
    for tokens in slices(student.hidden.shape[0], plan.tokens):
        logits = [tile_view(buffer, tokens, vocabulary) for buffer in buffers]
        out = tile_view(row_buffer, tokens, vocabulary)
        hidden = operand_rows.at(tokens)
        for part in slices(rows.vocab_size, plan.tile_columns):
            _project(heads, hidden, part, [w[part] for w in weights], [z[:, part] for z in logits])
        index = gradient_rows(tokens, logits, out)
        own = hidden[0]
        if index is not None:
            out, own = gather_in_place(out, index), own[index]
        if gradients.hidden is not None:
            d_hidden = gradients.hidden[tokens]
            multiply(out, weights[0], d_hidden[: out.shape[0]])
            if index is not None:
                spread(d_hidden, index)
        if weight_sum is not None:
            multiply(out.t(), own, weight_sum, accumulate=tokens.start > 0)
        if gradients.bias is not None:
            gradients.bias[vocabulary] += out.sum(0, dtype=dtypes.exact)
    if d_weight is not None and weight_sum is not None and weight_sum is not d_weight:
        d_weight.copy_(weight_sum)


# ---- the two kinds of call ---------------------------------------------------------------------


def linear_state(heads: Heads, rows: Rows, plan: Plan, kept: Kept | None = None) -> Tensor:
    """The complete state `[k, n]` of the logits of `heads`."""
    return VocabularyLoop(heads, rows, plan, kept).statistics()


def linear_gradient(
    loop: VocabularyLoop, state: Tensor, upstream: Tensor, gradients: Gradients
) -> None:
    """Gradients of `sum_i upstream_i values_i`, with logits kept from the forward or made again."""
    rows, scale = loop.rows, None
    if not loop.student.dtypes.rows_hold_factor:
        scale = float16_scale(upstream)
        upstream = upstream / scale
    slope = rows.slope(state, upstream)
    if loop.plan.order == "vocabulary_chunks":
        loop.gradients(state, slope, gradients)
    else:

        def gradient_rows(tokens: slice, logits: list[Tensor], out: Tensor) -> None:
            part_state, part_slope = state[:, tokens].contiguous(), slope[..., tokens].contiguous()
            rows.at(tokens).gradient(logits, 0, part_state, part_slope, out)

        by_tokens(loop.heads, rows, loop.plan, gradients, gradient_rows)
    if scale is not None:
        _multiply(gradients, scale)


def _multiply(gradients: Gradients, factor: Tensor) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)


def linear_loss(
    heads: Heads, loss: RowLoss, plan: Plan, gradients: Gradients, options: LinearOptions
) -> Tensor:
    """Losses `[n]` before weights, and gradients, in one call.

    Each head's logits take one GEMM, and each gradient.
    """
    student = heads[0]
    fold = student.dtypes.rows_hold_factor
    if not fold:
        loss = loss.over(float16_scale(loss.row_weight))
    if plan.order == "token_chunks":
        values = student.hidden.new_empty(student.hidden.shape[0], dtype=student.dtypes.exact)
        drop = _InactiveRows(options, student.hidden.device)

        def gradient_rows(tokens: slice, logits: list[Tensor], out: Tensor) -> Tensor | None:
            part = loss.at(tokens)
            values[tokens] = part.finish(logits, out, fold_factor=fold)
            return drop.active(out, part)

        by_tokens(heads, loss.rows, plan, gradients, gradient_rows)
    else:
        values = _loss_by_columns(heads, loss, plan, gradients, options)
    if not fold:
        _multiply(gradients, loss.factor)
    return values


def _loss_by_columns(
    heads: Heads, loss: RowLoss, plan: Plan, gradients: Gradients, options: LinearOptions
) -> Tensor:
    """The vocabulary orders of `linear_loss`."""
    dtypes, rows = heads[0].dtypes, loss.rows

    def slope_of(state: Tensor, tokens: slice) -> Tensor:
        return loss.at(tokens).slope(state, fold_factor=dtypes.rows_hold_factor)

    if plan.order == "one_visit":
        assert gradients.hidden is not None
        assert isinstance(rows, RowProblem)
        state = gradient_in_one_visit(heads[0], rows, plan, slope_of, gradients.hidden)
        return loss.values(state)
    kept = None
    if gradients.weight is not None and plan.kept_tokens:
        kept_dtypes = [head.dtypes.logits for head in heads]
        if plan.keeps_rows:
            kept_dtypes = [dtypes.operands]
        kept = KeptInGradient(
            gradients.weight, kept_dtypes, plan.kept_tokens, finished=plan.keeps_rows
        )
    loop = VocabularyLoop(heads, rows, plan, kept)
    states = []
    if kept is not None and kept.finished:
        states.append(loop.finish_kept_rows(kept, slope_of))
    states.append(loop.statistics(first_token=plan.kept_tokens if states else 0))
    state = torch.cat(states, dim=1)
    if any(gradient is not None for gradient in gradients):
        slope = significant(slope_of(state, slice(0, loop.tokens)), options.skip_below)
        index = worthwhile_index(counting(slope)) if options.compact else None
        if index is not None:
            _some_gradients(loop, index, state, slope, gradients)
        else:
            loop.gradients(state, slope, gradients)
    return loss.values(state)


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
    loop.select(index).gradients(state[:, index], slope[..., index], gradients)
    if hidden is not None:
        spread(hidden, index)


class _InactiveRows:
    """Finds rows of a token chunk that have no gradient, to spare their GEMM.

    Where the slopes of the whole batch are not known yet, `skip_below` is taken of the largest so
    far, so a row skipped here is one that the bound of `selection.significant` allows.
    """

    def __init__(self, options: LinearOptions, device: torch.device) -> None:
        self._skip_below = options.skip_below
        # On accelerators each chunk would synchronise, for nothing unless rows are to be skipped.
        self._looks = options.compact and (device.type == "cpu" or options.skip_below > 0)
        self._largest = torch.zeros((), device=device)

    def active(self, gradient_rows: Tensor, loss: RowLoss) -> Tensor | None:
        """Positions of the rows that count, or None for all."""
        if not self._looks or gradient_rows.shape[0] == 0:
            return None
        size = loss.sizes(gradient_rows)
        if size is None:
            return None
        self._largest = torch.maximum(self._largest, size.amax())
        skipped = (size == 0) | (size < self._skip_below * self._largest)
        return worthwhile_index(~skipped)
