"""The running statistics of a row of logits, and the one way to merge them.

A row with logits `z` and label `y` is summarised by three numbers: the largest logit outside the
label's column, the sum of `exp(z_j - max)` outside that column, and the label's own logit. Partial
summaries of disjoint sets of columns form a commutative monoid, so the blocks of a row, the chunks
of a vocabulary and the ranks that shard it all fold with `merge`.

A state of four rows also holds the column of that largest logit, the runner-up's: of equal ones the
lowest. Backends look for it only where they are given such a state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROW_MAX, ROW_SUM, TARGET, RUNNER_UP = 0, 1, 2, 3
"""Rows of a state tensor of shape `[3, n]` or `[4, n]`, float32 (float64 on the eager backend).

`RUNNER_UP` holds the bits of an int32 (int64), since a float32 counts to 2^24 only.
"""

NO_COLUMN = 2**31 - 1
"""Of a row whose logits are all -inf but the label's; also of a row that nobody has seen yet."""


def empty_state(
    n: int, device: torch.device, dtype: torch.dtype = torch.float32, *, runner_up: bool = False
) -> Tensor:
    """The state of `n` rows of which no column has been seen: `max = -inf, sum = 0, z_y = -inf`."""
    rows = RUNNER_UP + 1 if runner_up else RUNNER_UP
    state = torch.full((rows, n), float("-inf"), device=device, dtype=dtype)
    state[ROW_SUM] = 0.0
    if runner_up:
        as_integers(state[RUNNER_UP]).fill_(NO_COLUMN)
    return state


def has_runner_up(state: Tensor) -> bool:
    """Whether a state, or parts of one, say where the largest logit of the rest is."""
    return state.shape[-2] > RUNNER_UP


def as_integers(row: Tensor) -> Tensor:
    """The bits of a state's row as integers of the same size."""
    return row.view(torch.int32 if row.dtype == torch.float32 else torch.int64)


