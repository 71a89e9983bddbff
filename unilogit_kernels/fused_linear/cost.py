"""What a plan costs: every launch of its loops with operations and bytes, and the peak of memory.

This mirrors `loops.py` without tensors. `tests/test_explain.py` holds it to what the loops do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from unilogit_kernels.fused_linear.budget import (
    HeadShape,
    LinearShape,
    cast_bytes,
    hidden_copy_bytes,
    hidden_sum_bytes,
    product_bytes,
    row_bytes,
    vector_bytes,
    weight_sum_bytes,
)
from unilogit_kernels.fused_linear.gemm import writes_wider
from unilogit_kernels.fused_linear.plan import Plan
from unilogit_kernels.fused_linear.tiles import slices, token_groups, token_tiles

CACHED_SHARE = 0.7
"""A tile of up to this share of the last cache is read from there by the next kernel."""


class Launch(NamedTuple):
    """One kernel.

    Attributes:
        name: What it does, for the table.
        flops: Of a matrix product, else 0.
        bytes: Read and written.
    """

    name: str
    flops: int
    bytes: int


def gemm(name: str, m: int, n: int, k: int, operands: torch.dtype, result_bytes: int) -> Launch:
    """A matrix product `[m, k] @ [k, n]` with `result_bytes` moved for each entry of its result."""
    return Launch(name, 2 * m * n * k, operands.itemsize * (m + n) * k + result_bytes * m * n)


@dataclass(frozen=True)
class Costs:
    """Costs of one call, or of its forward or backward.

    Attributes:
        shape: What is computed, `n` being the tokens that count.
        plan: How it is cut.
        statistics: Whether it takes the statistics.
        gradients: Whether it takes the gradients.
        kept_logits: How many logits of each head an earlier forward kept.
    """

    shape: LinearShape
    plan: Plan
    statistics: bool = True
    gradients: bool = True
    kept_logits: int = 0

    def launches(self, cache_bytes: int = 0) -> Iterator[Launch]:
        """Every launch in order; tiles that fit into a cache of that size are read from there."""
        if self.plan.order == "token_chunks":
            yield from self._token_chunks(cache_bytes)
            return
        if self.plan.order == "one_visit":
            yield from self._one_visit(cache_bytes)
            return
        if self.statistics:
            if self.plan.keeps_rows:
                yield from self._kept_rows(cache_bytes)
            yield from self._first_visit(cache_bytes)
        if self.gradients:
            yield from self._second_visit(cache_bytes)

    def peak_bytes(self) -> int:
        """Most bytes alive at a time beside operands and gradients."""
        shape, plan, dtypes = self.shape, self.plan, self.shape.dtypes
        vectors = vector_bytes(shape)
        vectors += hidden_copy_bytes(shape, min(shape.n, plan.tokens))
        v, exact = shape.vocab_size, dtypes.exact.itemsize
        if plan.order == "token_chunks":
            buffers = plan.tokens * v * row_bytes(shape)
            buffers += weight_sum_bytes(shape)
            return buffers + self._projection_bytes(plan.tokens, plan.tile_columns) + vectors
        if plan.order == "one_visit":
            buffers = plan.tokens * plan.columns * row_bytes(shape)
            weight = plan.columns * cast_bytes(shape)
            projection = self._projection_bytes(plan.tokens, plan.tile_columns)
            product = hidden_sum_bytes(shape._replace(n=plan.tokens))
            return buffers + weight + projection + product + vectors
        tile = self._longest() * plan.tile_columns
        tiles = tile * shape.logit_bytes
        cast = plan.columns * cast_bytes(shape)
        projection = self._projection_bytes(self._longest(), plan.tile_columns)
        phases = [tiles + cast + projection]
        if plan.keeps_rows:
            rows = plan.row_tokens * v * shape.logit_bytes
            phases.append(rows + self._projection_bytes(plan.row_tokens, plan.row_columns))
        if self.gradients:
            group = min(shape.n, plan.tokens)
            total = group * plan.columns * dtypes.operands.itemsize + cast
            through_rows = not shape.separate_rows and plan.tile_columns >= plan.columns
            total += tiles - (tile * dtypes.logits.itemsize if through_rows else 0)
            if shape.sums_hidden:
                total += shape.n * shape.h * exact
            if shape.needs.weight and self._adds_up():
                total += plan.columns * shape.h * exact
            phases.append(total + max(self._product_bytes(), projection))
        return max(phases) + vectors + self.kept_logits * shape.logit_bytes

    # ---- the loops ------------------------------------------------------------------------------

    def _token_chunks(self, cache: int) -> Iterator[Launch]:
        shape, plan, d = self.shape, self.plan, self.shape.dtypes
        v, h = shape.vocab_size, shape.h
        for tokens in slices(shape.n, plan.tokens):
            t = tokens.stop - tokens.start
            for part in slices(v, plan.tile_columns):
                yield from self._project(t, part.stop - part.start)
            logits = t * v * shape.logit_bytes
            read = 0 if self._fits(logits, cache) else logits
            yield Launch("gradient rows", 0, read + t * v * d.operands.itemsize)
            if shape.needs.hidden:
                yield self._gemm("hidden's gradient", t, h, v, d.results.itemsize)
            if shape.needs.weight:
                size = d.exact.itemsize * (2 if tokens.start else 1)
                yield self._gemm("weight's gradient", v, h, t, size)
        if shape.needs.weight and d.results != d.exact:
            yield Launch("rounding", 0, v * h * (d.exact.itemsize + d.results.itemsize))

    def _one_visit(self, cache: int) -> Iterator[Launch]:
        shape, plan, d = self.shape, self.plan, self.shape.dtypes
        h, exact = shape.h, d.exact.itemsize
        for tokens in slices(shape.n, plan.tokens):
            t = tokens.stop - tokens.start
            for columns in slices(shape.vocab_size, plan.columns):
                c = columns.stop - columns.start
                yield from self._project(t, c)
                yield self._read_tile("statistics", t, c, cache)
                written = Launch("gradient rows", 0, t * c * d.operands.itemsize)
                yield written._replace(bytes=written.bytes + self._read_tile("", t, c, cache).bytes)
                if columns.start:
                    yield Launch("rescaling", 0, 2 * t * h * exact)
                reads = exact if columns.start else 0
                yield self._gemm("hidden's gradient", t, h, c, exact + reads)
            yield Launch("labels' rows", 0, t * h * (shape.input_dtype.itemsize + 2 * exact))
            yield Launch("slopes", 0, t * h * (exact + d.results.itemsize))

    def _kept_rows(self, cache: int) -> Iterator[Launch]:
        shape, plan, d = self.shape, self.plan, self.shape.dtypes
        for tokens in slices(plan.kept_tokens, plan.row_tokens):
            t = tokens.stop - tokens.start
            for part in slices(shape.vocab_size, plan.row_columns):
                c = part.stop - part.start
                yield from self._project(t, c)
                yield self._read_tile("statistics", t, c, cache)
            for columns in slices(shape.vocab_size, plan.columns):
                logits = t * (columns.stop - columns.start)
                size = shape.logit_bytes + d.operands.itemsize
                yield Launch("gradient rows", 0, logits * size)

    def _first_visit(self, cache: int) -> Iterator[Launch]:
        shape, plan = self.shape, self.plan
        first = plan.kept_tokens if plan.keeps_rows else 0
        tiles = [t for t in token_tiles(shape.n, plan) if t.start >= first]
        for columns in slices(shape.vocab_size, plan.columns):
            for tokens in tiles:
                for part in slices(columns.stop, plan.tile_columns, start=columns.start):
                    t, c = tokens.stop - tokens.start, part.stop - part.start
                    yield from self._project(t, c)
                    yield self._read_tile("statistics", t, c, cache)

    def _second_visit(self, cache: int) -> Iterator[Launch]:
        shape, plan, d = self.shape, self.plan, self.shape.dtypes
        exact, h = d.exact.itemsize, shape.h
        for columns in slices(shape.vocab_size, plan.columns):
            c = columns.stop - columns.start
            for i, tiles in enumerate(token_groups(shape.n, plan)):
                t = tiles[-1].stop - tiles[0].start
                for tile in tiles:
                    yield from self._gradient_rows(tile, columns, cache)
                if shape.needs.hidden:
                    reads = exact if columns.start else 0
                    yield self._gemm("hidden's gradient", t, h, c, exact + reads)
                if shape.needs.weight:
                    size = exact + (exact if i else 0) if self._adds_up() else d.results.itemsize
                    yield self._gemm("weight's gradient", c, h, t, size)
            if shape.needs.weight and self._adds_up():
                yield Launch("rounding", 0, c * h * (exact + d.results.itemsize))
        if shape.sums_hidden:
            yield Launch("rounding", 0, shape.n * h * (exact + d.results.itemsize))

    def _gradient_rows(self, tokens: slice, columns: slice, cache: int) -> Iterator[Launch]:
        plan, d = self.plan, self.shape.dtypes
        t = tokens.stop - tokens.start
        kept = tokens.stop <= plan.kept_tokens
        if kept and plan.keeps_rows:
            yield Launch(
                "kept rows", 0, 2 * t * (columns.stop - columns.start) * d.operands.itemsize
            )
            return
        kept |= columns.stop * self.shape.n <= self.kept_logits
        for part in slices(columns.stop, plan.tile_columns, start=columns.start):
            c = part.stop - part.start
            if not kept:
                yield from self._project(t, c)
            logits = t * c * self.shape.logit_bytes
            read = 0 if not kept and self._fits(logits, cache) else logits
            yield Launch("gradient rows", 0, read + t * c * d.operands.itemsize)

    # ---- single launches ------------------------------------------------------------------------

    def _project(self, t: int, c: int) -> Iterator[Launch]:
        for head in self.shape.heads:
            yield gemm("logits", t, c, head.h, head.dtypes.operands, head.dtypes.logits.itemsize)

    def _gemm(self, name: str, m: int, n: int, k: int, result_bytes: int) -> Launch:
        return gemm(name, m, n, k, self.shape.dtypes.operands, result_bytes)

    def _read_tile(self, name: str, t: int, c: int, cache: int) -> Launch:
        size = t * c * self.shape.logit_bytes
        return Launch(name, 0, 0 if self._fits(size, cache) else size)

    def _fits(self, size: int, cache: int) -> bool:
        return size <= CACHED_SHARE * cache

    # ---- sizes ----------------------------------------------------------------------------------

    def _longest(self) -> int:
        return max((t.stop - t.start for t in token_tiles(self.shape.n, self.plan)), default=0)

    def _adds_up(self) -> bool:
        """As in `VocabularyLoop.gradients`."""
        several = len(token_groups(self.shape.n, self.plan)) > 1
        wider = self.shape.dtypes.results != self.shape.dtypes.exact
        return several and (wider or self.plan.kept_tokens > 0)

    def _product_bytes(self) -> int:
        """Of a product that no GEMM writes where it goes: a wider sum, or a narrower gradient."""
        shape = self.shape
        if shape.narrows:
            written = shape.needs.weight and not self._adds_up()
            return self.plan.columns * shape.h * shape.dtypes.operands.itemsize if written else 0
        rows = [min(shape.n, self.plan.tokens)] if shape.sums_hidden else []
        if shape.needs.weight and self._adds_up():
            rows.append(self.plan.columns)
        return max(rows, default=0) * shape.h * product_bytes(shape)

    def _projection_bytes(self, tokens: int, columns: int) -> int:
        """Of operands cast up, where the GEMM cannot write wider logits than it reads."""
        return max(self._projection_bytes_of(head, tokens, columns) for head in self.shape.heads)

    def _projection_bytes_of(self, head: HeadShape, tokens: int, columns: int) -> int:
        d = head.dtypes
        if d.logits == d.exact != d.operands and not writes_wider(self.shape.device_type):
            return (tokens + columns) * head.h * d.exact.itemsize
        if d.logits.itemsize < d.operands.itemsize:
            return tokens * columns * d.operands.itemsize
        return 0
