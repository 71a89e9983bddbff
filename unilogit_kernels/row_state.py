"""The running statistics of a row of logits, and the one way to merge them.

A row with logits `z` and label `y` is summarised by three numbers: the largest logit outside the
label's column, the sum of `exp(z_j - max)` outside that column, and the label's own logit. Partial
summaries of disjoint sets of columns form a commutative monoid, so the blocks of a row, the chunks
of a vocabulary and the ranks that shard it all fold with `merge`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_MAX, ROW_SUM, TARGET = 0, 1, 2
"""Rows of a state tensor of shape `[3, n]`, float32 (float64 on the eager backend)."""


def empty_state(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The state of `n` rows of which no column has been seen: `max = -inf, sum = 0, z_y = -inf`."""
    state = torch.full((3, n), float("-inf"), device=device, dtype=dtype)
    state[ROW_SUM] = 0.0
    return state


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Merge two states of the same rows over disjoint columns.

    An empty part (`max = -inf`) contributes 0 without evaluating `exp(-inf - -inf)`. NaN spreads.
    """
    return merge_parts(torch.stack((a, b)))


def merge_parts(parts: Tensor) -> Tensor:
    """Merge states stacked along the first dimension, `[k, 3, n]` -> `[3, n]`, in a fixed order."""
    row_max = parts[:, ROW_MAX].amax(0)
    # +inf minus +inf gives NaN on purpose: overflow is never laundered.
    row_sum = (parts[:, ROW_SUM] * torch.exp(parts[:, ROW_MAX] - finite_shift(row_max))).sum(0)
    return torch.stack((row_max, row_sum, parts[:, TARGET].amax(0)))


def rest_share(part: Tensor, whole: Tensor) -> Tensor:
    """`exp(R_part - R_whole)`, `[n]`: the share of the rest's probability that a part of it has.

    `whole` holds the columns of `part` and others. A part without a finite logit has none of it.
    """
    scaled = part[ROW_SUM] * torch.exp(part[ROW_MAX] - finite_shift(whole[ROW_MAX]))
    return torch.where(part[ROW_MAX] == float("-inf"), 0.0, scaled / whole[ROW_SUM])


def with_some_rest(part: Tensor) -> Tensor:
    """The state, with a rest that has no finite logit yet taken for 1: its columns then get 0."""
    empty = part[ROW_MAX] == float("-inf")
    row_max = torch.where(empty, 0.0, part[ROW_MAX])
    return torch.stack((row_max, torch.where(empty, 1.0, part[ROW_SUM]), part[TARGET]))


def finite_shift(row_max: Tensor) -> Tensor:
    """What is subtracted from a row before `exp`: its maximum, or 0 if every logit is -inf."""
    return torch.where(row_max == float("-inf"), 0.0, row_max)


def log_odds(state: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """`d = z_y - log sum_{j != y} exp z_j` of complete states, `[n]` in the state's dtype.

    The maximum is subtracted first, so a common offset of the logits costs nothing. A label outside
    `[0, vocab_size)` was found in no column; it gives NaN, as does a label whose logit is `+inf`.
    """
    target = state[TARGET]
    bad = (target == float("inf")) | (labels < 0) | (labels >= vocab_size)
    d = (target - state[ROW_MAX]) - torch.log(state[ROW_SUM])
    # An empty rest (all -inf) has sum 0 and max -inf: d is +inf, unless the label is -inf too.
    empty_rest = state[ROW_MAX] == float("-inf")
    d = torch.where(
        empty_rest, torch.where(target == float("-inf"), float("nan"), target + float("inf")), d
    )
    return torch.where(bad, float("nan"), d)
