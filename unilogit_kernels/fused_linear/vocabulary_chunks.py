"""Vocabulary chunks: all tokens' logits over a few columns, first statistics, then gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unilogit_kernels.fused_linear.gemm import LinearHead, Operand, OperandRows
from unilogit_kernels.fused_linear.hidden_sum import HiddenSum
from unilogit_kernels.fused_linear.plan import Plan
from unilogit_kernels.fused_linear.saved import Saved
from unilogit_kernels.fused_linear.tiles import (
    Gradients,
    Heads,
    column_tiles,
    empty_state_of,
    flat_buffer,
    inside,
    logit_buffers,
    longest_of,
    project_tiles,
    slices,
    span_of,
    take_rows,
    tile_view,
    token_groups,
    weight_tiles,
)
from unilogit_kernels.rows.contract import Rows


@dataclass(frozen=True)
class VocabularyLoop:
    """The passes over the vocabulary order: statistics of all columns, then gradients.

    Attributes:
        heads: With the tokens that count; the first one learns.
        rows: Their labels, and the kernels.
        plan: The cut.
        saved: What the first pass saves for the second, if anything.
        index: Ascending, which of the first pass's tokens these are; None for all of them.
    """

    heads: Heads
    rows: Rows
    plan: Plan
    saved: Saved | None = None
    index: Tensor | None = None

    @property
    def student(self) -> LinearHead:
        """The student's."""
        return self.heads[0]

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self.student.hidden.shape[0]

    def select(self, index: Tensor) -> VocabularyLoop:
        """The loop over some of the tokens, after the first pass saw all of them."""
        heads = tuple(head.at(index) for head in self.heads)
        still_saved = int((index < self.plan.saved_tokens).sum())
        still_inside = int((index < self.plan.saved_inside).sum())
        plan = replace(self.plan, saved_tokens=still_saved, saved_beside=still_saved - still_inside)
        return VocabularyLoop(heads, self.rows.at(index), plan, self.saved, index)

    def statistics(self, first_token: int = 0) -> Tensor:
        """The states of the tokens from `first_token` on over these columns, `[k, m]`.

        Logits are saved where there is room; otherwise one tile of them exists at a time.
        """
        plan, saved = self.plan, self.saved
        groups = token_groups(self.tokens, plan, start=first_token)
        tiles = [tile for group in groups for tile in group]
        if not tiles:
            return empty_state_of(self.heads, self.rows, slice(0, 0))
        states = {t.start: empty_state_of(self.heads, self.rows, t) for t in tiles}
        buffers = logit_buffers(self.heads, longest_of(tiles) * plan.tile_columns)
        operand_rows = OperandRows(self.heads, longest_of([span_of(group) for group in groups]))
        for columns in slices(self.rows.columns, plan.columns):
            weights = weight_tiles(self.heads, columns)
            for group in groups:
                together = span_of(group)
                hidden = operand_rows.at(together)
                for tokens in group:
                    place = (
                        None if saved is None or saved.finished else saved.place(tokens, columns)
                    )
                    rows, own_rows = self.rows.at(tokens), inside(tokens, together)
                    own = [x[own_rows] for x in hidden]
                    for part, here in column_tiles(columns, plan):
                        logits = [tile_view(buffer, tokens, part) for buffer in buffers]
                        if place is not None:
                            logits = [tile[:, here] for tile in place]
                        project_tiles(self.heads, own, part, [w[here] for w in weights], logits)
                        rows.update(logits, part.start, states[tokens.start])
            del weights  # copies in another dtype, if they are: never two chunks of them
        return torch.cat([*states.values()], dim=1)

    def finish_saved_rows(
        self, saved: Saved, slope_of: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        """States of the saved tokens, whose gradient rows are finished into `saved`.

        They go by token chunks: `slope_of(state, tokens)` needs the statistics of its tokens alone.
        """
        heads, plan = self.heads, self.plan
        vocabulary = slice(0, self.rows.columns)
        buffers = logit_buffers(heads, plan.row_tokens * self.rows.columns)
        operand_rows = OperandRows(heads, plan.row_tokens)
        states = []
        groups = [slices(part.stop, plan.row_tokens, start=part.start) for part in saved.parts]
        for tokens in itertools.chain(*groups):
            rows, hidden = self.rows.at(tokens), operand_rows.at(tokens)
            logits = [tile_view(buffer, tokens, vocabulary) for buffer in buffers]
            state = empty_state_of(heads, rows, tokens)
            for part in slices(rows.columns, plan.row_columns):
                tiles = [z[:, part] for z in logits]
                project_tiles(heads, hidden, part, weight_tiles(heads, part), tiles)
                rows.update(tiles, part.start, state)
            slope = slope_of(state, tokens)
            for columns in slices(rows.columns, plan.columns):
                place = saved.place(tokens, columns)
                assert place is not None
                tiles = [z[:, columns] for z in logits]
                rows.gradient(tiles, columns.start, state, slope, place[0])
            states.append(state)
        return torch.cat(states, dim=1)

    def gradients(self, state: Tensor, slope: Tensor, gradients: Gradients) -> None:
        """Write the gradients for a `slope` `[..., n]`: those of tokens have a row for each."""
        student, plan = self.student, self.plan
        d_hidden, d_weight, d_bias, d_inner, d_up = gradients
        dtypes = student.dtypes
        exact = dtypes.exact
        groups = token_groups(self.tokens, plan)
        longest = longest_of([span_of(group) for group in groups])
        operand_rows = OperandRows(self.heads, longest)
        scratch, row_scratch = self._gradient_scratch(groups, longest)
        sums = [
            None if gradient is None else HiddenSum(gradient, dtypes, self.rows.shard)
            for gradient in (d_hidden, d_inner)
        ]
        # Several groups add up in float32, and not where something saved is still to be read.
        in_gradient = self.saved is not None and self.saved.in_gradient
        adds_up = len(groups) > 1 and (in_gradient or dtypes.results != exact)
        for columns in slices(self.rows.columns, plan.columns):
            weights = weight_tiles(self.heads, columns)
            weight_sum = None
            if d_weight is not None:
                weight_sum = d_weight[columns]
                if adds_up:
                    weight_sum = torch.empty_like(weight_sum, dtype=exact)
            for i, tiles in enumerate(groups):
                tokens = span_of(tiles)
                hidden = operand_rows.at(tokens)
                out = tile_view(row_scratch, tokens, columns)
                for tile in tiles:
                    here = inside(tile, tokens)
                    rows = [x[here] for x in hidden]
                    self._gradient_rows(
                        tile, rows, columns, weights, state, slope, scratch, out[here]
                    )
                for total, factor in zip(sums, (weights[0].wide, weights[0].thin), strict=True):
                    if total is not None and factor is not None:
                        own = total.memory[tokens]
                        dtypes.multiply(out, factor, own, accumulate=columns.start > 0)
                        if columns.stop == self.rows.columns and i == len(groups) - 1:
                            total.complete()
                if weight_sum is not None:
                    dtypes.multiply(out.t(), hidden[0].wide, weight_sum, accumulate=i > 0)
                if d_up is not None and hidden[0].thin is not None:
                    dtypes.multiply(out.t(), hidden[0].thin, d_up[columns], accumulate=i > 0)
                if d_bias is not None:
                    d_bias[columns] += out.sum(0, dtype=exact)
            if d_weight is not None and weight_sum is not None and adds_up:
                d_weight[columns] = weight_sum
            del weights, weight_sum  # as in `statistics`
        for total in sums:
            if total is not None:
                if not self.rows.columns:
                    total.memory.zero_()
                    total.complete()
                total.finish()

    def _gradient_scratch(
        self, groups: list[list[slice]], tokens: int
    ) -> tuple[list[Tensor | None], Tensor]:
        """A tile of each head's logits, and a chunk of rows.

        No tile of the learning head's where its logits pass through the rows' memory.
        """
        plan, dtypes = self.plan, self.student.dtypes
        rows = flat_buffer(self.student, tokens * plan.columns, dtypes.operands)
        tiles = [tile for group in groups for tile in group]
        if self.saved is not None and self.saved.finished:
            # Finished rows are only moved.
            tiles = [tile for tile in tiles if tile.stop > plan.saved_tokens]
        longest = longest_of(tiles)
        through_rows = dtypes.operands == dtypes.logits and plan.tile_columns >= plan.columns
        own = [] if not through_rows else [None]
        others = self.heads[len(own) :]
        return [*own, *logit_buffers(others, longest * plan.tile_columns)], rows

    def _gradient_rows(
        self,
        tokens: slice,
        hidden: list[Operand],
        columns: slice,
        weights: list[Operand],
        state: Tensor,
        slope: Tensor,
        scratch: list[Tensor | None],
        out: Tensor,
    ) -> None:
        """Gradient rows `[tokens, columns]`: as saved, or from logits saved or projected again."""
        sources, index = self._saved_tiles(tokens, columns)
        if sources is not None and self.saved is not None and self.saved.finished:
            take_rows(sources[0], index, out)
            return
        rows = self.rows.at(tokens)
        state, slope = state[:, tokens].contiguous(), slope[..., tokens].contiguous()
        for part, here in column_tiles(columns, self.plan):
            logits = [out if s is None else tile_view(s, tokens, part) for s in scratch]
            if sources is None:
                project_tiles(self.heads, hidden, part, [w[here] for w in weights], logits)
            elif index is None:
                logits = [source[:, here] for source in sources]
            else:
                for source, tile in zip(sources, logits, strict=True):
                    take_rows(source[:, here], index, tile)
            rows.gradient(logits, part.start, state, slope, out[:, here])

    def _saved_tiles(
        self, tokens: slice, columns: slice
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """What is saved of a tile, and which rows of it to take (None for all)."""
        saved = self.saved
        if saved is None or (saved.in_gradient and tokens.stop > self.plan.saved_tokens):
            return None, None
        if self.index is None:
            return saved.place(tokens, columns), None
        part = saved.parts[-1 if tokens.stop > self.plan.saved_inside else 0]
        return saved.place(part, columns), self.index[tokens] - part.start


def some_gradients(
    loop: VocabularyLoop, index: Tensor, state: Tensor, slope: Tensor, gradients: Gradients
) -> None:
    """Gradients of the rows `index`; those of the others are 0."""
    if index.numel() == 0:
        gradients.zero()
        return
    part = gradients.of_first(index.numel())
    loop.select(index).gradients(state[:, index], slope[..., index], part)
    gradients.spread(index)
