"""Rows that count: which they are, gathering them, and spreading results over all rows again."""

from __future__ import annotations

import torch
from torch import Tensor

WORTHWHILE_SHARE = 0.875
"""Gathering rows costs a copy: with more than this share of them left, it is not worth it."""

BLOCK_ROWS = 32
"""Rows moved at a time where a move is in place."""


def row_size(slope: Tensor) -> Tensor:
    """How large the gradient row of a slope, or upstream gradient, `[..., n]` is: `[n]`."""
    return slope.abs() if slope.dim() == 1 else slope.abs().sum(0)


def counting(slope: Tensor) -> Tensor:
    """Which rows of a slope, or upstream gradient, `[..., n]` have a gradient. NaN does."""
    return slope != 0 if slope.dim() == 1 else (slope != 0).any(0)


def significant(slope: Tensor, skip_below: float) -> Tensor:
    """The slopes `[..., n]` with those of rows that do not count set to exactly 0.

    A slope (`row_size`) below `skip_below` times the largest does not. With `skip_below = s` and
    the largest slope S, a skipped row's own gradient is off by at most `2 s S max_j |W_j|`, and the
    weight's by at most `sqrt(2) s S sum |h_i|` (Frobenius) over the skipped rows, since a gradient
    row of size 1 sums to 0, has 1-norm at most 2 and so a 2-norm of at most sqrt(2). NaN is never
    skipped.
    """
    if skip_below == 0.0 or slope.numel() == 0:
        return slope
    size = row_size(slope)
    return torch.where(size < skip_below * size.amax(), 0.0, slope)


def active_index(active: Tensor) -> Tensor | None:
    """Positions of the active rows, or None if all are. Synchronises an accelerator."""
    index = active.nonzero()[:, 0]
    return None if 0 < index.numel() == active.numel() else index


def worthwhile_index(active: Tensor) -> Tensor | None:
    """Positions of the active rows, or None if gathering them is not worth it."""
    index = active_index(active)
    if index is None or index.numel() > WORTHWHILE_SHARE * active.numel():
        return None
    return index


def gather_in_place(rows: Tensor, index: Tensor) -> Tensor:
    """Move the rows `index` (ascending) to the front of `rows`; returns them as a view.

    A row moves to where an earlier one was, or stays, so from the front no row is overwritten
    before it has moved.
    """
    for start in range(0, index.numel(), BLOCK_ROWS):
        block = index[start : start + BLOCK_ROWS]
        rows[start : start + block.numel()] = rows[block]
    return rows[: index.numel()]


def spread(rows: Tensor, index: Tensor) -> None:
    """The inverse, in place: the first rows become the rows `index` (ascending), the others 0."""
    for start in reversed(range(0, index.numel(), BLOCK_ROWS)):
        block = index[start : start + BLOCK_ROWS]
        rows[block] = rows[start : start + block.numel()].clone()
    unused = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    unused[index] = False
    rows.masked_fill_(unused[:, None], 0.0)
