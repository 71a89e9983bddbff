"""The running statistics of a pair of rows, for KL(P_a || P_b), and the one way to merge them.

Two rows of logits `a` and `b` over the same columns, with one label `y`. Off the label's column,
the sums of `exp(a_j - a_max)` and `exp(b_j - b_max)` and the dot product

    a_dot = sum_{j != y} exp(a_j - a_max) ((a_j - a_max) - (b_j - b_max))

give the divergence of the two rests; the labels' own logits do the rest in closed form. As with
`row_state`, partial summaries of disjoint sets of columns form a commutative monoid. Both maxima
are taken off inside the dot product, so a common offset of either row costs no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels.maths import row_state

A_MAX, A_SUM, A_DOT, B_MAX, B_SUM, A_TARGET, B_TARGET = range(7)
"""Rows of a state tensor of shape `[7, n]`, float32 (float64 on the eager backend)."""

_MAXIMA = slice(A_MAX, B_MAX + 1, B_MAX - A_MAX)
_SUMS = slice(A_SUM, B_SUM + 1, B_SUM - A_SUM)
_TARGETS = slice(A_TARGET, B_TARGET + 1)
"""Of both rows at once, `a` first."""


def empty_state(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The state of `n` pairs of which no column has been seen: maxima and targets -inf, sums 0."""
    state = torch.full((7, n), float("-inf"), device=device, dtype=dtype)
    # No list of indices, which would be copied to the device: a CUDA graph must not wait for one.
    state[A_SUM : A_DOT + 1].zero_()
    state[B_SUM].zero_()
    return state


def merge(first: Tensor, second: Tensor) -> Tensor:
    """Merge two states of the same pairs over disjoint columns.

    An empty part contributes 0 without evaluating `-inf - -inf`. NaN spreads.
    """
    return merge_parts(torch.stack((first, second)))


def merge_parts(parts: Tensor) -> Tensor:
    """Merge states stacked along the first dimension, `[k, 7, n]` -> `[7, n]`, in a fixed order."""
    a_max, b_max = parts[:, A_MAX].amax(0), parts[:, B_MAX].amax(0)
    # Of a part, how far each maximum moves; +inf minus +inf gives NaN on purpose.
    a_move = parts[:, A_MAX] - row_state.finite_shift(a_max)
    b_move = parts[:, B_MAX] - row_state.finite_shift(b_max)
    a_factor = torch.exp(a_move)
    dots = a_factor * (parts[:, A_DOT] + parts[:, A_SUM] * (a_move - b_move))
    return torch.stack(
        (
            a_max,
            (a_factor * parts[:, A_SUM]).sum(0),
            # A part of no weight in the whole contributes nothing, even an infinite dot product.
            torch.where(a_factor == 0, 0.0, dots).sum(0),
            b_max,
            (torch.exp(b_move) * parts[:, B_SUM]).sum(0),
            parts[:, A_TARGET].amax(0),
            parts[:, B_TARGET].amax(0),
        )
    )


def log_odds(state: Tensor, labels: Tensor | None, vocab_size: int) -> Tensor:
    """The label's log-odds in both rows, `d_a` and `d_b`, `[2, n]`, of complete states.

    Args:
        state: `[7, n]`.
        labels: int64 `[n]`; one outside `[0, vocab_size)` gives NaN. None if the rows were folded
            without a label (-1): then both are -inf, or NaN where every logit is -inf.
        vocab_size: Size of the whole vocabulary.
    """
    return row_state.log_odds_of_parts(
        state[_TARGETS], state[_MAXIMA], state[_SUMS], labels, vocab_size
    )


def sums(state: Tensor) -> Tensor:
    """The sums of exponentials of both rows, `[2, n]`."""
    return state[_SUMS]


def rest_divergence(state: Tensor) -> Tensor:
    """`C = sum_{j != y} r^a_j (log r^a_j - log r^b_j) >= 0` of complete states, `[n]`.

    `r^x` is row x's softmax over the columns other than the label's. `+inf` where a token has
    weight in `r^a` and none in `r^b`; NaN where `r^a` does not exist (every logit -inf).
    """
    a_sum = state[A_SUM]
    # One logarithm of a ratio: exact 0 for equal rows. Both sums are about 1 at least, or the rest
    # is empty: that of `b` must not take an infinite mean back.
    log_ratio = torch.log(state[B_SUM].clamp(min=0.5) / a_sum)
    return (state[A_DOT] / a_sum + log_ratio).clamp_(min=0)
