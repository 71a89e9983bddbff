"""What losses see of complete rows, and the gradient rows of its derivatives.

With `m` the maximum of the rest, `S = sum e^(z_j - m)`, `r_j = e^(z_j - m) / S`, `p = sigmoid(d)`
and `q = sigmoid(-d)`, nothing here is a small difference of large numbers (docs/maths.md):

    logsumexp                L = m + log S + softplus(d)              dL/dz_j = p_j
    -(mean_j log p_j)        U = log S + softplus(d) - mean(z - m)    dU/dz_j = p_j - 1 / V
    entropy                  H = Hb(d) + q H(r)                       dH/dz_j = -p_j (z_j - m - mu)
    variance of log p        q Var(r) + p q (z_y - m - mean_r)^2
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.maths.elementwise import softplus
from unilogit_kernels.maths.row_state import (
    DOT,
    LINEAR,
    ROW_MAX,
    ROW_SUM,
    SQUARE,
    TARGET,
    RowNeeds,
    finite_shift,
    has_runner_up,
    is_general,
    log_odds,
)

REST, AT_LABEL, AT_RUNNER_UP, TILT, UNIFORM = range(5)
"""Rows of what the gradient kernels take, `[3, n]` or `[5, n]`: see `RowKernels`."""

# Beyond this sigmoid(-|d|) is 0; it keeps 0 * inf out of what is bounded.
_SATURATED = 1e4


class Statistics(NamedTuple):
    """What losses see of complete rows, `[n]` each; or a loss's derivatives by each of them.

    Nothing but `log_odds` exists unless it was asked for (`RowNeeds`).

    Attributes:
        log_odds: `d` of the label.
        runner_up_log_prob: `log p_m` of the runner-up m.
        logsumexp: Of the row.
        uniform_cross_entropy: `-(mean_j log p_j)`, of all V tokens: logsumexp less the mean logit.
        entropy: Of the softmax.
    """

    log_odds: Tensor
    runner_up_log_prob: Tensor | None = None
    logsumexp: Tensor | None = None
    uniform_cross_entropy: Tensor | None = None
    entropy: Tensor | None = None

    def values(self) -> Tensor:
        """Those that exist as one tensor, `[n]` or `[k, n]`, in order."""
        found = [each for each in self if each is not None]
        return found[0] if len(found) == 1 else torch.stack(found)

    @staticmethod
    def of(values: Tensor, needs: RowNeeds) -> Statistics:
        """The inverse of `values`."""
        if values.dim() == 1:
            return Statistics(values)
        rows = iter(values)
        return Statistics(next(rows), *(next(rows) if need else None for need in needs[:4]))


def count(needs: RowNeeds) -> int:
    """How many statistics a loss that asks for these sees."""
    return 1 + sum(needs[:4])


def statistics(state: Tensor, labels: Tensor, vocab_size: int, needs: RowNeeds) -> Statistics:
    """The statistics of complete states."""
    d = log_odds(state, labels, vocab_size)
    if not any(needs):
        return Statistics(d)
    row = _Row(state, d, vocab_size)
    return Statistics(
        d,
        row.log_runner_up() if needs.runner_up else None,
        row.logsumexp() if needs.logsumexp else None,
        row.uniform_cross_entropy() if needs.mean else None,
        row.entropy() if needs.entropy else None,
    )


def mean_logit(state: Tensor, log_odds: Tensor, vocab_size: int) -> Tensor:
    """The mean of a row's logits, `[n]`; -inf where one is. For states that hold the mean."""
    row = _Row(state, log_odds, vocab_size)
    mean = finite_shift(state[ROW_MAX]) + row.mean_excess()
    return mean.masked_fill(log_odds.isnan(), float("nan"))


def log_prob_variance(state: Tensor, log_odds: Tensor, vocab_size: int) -> Tensor:
    """The variance of `log p_j` under the softmax, `[n]`. For states that hold the variance."""
    return _Row(state, log_odds, vocab_size).variance()


