"""Row kernels in plain torch: any device and float64; the twin that the others are held to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unilogit_kernels import row_state
from unilogit_kernels.backends import LogitTransform

BLOCK_ELEMENTS = 1 << 20
"""Logits processed at a time: temporaries of 4 MiB in float32, which stay in a CPU's cache."""


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


def _label_columns(labels: Tensor, first_column: int, v: int) -> tuple[Tensor, Tensor]:
    """Column of each label among these `v` (clamped, `[n, 1]`) and whether it is one (`[n, 1]`)."""
    column = (labels - first_column)[:, None]
    return column.clamp(0, v - 1), (column >= 0) & (column < v)


def _transformed(logits: Tensor, transform: LogitTransform, dtype: torch.dtype) -> Tensor:
    """A fresh tensor of `z` in `dtype`."""
    z = logits.to(dtype, copy=True)
    if transform.scale != 1.0:
        z.mul_(transform.scale)
    if transform.softcap:
        z.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return z


def _softcap_slope(logits: Tensor, transform: LogitTransform, dtype: torch.dtype) -> Tensor:
    """`1 - tanh^2 = 4 e / (1 + e)^2` with `e = exp(-2 |x|)`, which has no cancellation."""
    e = (
        logits.to(dtype, copy=True)
        .abs_()
        .mul_(-2 * abs(transform.scale) / transform.softcap)
        .exp_()
    )
    return e / (1 + e).square_().div_(4)


class EagerKernels:
    """`RowKernels` in torch operations, in blocks of rows that bound the temporaries."""

    name = "eager"

    def log_odds_update(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        transform: LogitTransform,
    ) -> None:
        """See `RowKernels.log_odds_update`."""
        v = logits.shape[1]
        if v == 0:
            return
        for rows in _row_blocks(logits):
            z = _transformed(logits[rows], transform, state.dtype)
            column, inside = _label_columns(labels[rows], first_column, v)
            at_label = z.gather(1, column)
            z.scatter_(1, column, torch.where(inside, float("-inf"), at_label))
            row_max = z.amax(1)
            shift = torch.where(row_max == float("-inf"), 0.0, row_max)
            row_sum = z.sub_(shift[:, None]).exp_().sum(1)
            target = torch.where(inside, at_label, float("-inf"))[:, 0]
            part = torch.stack((row_max, row_sum, target))
            state[:, rows] = row_state.merge(state[:, rows], part)

    def log_odds_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        slope: Tensor,
        out: Tensor,
        transform: LogitTransform,
    ) -> None:
        """See `RowKernels.log_odds_gradient`."""
        v = logits.shape[1]
        if v == 0:
            return
        for rows in _row_blocks(logits):
            row_slope = slope[rows, None]
            factor = transform.scale * row_slope
            if transform.softcap:
                factor = factor * _softcap_slope(logits[rows], transform, state.dtype)
            z = _transformed(logits[rows], transform, state.dtype)
            row_max, row_sum = state[row_state.ROW_MAX, rows], state[row_state.ROW_SUM, rows]
            row = z.sub_(row_max[:, None]).exp_().div_(-row_sum[:, None])
            column, inside = _label_columns(labels[rows], first_column, v)
            row.scatter_(1, column, torch.where(inside, 1.0, row.gather(1, column)))
            row.mul_(factor)
            out[rows] = row.masked_fill_(row_slope == 0, 0.0)
