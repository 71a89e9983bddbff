"""The divergence from a reference model in closed form: functions of a pair's state alone.

With the label's column apart, KL(P_a || P_b) over V tokens is a KL over two outcomes, label or not,
and the rest's own divergence C, weighted by how often the label is not drawn:

    KL = kl2(d_a, d_b) + sigmoid(-d_a) C

where d is the label's log-odds. Rewriting the teacher's label entry changes its d and nothing else.
Everything here is on `[n]` vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unilogit_kernels.maths import pair_state
from unilogit_kernels.maths.elementwise import softplus
from unilogit_kernels.maths.rewrites import Rewrite

Direction = Literal["forward", "reverse"]
DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True)
class Divergence:
    """Which divergence: its direction, and the teacher's rewrite.

    Attributes:
        direction: `"forward"` is KL(teacher || student), `"reverse"` KL(student || teacher).
        rewrite: Of the teacher's label entry.
    """

    direction: Direction
    rewrite: Rewrite

    @property
    def student(self) -> Literal["a", "b"]:
        """Which row of a pair the student is: `a` weights the sum."""
        return "b" if self.direction == "forward" else "a"

    def values(self, state: Tensor, labels: Tensor | None, vocab_size: int) -> Tensor:
        """KL in nats, `[n]`, >= 0; +inf or NaN where the definition gives them.

        Args:
            state: `[7, n]`, complete.
            labels: int64 `[n]`, or None if the rows were folded without one.
            vocab_size: Size of the whole vocabulary.
        """
        d_a, d_b = self._log_odds(state, labels, vocab_size)
        not_label = torch.sigmoid(-d_a)
        rest = torch.where(not_label == 0, 0.0, not_label * pair_state.rest_divergence(state))
        return binary_divergence(d_a, d_b) + rest

    def coefficients(
        self, state: Tensor, labels: Tensor | None, vocab_size: int, weight: Tensor
    ) -> Tensor:
        """`alpha, beta, gamma, at_label` of `RowKernels.divergence_gradient`, `[4, n]`.

        Args:
            state: As in `values`.
            labels: As in `values`.
            vocab_size: As in `values`.
            weight: `[n]`, the gradient of each value; a row of weight 0 gets zeros.
        """
        d_a, d_b = self._log_odds(state, labels, vocab_size)
        value = self.values(state, labels, vocab_size)
        not_a, a_sum = torch.sigmoid(-d_a), state[pair_state.A_SUM]
        a_scale = torch.where(not_a == 0, 0.0, weight * not_a / a_sum)
        zero = torch.zeros_like(value)
        if self.student == "b":
            # dKL/db = p_b - p_a
            not_b = torch.sigmoid(-d_b)
            b_scale = torch.where(not_b == 0, 0.0, weight * not_b / state[pair_state.B_SUM])
            found = torch.stack((-a_scale, zero, b_scale, weight * _sigmoid_difference(d_b, d_a)))
            undefined = value.isnan()
        else:
            # dKL/da_j = p_a_j (log p_a_j - log p_b_j - KL). With D = d_a - d_b - C the brackets are
            # s_j - t_j - mean - sigmoid(d_a) D off the label and sigmoid(-d_a) D at it, in which
            # nothing is left to cancel.
            is_a = torch.sigmoid(d_a)
            excess = d_a - d_b - pair_state.rest_divergence(state)
            at_label = torch.where(is_a * not_a == 0, 0.0, weight * is_a * not_a * excess)
            mean = state[pair_state.A_DOT] / a_sum
            drift = mean + torch.where(is_a == 0, 0.0, is_a * excess)
            alpha = torch.where(a_scale == 0, 0.0, -a_scale * drift)
            found = torch.stack((alpha, a_scale, zero, at_label))
            undefined = ~value.isfinite()
        found = torch.where(undefined, math.nan, found)
        return torch.where(weight == 0, 0.0, found)

    def _log_odds(
        self, state: Tensor, labels: Tensor | None, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        """`d_a` and `d_b`, the teacher's rewritten."""
        d_a, d_b = pair_state.log_odds(state, labels, vocab_size)
        if self.student == "b":
            return self.rewrite.log_odds(d_a, vocab_size), d_b
        return d_a, self.rewrite.log_odds(d_b, vocab_size)


def binary_divergence(d_a: Tensor, d_b: Tensor) -> Tensor:
    """KL of two Bernoulli distributions from their log-odds, elementwise, in nats.

    `softplus(d_b) - softplus(d_a) + sigmoid(d_a) (d_a - d_b)`, mirrored to `d_a <= 0`, where the
    last term is the small one: exact 0 for equal arguments, accurate for every size of both.
    """
    sign = torch.where(d_a > 0, -1.0, 1.0)
    a, b = sign * d_a, sign * d_b
    p = torch.sigmoid(a)
    # An outcome of probability 0 contributes nothing, however impossible it is to the other.
    tilt = torch.where(p == 0, 0.0, p * (a - b))
    value = torch.where(b == math.inf, b, softplus(b) - softplus(a) + tilt)
    value = torch.where(a.isnan() | b.isnan(), math.nan, value)
    return value.clamp(min=0)


def _sigmoid_difference(x: Tensor, y: Tensor) -> Tensor:
    """`sigmoid(x) - sigmoid(y)` with all its digits, also where both are near 0 or near 1."""
    high, low = torch.maximum(x, y), torch.minimum(x, y)
    gap = torch.where(high == low, 0.0, high - low)
    size = torch.sigmoid(high) * torch.sigmoid(-low) * -torch.expm1(-gap)
    return torch.where(x < y, -size, size)