def row_slopes(state: Tensor, log_odds: Tensor, slope: Statistics, vocab_size: int) -> Tensor:
    """What the gradient kernels take, of the derivatives of a loss by its `Statistics`.

    With `dd/dz = onehot_y - r`, `d log p_m/dz = onehot_m - p` and `p_j = q r_j` off the label,
    nothing here is a difference of numbers that are nearly 1.

    Args:
        state: Complete.
        log_odds: `d`, `[n]`.
        slope: The derivatives.
        vocab_size: Of the whole vocabulary.

    Returns:
        `[n]`, the derivative itself, for a state of three rows; `[3, n]` for one of four: what the
        rest is multiplied by, and the entries of the label and of the runner-up; else `[5, n]`. All
        0 where all derivatives are, whatever the state holds.
    """
    by_d = slope.log_odds
    if not has_runner_up(state):
        return by_d
    row = _Row(state, log_odds, vocab_size)
    p, q = row.p, row.q
    rest, at_label = by_d, by_d
    at_runner_up = -by_d / row.runner_up_sum
    used = by_d != 0
    by_m = slope.runner_up_log_prob
    if by_m is not None:
        not_m = ((row.runner_up_sum - 1) + p) / row.runner_up_sum  # 1 - p_m
        rest, at_label = rest + by_m * q, at_label - by_m * p
        at_runner_up = at_runner_up + by_m * not_m
        used = used | (by_m != 0)
    rows = [rest, at_label, at_runner_up]
    if is_general(state):
        more = _general_slopes(row, slope)
        rows = [own + other for own, other in zip(rows, more[:3], strict=True)] + more[3:]
        for derivative in slope[2:]:
            if derivative is not None:
                used = used | (derivative != 0)
    return torch.where(used, torch.stack(rows), 0.0)


def _general_slopes(row: _Row, slope: Statistics) -> list[Tensor]:
    """The five rows of the derivatives by logsumexp, uniform cross-entropy and entropy."""
    zero = torch.zeros_like(row.p)
    rest, at_label, tilt, uniform = zero, zero, zero, zero
    for derivative in (slope.logsumexp, slope.uniform_cross_entropy):
        if derivative is not None:
            rest, at_label = rest - derivative * row.q, at_label + derivative * row.p
    if slope.uniform_cross_entropy is not None:
        uniform = -slope.uniform_cross_entropy / row.vocab_size
    if slope.entropy is not None:
        tilt = slope.entropy * row.q
        rest = rest - tilt * row.softmax_mean()
        at_label = at_label - _product(row.p, tilt * row.excess_of_label())
    at_runner_up = uniform - rest / row.runner_up_sum
    return [rest, at_label + uniform, at_runner_up, tilt, uniform]


class _Row:
    """Complete states, and what follows from them; `[n]` each."""

    def __init__(self, state: Tensor, log_odds: Tensor, vocab_size: int) -> None:
        self._state, self.d, self.vocab_size = state, log_odds, vocab_size
        self.p, self.q = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
        # The sum of exponentials, 1 for the runner-up; also 1 where there is nothing but -inf.
        self.runner_up_sum = state[ROW_SUM].clamp(min=1)

    def log_runner_up(self) -> Tensor:
        """`log p_m`: `exp(z_m - max)` is 1, so the sum alone knows its share of the rest."""
        return -softplus(self.d) - torch.log(self.runner_up_sum)

    def logsumexp(self) -> Tensor:
        """`L`."""
        return finite_shift(self._state[ROW_MAX]) + self._total()

    def uniform_cross_entropy(self) -> Tensor:
        """`U`."""
        return self._total() - self.mean_excess()

    def mean_excess(self) -> Tensor:
        """The mean of `z_j - m` over all V columns."""
        return (self._state[LINEAR] + self._label_excess()) / self.vocab_size

    def entropy(self) -> Tensor:
        """`H`."""
        size = self.d.abs().clamp(max=_SATURATED)
        of_label = torch.log1p(torch.exp(-size)) + size * torch.sigmoid(-size)
        of_rest = torch.log(self.runner_up_sum) - self._rest_mean()
        return of_label + self.q * of_rest

    def variance(self) -> Tensor:
        """Of `log p_j` under p."""
        within = self._state[SQUARE] / self.runner_up_sum
        return self.q * within + _product(self.p * self.q, self.excess_of_label().square())

    def softmax_mean(self) -> Tensor:
        """`mu`, the mean of `z_j - m` under p."""
        return _product(self.p, self._label_excess()) + self.q * self._rest_mean()

    def excess_of_label(self) -> Tensor:
        """`z_y` less the mean logit of the rest under r; 0 where there is no rest."""
        excess = self._label_excess() - self._rest_mean()
        return excess.masked_fill(self._state[ROW_MAX].isneginf(), 0.0)

    def _total(self) -> Tensor:
        """`L - m`."""
        target, row_max = self._state[TARGET], self._state[ROW_MAX]
        total = torch.log(self.runner_up_sum) + softplus(self.d)
        return torch.where(row_max.isneginf() & ~self.d.isnan(), target, total)

    def _label_excess(self) -> Tensor:
        """`z_y - m`."""
        return self._state[TARGET] - finite_shift(self._state[ROW_MAX])

    def _rest_mean(self) -> Tensor:
        """The mean of `z_j - m` under r."""
        return self._state[DOT] / self.runner_up_sum


def _product(probability: Tensor, x: Tensor) -> Tensor:
    """The product, and 0 where the probability is, whatever the other is."""
    return torch.where(probability == 0, 0.0, probability * x)
