"""Losses that also see the likeliest token other than the label, the runner-up.

They see the label's log-odds d and the runner-up's `log p_m`, neither of which cancels where a
probability is near 0 or 1.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.maths.statistics import Statistics
from unilogit_kernels.objectives.base import Objective, register


class RunnerUpObjective(Objective):
    """A loss `f(d, log p_m)`; a subclass says what it is (`of_both`), and its two `slopes`."""

    @property
    def needs(self) -> RowNeeds:
        """The runner-up."""
        return RowNeeds(runner_up=True)

    def of_both(self, log_odds: Tensor, runner_up: Tensor) -> Tensor:
        """`f`, elementwise."""
        raise NotImplementedError

    def slopes(self, log_odds: Tensor, runner_up: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of `f` by each of the two, elementwise."""
        raise NotImplementedError

    def evaluate(self, seen: Statistics, vocab_size: int) -> Tensor:
        """See `Objective.evaluate`."""
        assert seen.runner_up_log_prob is not None
        return self.of_both(seen.log_odds, seen.runner_up_log_prob)

    def differentiate(self, seen: Statistics, vocab_size: int) -> Statistics:
        """See `Objective.differentiate`."""
        assert seen.runner_up_log_prob is not None
        return Statistics(*self.slopes(seen.log_odds, seen.runner_up_log_prob))


@register
@dataclasses.dataclass(frozen=True)
class LoKU(RunnerUpObjective):
    """LoKU's inverted hinge loss (arXiv 2408.06621): `1 + p_y - max_{v != y} p_v`.

    Bounded: 0 where another token has probability 1, 2 where the label has. The paper also
    initialises LoRA adapters by the Fisher information (FILA), which is no loss.
    """

    name: ClassVar[str] = "loku"

    def of_both(self, log_odds: Tensor, runner_up: Tensor) -> Tensor:
        """`p_y + (1 - p_m)`, in which nothing cancels."""
        return torch.sigmoid(log_odds) - torch.expm1(runner_up)

    def slopes(self, log_odds: Tensor, runner_up: Tensor) -> tuple[Tensor, Tensor]:
        """`p_y (1 - p_y)` and `-p_m`."""
        return torch.sigmoid(log_odds) * torch.sigmoid(-log_odds), -torch.exp(runner_up)
