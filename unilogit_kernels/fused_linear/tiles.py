"""Tiles of a fused linear call: where they lie, what memory they take, how they are projected."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.fused_linear.active_rows import spread
from unilogit_kernels.fused_linear.gemm import LinearHead, Operand
from unilogit_kernels.fused_linear.plan import Plan
from unilogit_kernels.rows.contract import Rows

Heads = tuple[LinearHead, ...]
"""The lm_heads of a call, the student's first."""


class Gradients(NamedTuple):
    """Gradients of a fused linear call, or None where not wanted.

    The first two are in `GemmDtypes.results`, the small ones in `GemmDtypes.exact`.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    inner: Tensor | None = None
    up: Tensor | None = None

    def of_first(self, m: int) -> Gradients:
        """The same with so many tokens, the first ones."""
        hidden, inner = (None if x is None else x[:m] for x in (self.hidden, self.inner))
        return self._replace(hidden=hidden, inner=inner)

    def spread(self, index: Tensor) -> None:
        """What was written of the first tokens belongs to the tokens `index`; others have none."""
        for rows in (self.hidden, self.inner):
            if rows is not None:
                spread(rows, index)

    def zero(self) -> None:
        """No token has a gradient."""
        for gradient in self:
            if gradient is not None:
                gradient.zero_()


def weight_tiles(heads: Heads, columns: slice) -> list[Operand]:
    """The weights of these vocabulary columns, in the operands' dtypes."""
    return [head.weight_columns(columns) for head in heads]


def project_tiles(
    heads: Heads,
    hidden: list[Operand],
    columns: slice,
    weights: list[Operand],
    logits: list[Tensor],
) -> None:
    """Write a tile of each head's logits, of the same tokens and columns."""
    for head, rows, weight, tile in zip(heads, hidden, weights, logits, strict=True):
        head.project(rows, columns, weight, out=tile)


def logit_buffers(heads: Heads, elements: int) -> list[Tensor]:
    """Flat memory for so many logits of each head."""
    return [flat_buffer(head, elements, head.dtypes.logits) for head in heads]


def flat_buffer(head: LinearHead, elements: int, dtype: torch.dtype) -> Tensor:
    """Flat memory on the head's device."""
    return allocate((elements,), dtype, head.hidden.device)


def empty_state_of(heads: Heads, rows: Rows, tokens: slice) -> Tensor:
    """The state of some tokens of which no column has been seen."""
    student = heads[0]
    return rows.empty_state(tokens.stop - tokens.start, student.hidden.device, student.dtypes.exact)


def column_tiles(columns: slice, plan: Plan) -> list[tuple[slice, slice]]:
    """Tiles of a chunk: which columns of the vocabulary, and which of the chunk."""
    parts = slices(columns.stop, plan.tile_columns, start=columns.start)
    return [(part, inside(part, columns)) for part in parts]


def take_rows(source: Tensor, index: Tensor | None, out: Tensor) -> None:
    """`out = source[index]`, or all of it."""
    if index is None:
        out.copy_(source)
    else:
        torch.index_select(source, 0, index, out=out)


def span_of(tiles: list[slice]) -> slice:
    """Consecutive tiles as one."""
    return slice(tiles[0].start, tiles[-1].stop)


def inside(tile: slice, tiles: slice) -> slice:
    """Where a tile lies in others that hold it."""
    return slice(tile.start - tiles.start, tile.stop - tiles.start)


def longest_of(tiles: list[slice]) -> int:
    """Length of the longest; 0 of none."""
    return max((int(tile.stop - tile.start) for tile in tiles), default=0)


def token_tiles(n: int, plan: Plan) -> list[slice]:
    """Tiles that straddle no border between tokens saved here, saved there and recomputed."""
    borders = (0, plan.saved_inside, plan.saved_tokens, n)
    parts = itertools.pairwise(borders)
    return [tile for start, stop in parts for tile in slices(stop, plan.tokens, start=start)]


def token_groups(n: int, plan: Plan, *, start: int = 0) -> list[list[slice]]:
    """Tiles whose gradient rows go into one GEMM: all of them, or each one where they are long.

    Those from token `start` on, which begins one.
    """
    tiles = [tile for tile in token_tiles(n, plan) if tile.start >= start]
    return [tiles] if n <= plan.tokens and tiles else [[tile] for tile in tiles]


def slices(total: int, size: int, start: int = 0) -> Iterator[slice]:
    """Slices of at most `size` that cover `[start, total)`."""
    for first in range(start, total, size):
        yield slice(first, min(first + size, total))


def tile_view(scratch: Tensor, tokens: slice, columns: slice) -> Tensor:
    """A contiguous `[tokens, columns]` view of the front of a flat buffer."""
    shape = (tokens.stop - tokens.start, columns.stop - columns.start)
    return scratch[: shape[0] * shape[1]].view(shape)
