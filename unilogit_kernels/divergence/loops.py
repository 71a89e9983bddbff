"""The chunk loops of a fused linear call on two models: GEMMs and two-row kernels, tile by tile.

The two orders are those of the single-model loops. In the vocabulary order both models' logits of
the first visit wait for the second one in the memory of the weight's gradient, which is not written
yet: `h` logits a column, so `h / 2` tokens of the two models where all have one dtype. Tokens
beyond are projected a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unilogit_kernels import pair_state
from unilogit_kernels.divergence.pairs import PairProblem
from unilogit_kernels.loops import Gradients, tile_view
from unilogit_kernels.memory import allocate
from unilogit_kernels.plan import (
    ALIGNED_COLUMNS,
    CHUNK_BYTES,
    MEMORY_BUDGET,
    MIN_CHUNK_TOKENS,
    MIN_TILE_COLUMNS,
    aligned_size,
    per_device,
    slices,
)
from unilogit_kernels.projection import LinearHead, Needs, multiply


@dataclass(frozen=True)
class PairPlan:
    """How a call is cut; a function of shapes, dtypes and needs alone.

    Attributes:
        order: Which loop runs.
        tokens: Tokens per chunk or tile.
        columns: Vocabulary columns per tile.
        kept_tokens: How many leading tokens keep both models' logits between the two visits.
    """

    order: Literal["token_chunks", "vocabulary_chunks"]
    tokens: int
    columns: int
    kept_tokens: int = 0


def plan_pair(
    student: LinearHead, teacher: LinearHead, vocab_size: int, needs: Needs, *, visits: int
) -> PairPlan:
    """Choose the order and the chunk sizes.

    Args:
        student: The head that learns, on the tokens that count.
        teacher: The other.
        vocab_size: Columns.
        needs: Which gradients this call computes.
        visits: 2 if statistics and gradients are computed in one call, else 1.
    """
    n, h = student.hidden.shape
    device_type = student.hidden.device.type
    dtypes, teacher_logits = student.dtypes, teacher.dtypes.logits
    pair_bytes = dtypes.logits.itemsize + teacher_logits.itemsize
    tile_bytes = pair_bytes
    if dtypes.operands != dtypes.logits:
        tile_bytes += dtypes.operands.itemsize
    casts_weight = any(x.weight.dtype != x.dtypes.operands for x in (student, teacher))
    # At least two chunks either way: no call ever holds n * V elements.
    budget = per_device(MEMORY_BUDGET, device_type)
    token_chunk = min((n + 1) // 2, budget // (vocab_size * tile_bytes))
    if needs.any() and not needs.weight and not casts_weight and token_chunk >= MIN_CHUNK_TOKENS:
        return PairPlan("token_chunks", token_chunk, vocab_size)
    kept = 0
    row_bytes = h * dtypes.results.itemsize
    # A row of the gradient must hold a whole number of logits of either model.
    widest = max(dtypes.logits.itemsize, teacher_logits.itemsize)
    if visits == 2 and needs.weight and row_bytes % widest == 0:
        kept = min(n, row_bytes // pair_bytes)
    tile_elements = per_device(CHUNK_BYTES, device_type) // tile_bytes
    tokens = min(n, max(1, tile_elements // MIN_TILE_COLUMNS))
    columns = min((vocab_size + 1) // 2, max(1, tile_elements // tokens))
    columns = aligned_size(columns, per_device(ALIGNED_COLUMNS, device_type))
    return PairPlan("vocabulary_chunks", tokens, columns, kept)


@dataclass(frozen=True)
class PairLoop:
    """A fused linear call on two models, on the tokens that count.

    Attributes:
        student: The head that learns.
        teacher: The reference; it gets no gradient.
        pair: Labels, transforms, kernels.
        plan: The cut.
    """

    student: LinearHead
    teacher: LinearHead
    pair: PairProblem
    plan: PairPlan

    # ---- statistics ----------------------------------------------------------------------------

    def statistics(self, kept: _KeptPair | None = None) -> Tensor:
        """The complete state `[7, n]`; one tile of each model's logits exists at a time."""
        tiles = self._token_tiles()
        states = [self._empty_state(tokens) for tokens in tiles]
        scratch = self._scratch(tiles)
        for columns in slices(self.pair.vocab_size, self.plan.columns):
            weights = self._weights(columns)
            for tokens, state in zip(tiles, states, strict=True):
                logits = self._place(kept, scratch, tokens, columns)
                self._project(tokens, columns, weights, logits)
                self.pair.at(tokens).update(*logits, columns.start, state)
        return torch.cat(states, dim=1)

    # ---- gradients for weights that are known --------------------------------------------------

    def gradients(
        self, state: Tensor, weight: Tensor, out: Gradients, kept: _KeptPair | None = None
    ) -> None:
        """Gradients of `sum_i weight_i KL_i` into `out`, whose hidden and weight may be unset."""
        coefficients = self.pair.coefficients(state, weight)
        if self.plan.order == "token_chunks":
            for tokens, logits, rows in self._token_chunks():
                pair, part = self.pair.at(tokens), state[:, tokens].contiguous()
                pair.gradient(*logits, 0, part, coefficients[:, tokens].contiguous(), rows)
                self._hidden_gradient(tokens, rows, out)
            return
        self._vocabulary_gradients(state, coefficients, out, kept)

    def finish(self, weight: Tensor, out: Gradients) -> Tensor:
        """Values `[n]`, and the gradients of `sum_i weight_i KL_i` into `out`, in one call."""
        if self.plan.order == "token_chunks":
            values = torch.empty_like(weight)
            for tokens, logits, rows in self._token_chunks():
                pair, state = self.pair.at(tokens), self._empty_state(tokens)
                pair.update(*logits, 0, state)
                values[tokens] = pair.values(state)
                coefficients = pair.coefficients(state, weight[tokens])
                pair.gradient(*logits, 0, state, coefficients, rows)
                self._hidden_gradient(tokens, rows, out)
            return values
        kept = None
        if out.weight is not None and self.plan.kept_tokens:
            dtypes = (self.student.dtypes.logits, self.teacher.dtypes.logits)
            kept = _KeptPair(out.weight, dtypes, self.plan.kept_tokens)
        state = self.statistics(kept)
        if any(gradient is not None for gradient in out):
            coefficients = self.pair.coefficients(state, weight)
            self._vocabulary_gradients(state, coefficients, out, kept)
        return self.pair.values(state)

    def _vocabulary_gradients(
        self, state: Tensor, coefficients: Tensor, out: Gradients, kept: _KeptPair | None
    ) -> None:
        d_hidden, d_weight, d_bias = out
        dtypes, tiles = self.student.dtypes, self._token_tiles()
        scratch = self._scratch(tiles)
        row_scratch = scratch[0]
        if dtypes.operands != dtypes.logits:
            row_scratch = self._buffer(row_scratch.numel(), dtypes.operands)
        hidden_sum = d_hidden
        if d_hidden is not None and d_hidden.dtype != dtypes.exact:
            hidden_sum = torch.empty_like(d_hidden, dtype=dtypes.exact)
        for columns in slices(self.pair.vocab_size, self.plan.columns):
            weights = self._weights(columns)
            weight_sum = None
            if d_weight is not None:
                weight_sum = d_weight[columns]
                # Several tiles add up in float32, and not where logits are still kept.
                if len(tiles) > 1 and (kept is not None or weight_sum.dtype != dtypes.exact):
                    weight_sum = torch.empty_like(weight_sum, dtype=dtypes.exact)
            for i, tokens in enumerate(tiles):
                logits = self._place(kept, scratch, tokens, columns)
                if kept is None or not kept.holds(tokens):
                    self._project(tokens, columns, weights, logits)
                rows = tile_view(row_scratch, tokens, columns)
                part = slice(tokens.start, tokens.stop)
                self.pair.at(part).gradient(
                    *logits,
                    columns.start,
                    state[:, part].contiguous(),
                    coefficients[:, part].contiguous(),
                    rows,
                )
                if hidden_sum is not None:
                    multiply(rows, weights[0], hidden_sum[tokens], accumulate=columns.start > 0)
                if weight_sum is not None:
                    hidden = self.student.hidden[tokens]
                    multiply(rows.t(), hidden, weight_sum, accumulate=i > 0)
                if d_bias is not None:
                    d_bias[columns] += rows.sum(0, dtype=dtypes.exact)
            if d_weight is not None and weight_sum is not None:
                _store(d_weight[columns], weight_sum)
        if d_hidden is not None and hidden_sum is not None:
            _store(d_hidden, hidden_sum)

    # ---- token chunks --------------------------------------------------------------------------

    def _token_chunks(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor], Tensor]]:
        """For each chunk: the tokens, both models' logits, and where the gradient rows go."""
        vocabulary = slice(0, self.pair.vocab_size)
        weights = self._weights(vocabulary)
        dtypes, elements = self.student.dtypes, self.plan.tokens * self.pair.vocab_size
        scratch = (
            self._buffer(elements, dtypes.logits),
            self._buffer(elements, self.teacher.dtypes.logits),
        )
        row_scratch = scratch[0]
        if dtypes.operands != dtypes.logits:
            row_scratch = self._buffer(elements, dtypes.operands)
        for tokens in slices(self.student.hidden.shape[0], self.plan.tokens):
            logits = self._place(None, scratch, tokens, vocabulary)
            self._project(tokens, vocabulary, weights, logits)
            yield tokens, logits, tile_view(row_scratch, tokens, vocabulary)

    def _hidden_gradient(self, tokens: slice, rows: Tensor, out: Gradients) -> None:
        vocabulary = slice(0, self.pair.vocab_size)
        if out.hidden is not None:
            multiply(rows, self.student.weight_columns(vocabulary), out.hidden[tokens])
        if out.bias is not None:
            out.bias[vocabulary] += rows.sum(0, dtype=self.student.dtypes.exact)

    # ---- tiles ---------------------------------------------------------------------------------

    def _weights(self, columns: slice) -> tuple[Tensor, Tensor]:
        return self.student.weight_columns(columns), self.teacher.weight_columns(columns)

    def _project(
        self,
        tokens: slice,
        columns: slice,
        weights: tuple[Tensor, Tensor],
        logits: tuple[Tensor, Tensor],
    ) -> None:
        self.student.project(tokens, columns, weights[0], out=logits[0])
        self.teacher.project(tokens, columns, weights[1], out=logits[1])

    def _place(
        self,
        kept: _KeptPair | None,
        scratch: tuple[Tensor, Tensor],
        tokens: slice,
        columns: slice,
    ) -> tuple[Tensor, Tensor]:
        """Where both models' logits of a tile are."""
        if kept is not None and kept.holds(tokens):
            return kept.tiles(tokens, columns)
        return tile_view(scratch[0], tokens, columns), tile_view(scratch[1], tokens, columns)

    def _token_tiles(self) -> list[slice]:
        """Tiles that do not straddle the border between kept and recomputed tokens."""
        kept, n = self.plan.kept_tokens, self.student.hidden.shape[0]
        return [*slices(kept, self.plan.tokens), *slices(n, self.plan.tokens, start=kept)]

    def _scratch(self, tiles: list[slice]) -> tuple[Tensor, Tensor]:
        elements = max(tile.stop - tile.start for tile in tiles) * self.plan.columns
        return (
            self._buffer(elements, self.student.dtypes.logits),
            self._buffer(elements, self.teacher.dtypes.logits),
        )

    def _buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        return allocate((elements,), dtype, self.student.hidden.device)

    def _empty_state(self, tokens: slice) -> Tensor:
        count, device = tokens.stop - tokens.start, self.student.hidden.device
        return pair_state.empty_state(count, device, self.student.dtypes.exact)


