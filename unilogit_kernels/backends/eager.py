"""Row kernels in plain torch: any device and float64; the twin that the others are held to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile, TilePair
from unilogit_kernels.maths import pair_state, row_state
from unilogit_kernels.maths.row_state import (
    PLAIN,
    RowNeeds,
    finite_shift,
    has_runner_up,
    is_general,
)

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


def _put(row: Tensor, tokens: Tensor, first_column: int, values: Tensor) -> None:
    """Replace each row's entry of its token, if that is among these columns."""
    column, inside = _label_columns(tokens, first_column, row.shape[1])
    row.scatter_(1, column, torch.where(inside, values[:, None], row.gather(1, column)))


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


def _rest_and_target(
    logits: Tensor,
    column: Tensor,
    inside: Tensor,
    transform: LogitTransform,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of these columns: `z` less its maximum, -inf at the label; the maximum; the label's logit."""
    z = _transformed(logits, transform, dtype)
    at_label = z.gather(1, column)
    z.scatter_(1, column, torch.where(inside, float("-inf"), at_label))
    row_max = z.amax(1)
    z.sub_(finite_shift(row_max)[:, None])
    return z, row_max, torch.where(inside, at_label, float("-inf"))[:, 0]


def _moments(s: Tensor, part: Tensor, *, squares: bool) -> None:
    """Fill in `DOT`, and `SQUARE`, of logits less their maximum."""
    p = s.exp()
    part[row_state.DOT] = dot = (p * s).masked_fill_(p == 0, 0.0).sum(1)
    if squares:
        row_sum = p.sum(1)
        mean = torch.where(row_sum == 0, 0.0, dot / row_sum)
        about = (s - mean[:, None]).square_().mul_(p)
        part[row_state.SQUARE] = about.masked_fill_(p == 0, 0.0).sum(1)


class EagerKernels(RowKernels):
    """The row kernels in torch, in blocks of rows that bound temporaries."""

    name = "eager"

    def log_odds_update(self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN) -> None:
        """See `RowKernels`."""
        logits, labels, first_column, transform = tile
        v = logits.shape[1]
        if v == 0:
            return
        for rows in _row_blocks(logits):
            column, inside = _label_columns(labels[rows], first_column, v)
            s, row_max, target = _rest_and_target(
                logits[rows], column, inside, transform, state.dtype
            )
            part = row_state.empty_state(s.shape[0], s.device, state.dtype, needs)
            if needs.runner_up:
                # Of equal ones, the first; where all are -inf, the merge takes none.
                columns = row_state.as_row(first_column + s.argmax(1), state.dtype)
                part[row_state.RUNNER_UP] = columns
            if needs.mean:
                part[row_state.COUNT] = v - inside[:, 0].to(state.dtype)
                without_label = s.scatter(1, column, s.gather(1, column).masked_fill(inside, 0.0))
                part[row_state.LINEAR] = without_label.sum(1)
            if needs.entropy or needs.variance:
                _moments(s, part, squares=needs.variance)
            part[row_state.ROW_MAX], part[row_state.TARGET] = row_max, target
            part[row_state.ROW_SUM] = s.exp_().sum(1)
            state[:, rows] = row_state.merge(state[:, rows], part)

    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        """See `RowKernels`."""
        logits, labels, first_column, transform = tile
        v = logits.shape[1]
        if v == 0:
            return
        general = is_general(state)
        slopes = slope if has_runner_up(state) else slope.expand(2, -1)
        for rows in _row_blocks(logits):
            rest, at_label, *more = slopes[:, rows]
            row_max, row_sum = state[row_state.ROW_MAX, rows], state[row_state.ROW_SUM, rows]
            if general:
                row_max, row_sum = finite_shift(row_max), row_sum.masked_fill(row_sum == 0, 1.0)
            s = _transformed(logits[rows], transform, state.dtype).sub_(row_max[:, None])
            if general:
                r = s.exp().div_(row_sum[:, None])
                tilt, uniform = more[1:]
                factor = s.mul_(tilt[:, None]).add_(rest[:, None])
                row = factor.mul_(r).masked_fill_(r == 0, 0.0).neg_().add_(uniform[:, None])
            else:
                row = s.exp_().mul_((-rest / row_sum)[:, None])
            _put(row, labels[rows], first_column, at_label)
            if more:
                column = row_state.as_integers(state[row_state.RUNNER_UP, rows])
                _put(row, column.long(), first_column, more[0])
            if transform.softcap:
                row.mul_(_softcap_slope(logits[rows], transform, state.dtype))
            row.mul_(transform.scale)
            out[rows] = row.masked_fill_((slopes[:, rows] == 0).all(0)[:, None], 0.0)

    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        """See `RowKernels`."""
        a, b, labels, first_column, a_transform, b_transform = pair
        v = a.shape[1]
        if v == 0:
            return
        for rows in _row_blocks(a):
            where = _label_columns(labels[rows], first_column, v)
            s, a_max, a_target = _rest_and_target(a[rows], *where, a_transform, state.dtype)
            t, b_max, b_target = _rest_and_target(b[rows], *where, b_transform, state.dtype)
            p = s.exp()
            a_dot = s.sub_(t).mul_(p).masked_fill_(p == 0, 0.0).sum(1)
            b_sum = t.exp_().sum(1)
            part = torch.stack((a_max, p.sum(1), a_dot, b_max, b_sum, a_target, b_target))
            state[:, rows] = pair_state.merge(state[:, rows], part)

    def divergence_gradient(
        self,
        pair: TilePair,
        state: Tensor,
        coefficients: Tensor,
        student: Literal["a", "b"],
        out: Tensor,
    ) -> None:
        """See `RowKernels`."""
        a, b, labels, first_column, a_transform, b_transform = pair
        v = a.shape[1]
        if v == 0:
            return
        logits, transform = (a, a_transform) if student == "a" else (b, b_transform)
        a_shift = finite_shift(state[pair_state.A_MAX])
        b_shift = finite_shift(state[pair_state.B_MAX])
        for rows in _row_blocks(a):
            alpha, beta, gamma, at_label = coefficients[:, rows, None]
            s = _transformed(a[rows], a_transform, state.dtype).sub_(a_shift[rows, None])
            t = _transformed(b[rows], b_transform, state.dtype).sub_(b_shift[rows, None])
            p = s.exp()
            gap = s.sub_(t).masked_fill_(beta == 0, 0.0)  # where t is -inf, 0 * inf is not meant
            row = gap.mul_(beta).add_(alpha).mul_(p).masked_fill_(p == 0, 0.0)
            row.add_(t.exp_().mul_(gamma))
            _put(row, labels[rows], first_column, at_label[:, 0])
            if transform.softcap:
                row.mul_(_softcap_slope(logits[rows], transform, state.dtype))
            row.mul_(transform.scale)
            unused = (coefficients[:, rows] == 0).all(0)
            out[rows] = row.masked_fill_(unused[:, None], 0.0)
