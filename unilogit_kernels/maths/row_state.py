"""The running statistics of a row of logits, and the one way to merge them.

A row with logits `z` and label `y` is summarised by three numbers: the largest logit outside the
label's column, the sum of `exp(z_j - max)` outside that column, and the label's own logit. Partial
summaries of disjoint sets of columns form a commutative monoid, so the blocks of a row, the chunks
of a vocabulary and the ranks that shard it all fold with `merge`.

Who asks (`RowNeeds`) gets more of the same columns: where the largest logit is (the runner-up),
the sum of all logits, and the mean and variance of the logits under the softmax. Backends compute
only what is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROW_MAX, ROW_SUM, TARGET, RUNNER_UP, COUNT, LINEAR, DOT, SQUARE = range(8)
"""Rows of a state tensor `[3, n]`, `[4, n]` or `[8, n]`, float32 (float64 on the eager backend).

With `s_j = z_j - max` (a maximum of -inf is taken as 0), all over the columns but the label's:

- `ROW_MAX`, `ROW_SUM`: the largest `z_j`; the sum of `e^s_j`.
- `TARGET`: the label's logit.
- `RUNNER_UP`: the column of the largest, of equal ones the lowest, as the bits of an int32 (int64),
  since a float32 counts to 2^24 only.
- `COUNT`, `LINEAR`: how many columns there are; the sum of `s_j`.
- `DOT`: the sum of `e^s_j s_j`, to which a column of -inf adds nothing.
- `SQUARE`: the sum of `e^s_j (s_j - DOT / ROW_SUM)^2`, likewise: about its mean, so that no
  difference of large squares is taken.
"""

NO_COLUMN = 2**31 - 1
"""Of a row whose logits are all -inf but the label's; also of a row that nobody has seen yet."""


class RowNeeds(NamedTuple):
    """What a loss sees of a row beside the label's log-odds.

    Attributes:
        runner_up: The largest logit but the label's, and where it is.
        logsumexp: The logsumexp of the row. It costs the statistics nothing, but the gradient row
            is then no multiple of `onehot_y - r`.
        mean: The mean of the logits.
        entropy: Of the softmax.
        variance: Of the log-probability under the softmax; asks for the entropy too.
    """

    runner_up: bool = False
    logsumexp: bool = False
    mean: bool = False
    entropy: bool = False
    variance: bool = False

    @property
    def general(self) -> bool:
        """Whether a gradient row may be more than `onehot_y - r` and an entry at the runner-up."""
        return any(self[1:])

    @property
    def state_rows(self) -> int:
        """How many rows a state has."""
        return SQUARE + 1 if self.general else TARGET + 1 + self.runner_up

    @property
    def bits(self) -> int:
        """As one number, which operators and kernels of C++ take; `of_bits` is the inverse."""
        return sum(flag << i for i, flag in enumerate(self)) if any(self) else 0

    @staticmethod
    def of_bits(bits: int) -> RowNeeds:
        """See `bits`."""
        return _BY_BITS[bits]

    def union(self, other: RowNeeds) -> RowNeeds:
        """What either asks for."""
        return RowNeeds(*(a or b for a, b in zip(self, other, strict=True)))


_BY_BITS = tuple(
    RowNeeds(*(bool(bits >> i & 1) for i in range(len(RowNeeds._fields))))
    for bits in range(1 << len(RowNeeds._fields))
)

PLAIN = _BY_BITS[0]
"""The label's log-odds alone."""


def empty_state(
    n: int, device: torch.device, dtype: torch.dtype = torch.float32, needs: RowNeeds = PLAIN
) -> Tensor:
    """The state of `n` rows of which no column has been seen: `max = -inf, sum = 0, z_y = -inf`."""
    state = torch.full((needs.state_rows, n), float("-inf"), device=device, dtype=dtype)
    state[ROW_SUM].zero_()
    if has_runner_up(state):
        as_integers(state[RUNNER_UP]).fill_(NO_COLUMN)
        state[COUNT:].zero_()
    return state


def has_runner_up(state: Tensor) -> bool:
    """Whether a state, or parts of one, have a row for where the largest logit of the rest is."""
    return state.shape[-2] > RUNNER_UP


def is_general(state: Tensor) -> bool:
    """Whether a state, or parts of one, have all rows."""
    return state.shape[-2] > COUNT


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
    weight = torch.exp(parts[:, ROW_MAX] - finite_shift(row_max))
    shares = parts[:, ROW_SUM] * weight
    row_sum = shares.sum(0)
    merged = [row_max, row_sum, parts[:, TARGET].amax(0)]
    if has_runner_up(parts):
        columns = as_integers(parts[:, RUNNER_UP])
        attained = (parts[:, ROW_MAX] == row_max) & (row_max != float("-inf"))
        merged.append(torch.where(attained, columns, NO_COLUMN).amin(0).view(parts.dtype))
    if is_general(parts):
        count = parts[:, COUNT]
        move = finite_shift(parts[:, ROW_MAX]) - finite_shift(row_max)
        linear = torch.where(count == 0, 0.0, parts[:, LINEAR] + count * move)
        part_mean = torch.where(shares == 0, 0.0, parts[:, DOT] / parts[:, ROW_SUM] + move)
        dot = (shares * part_mean).sum(0)
        between = shares * (part_mean - _ratio(dot, row_sum)).square()
        merged += [count.sum(0), linear.sum(0), dot, (weight * parts[:, SQUARE] + between).sum(0)]
    return torch.stack(merged)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and 0 where b is."""
    return torch.where(b == 0, 0.0, a / b)


def rest_share(part: Tensor, whole: Tensor) -> Tensor:
    """`exp(R_part - R_whole)`, `[n]`: the share of the rest's probability that a part of it has.

    `whole` holds the columns of `part` and others. A part without a finite logit has none of it.
    """
    row_max = part[ROW_MAX]
    scaled = part[ROW_SUM] * torch.exp(row_max - finite_shift(whole[ROW_MAX]))
    return (scaled / whole[ROW_SUM]).masked_fill_(row_max.isneginf(), 0.0)


def with_some_rest(part: Tensor) -> Tensor:
    """The first rows of a state, `[3, n]`, with a rest that has no finite logit yet taken for 1.

    Its columns then get 0.
    """
    part = part[: TARGET + 1].clone()
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


def runner_up(state: Tensor, labels: Tensor) -> Tensor:
    """The column of the largest logit but the label's, int64 `[n]`.

    Where all of these are -inf they are equal, so it is the lowest of them; as in a row with a NaN.
    """
    column = as_integers(state[RUNNER_UP]).long()
    nowhere = (column == NO_COLUMN) | state[ROW_SUM].isnan()
    return torch.where(nowhere, (labels == 0).long(), column)