class _KeptPair:
    """Both models' logits in the memory of a weight gradient that is not written yet.

    Columns `[a, b)` of the vocabulary own rows `[a, b)` of the gradient. They hold, one after the
    other and the wider dtype first, these columns' logits of the first `tokens` tokens of each.
    """

    def __init__(
        self, weight_gradient: Tensor, dtypes: tuple[torch.dtype, torch.dtype], tokens: int
    ) -> None:
        self._gradient, self._dtypes, self._tokens = weight_gradient, dtypes, tokens

    def holds(self, tokens: slice) -> bool:
        """Whether these tokens are among the kept ones."""
        return bool(tokens.stop <= self._tokens)

    def tiles(self, tokens: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's tile, `[tokens, columns]`."""
        memory = self._gradient[columns].view(-1).view(torch.uint8)
        shape = (self._tokens, columns.stop - columns.start)
        elements = shape[0] * shape[1]
        sizes = [elements * dtype.itemsize for dtype in self._dtypes]
        student_first = sizes[0] >= sizes[1]
        starts = (0, sizes[0]) if student_first else (sizes[1], 0)
        student, teacher = (
            memory[start : start + size].view(dtype).view(shape)[tokens]
            for start, size, dtype in zip(starts, sizes, self._dtypes, strict=True)
        )
        return student, teacher


def _store(gradient: Tensor, total: Tensor) -> None:
    if total.data_ptr() != gradient.data_ptr():
        gradient.copy_(total)
