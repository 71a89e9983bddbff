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
        d = self._log_odds(state, labels, vocab_size)
        rest = _product(torch.sigmoid(-d[0]), pair_state.rest_divergence(state))
        return binary_divergence(d) + rest

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
        d = self._log_odds(state, labels, vocab_size)
        is_label, not_label = torch.sigmoid(d), torch.sigmoid(-d)
        rest, sums = pair_state.rest_divergence(state), pair_state.sums(state)
        scale = (weight * not_label / sums).masked_fill_(not_label.logical_not(), 0.0)
        rest_term = _product(not_label[0], rest)
        zero = torch.zeros_like(rest)
        if self.student == "b":
            # dKL/db = p_b - p_a
            at_label = weight * _sigmoid_difference(d, is_label, not_label)
            found = torch.stack((-scale[0], zero, scale[1], at_label))
            undefined = d.isnan().any(0) | rest_term.isnan()
        else:
            # dKL/da_j = p_a_j (log p_a_j - log p_b_j - KL). With D = d_a - d_b - C the brackets are
            # s_j - t_j - mean - sigmoid(d_a) D off the label and sigmoid(-d_a) D at it, in which
            # nothing is left to cancel.
            is_a, a_scale, excess = is_label[0], scale[0], d[0] - d[1] - rest
            spread = is_a * not_label[0]
            at_label = (weight * spread * excess).masked_fill_(spread.logical_not(), 0.0)
            drift = state[pair_state.A_DOT] / sums[0] + _product(is_a, excess)
            found = torch.stack((_product(-a_scale, drift), a_scale, zero, at_label))
            undefined = ~(binary_divergence(d) + rest_term).isfinite()
        return found.masked_fill_(undefined, math.nan).masked_fill_(weight.logical_not(), 0.0)

    def _log_odds(self, state: Tensor, labels: Tensor | None, vocab_size: int) -> Tensor:
        """`d_a` and `d_b`, `[2, n]`, the teacher's rewritten."""
        d = pair_state.log_odds(state, labels, vocab_size)
        teacher = d[0 if self.student == "b" else 1]
        rewritten = self.rewrite.log_odds(teacher, vocab_size)
        if rewritten is not teacher:
            teacher.copy_(rewritten)
        return d


def binary_divergence(d: Tensor) -> Tensor:
    """KL of two Bernoulli distributions from their log-odds `[2, n]`, in nats, `[n]`.

    `softplus(d_b) - softplus(d_a) + sigmoid(d_a) (d_a - d_b)`, mirrored to `d_a <= 0`, where the
    last term is the small one: exact 0 for equal arguments, accurate for every size of both.
    """
    size = d.abs()
    tail = torch.log1p(torch.exp(-size))
    a, b = -size[0], torch.where(d[0].signbit(), d[1], -d[1])
    # Finite where b is +inf, so that it takes nothing from an infinite softplus.
    gap = (a - b).clamp_(min=torch.finfo(d.dtype).min)
    # An outcome of probability 0 contributes nothing, however impossible it is to the other.
    tilt = _product(torch.sigmoid(a), gap)
    return (b.relu() + tail[1] - tail[0] + tilt).relu_()


def _sigmoid_difference(d: Tensor, is_label: Tensor, not_label: Tensor) -> Tensor:
    """`sigmoid(d_b) - sigmoid(d_a)` with all its digits, also where both are near 0 or near 1.

    Args:
        d: `[2, n]`.
        is_label: `sigmoid(d)`.
        not_label: `sigmoid(-d)`.
    """
    gap = (d[1] - d[0]).masked_fill_(d[0] == d[1], 0.0)
    size = is_label.amax(0) * not_label.amax(0) * -torch.expm1(-gap.abs())
    return size.copysign_(gap)


def _product(share: Tensor, value: Tensor) -> Tensor:
    """`share * value`, and 0 where the share is 0, whatever the value."""
    return (share * value).masked_fill_(share.logical_not(), 0.0)