def as_row(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_integers`, for a state of `dtype`."""
    return columns.to(torch.int32 if dtype == torch.float32 else torch.int64).view(dtype)


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Merge two states of the same rows over disjoint columns.

    An empty part (`max = -inf`) contributes 0 without evaluating `exp(-inf - -inf)`. NaN spreads.
    """
    return merge_parts(torch.stack((a, b)))


def merge_parts(parts: Tensor) -> Tensor:
    """Merge states stacked along the first dimension, `[k, r, n]` -> `[r, n]`, in a fixed order."""
    row_max = parts[:, ROW_MAX].amax(0)
    # +inf minus +inf gives NaN on purpose: overflow is never laundered.
    row_sum = (parts[:, ROW_SUM] * torch.exp(parts[:, ROW_MAX] - finite_shift(row_max))).sum(0)
    merged = [row_max, row_sum, parts[:, TARGET].amax(0)]
    if has_runner_up(parts):
        columns = as_integers(parts[:, RUNNER_UP])
        attained = (parts[:, ROW_MAX] == row_max) & (row_max != float("-inf"))
        merged.append(torch.where(attained, columns, NO_COLUMN).amin(0).view(parts.dtype))
    return torch.stack(merged)


def rest_share(part: Tensor, whole: Tensor) -> Tensor:
    """`exp(R_part - R_whole)`, `[n]`: the share of the rest's probability that a part of it has.

    `whole` holds the columns of `part` and others. A part without a finite logit has none of it.
    """
    row_max = part[ROW_MAX]
    scaled = part[ROW_SUM] * torch.exp(row_max - finite_shift(whole[ROW_MAX]))
    return (scaled / whole[ROW_SUM]).masked_fill_(row_max.isneginf(), 0.0)


def with_some_rest(part: Tensor) -> Tensor:
    """The state, with a rest that has no finite logit yet taken for 1: its columns then get 0."""
    part = part.clone()
    row_max = part[ROW_MAX]
    empty = row_max.isneginf()
    row_max.masked_fill_(empty, 0.0)
    part[ROW_SUM].masked_fill_(empty, 1.0)
    return part


def finite_shift(row_max: Tensor) -> Tensor:
    """What is subtracted from a row before `exp`: its maximum, or 0 if every logit is -inf."""
    return row_max.masked_fill(row_max.isneginf(), 0.0)


def log_odds(state: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """`d = z_y - log sum_{j != y} exp z_j` of complete states, `[n]` in the state's dtype.

    The maximum is subtracted first, so a common offset of the logits costs nothing. A label outside
    `[0, vocab_size)` was found in no column; it gives NaN, as does a label whose logit is `+inf`.
    """
    return log_odds_of_parts(state[TARGET], state[ROW_MAX], state[ROW_SUM], labels, vocab_size)


def log_odds_of_parts(
    target: Tensor, row_max: Tensor, row_sum: Tensor, labels: Tensor | None, vocab_size: int
) -> Tensor:
    """`log_odds` of the rows of a state, `[..., n]` each; without labels none of them is wrong."""
    # An empty rest (all -inf) has sum 0 and max -inf: d is +inf, unless the label is -inf too.
    d = (target - row_max) - torch.log(row_sum)
    bad = target.isposinf()
    if labels is not None:
        bad = bad | (labels != labels.clamp(0, vocab_size - 1))
    return d.masked_fill_(bad, float("nan"))


# ---- the runner-up -----------------------------------------------------------------------------


class Statistics(NamedTuple):
    """What losses see of complete rows, `[n]` each; or a loss's derivatives by each of the two.

    Attributes:
        log_odds: `d` of the label.
        runner_up: `log p_m` of the runner-up m; None where nobody asked for it.
    """

    log_odds: Tensor
    runner_up: Tensor | None = None

    @staticmethod
    def of(values: Tensor) -> Statistics:
        """Of one tensor, `[n]` or `[2, n]`."""
        return Statistics(values) if values.dim() == 1 else Statistics(values[0], values[1])


def statistics(state: Tensor, labels: Tensor, vocab_size: int) -> Statistics:
    """The statistics of complete states.

    `exp(z_m - max)` is 1, so the sum alone knows the runner-up's share of the rest:
    `log p_m = log(1 - p_y) - log sum`.
    """
    d = log_odds(state, labels, vocab_size)
    if not has_runner_up(state):
        return Statistics(d)
    softplus = d.clamp(min=0) + torch.log1p(torch.exp(-d.abs()))
    return Statistics(d, -softplus - torch.log(_runner_up_sum(state)))


def runner_up(state: Tensor, labels: Tensor) -> Tensor:
    """The column of the largest logit but the label's, int64 `[n]`.

    Where all of these are -inf they are equal, so it is the lowest of them; as in a row with a NaN.
    """
    column = as_integers(state[RUNNER_UP]).long()
    nowhere = (column == NO_COLUMN) | state[ROW_SUM].isnan()
    return torch.where(nowhere, (labels == 0).long(), column)


def row_slopes(state: Tensor, log_odds: Tensor, slope: Statistics) -> Tensor:
    """What the gradient kernels take, of the derivatives of a loss by its `Statistics`.

    With `dd/dz = onehot_y - r`, `d log p_m/dz = onehot_m - p` and `p = sigmoid(-d) r` off the
    label, nothing here is a difference of numbers that are nearly 1.

    Args:
        state: Complete.
        log_odds: `d`, `[n]`.
        slope: The derivatives.

    Returns:
        `[n]`, the derivative itself, for a loss of the log-odds alone; else `[3, n]`: what the rest
        is multiplied by, and the entries of the label and of the runner-up, whose `r_m` is
        `1 / sum`. All 0 where both derivatives are, whatever the state holds.
    """
    by_d, by_m = slope
    if by_m is None:
        return by_d
    p, others, row_sum = torch.sigmoid(log_odds), torch.sigmoid(-log_odds), _runner_up_sum(state)
    not_m = ((row_sum - 1) + p) / row_sum  # 1 - p_m
    rows = torch.stack((by_d + by_m * others, by_d - by_m * p, by_m * not_m - by_d / row_sum))
    return torch.where((by_d == 0) & (by_m == 0), 0.0, rows)


def _runner_up_sum(state: Tensor) -> Tensor:
    """The sum of exponentials, 1 for the runner-up; also 1 where there is nothing but -inf."""
    return state[ROW_SUM].clamp(min=1)
