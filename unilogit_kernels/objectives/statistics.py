"""Losses that see statistics of the whole row: its logsumexp, its mean, its entropy.

None of them is a new kernel: each is a function of `Statistics`, with its derivatives by them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.maths.elementwise import softplus
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds
from unilogit_kernels.maths.statistics import Statistics
from unilogit_kernels.objectives.base import Objective, Sweep, register
from unilogit_kernels.objectives.token import log_sigmoid

_SWEPT = "weighted_statistics"


class _WeightedStatistics(Objective):
    """`a softplus(-d) + b U + c L^2 + e H + k`: `weights` says which; see `Statistics`.

    A weight of 0 leaves its term out, also where that is infinite.
    """

    def weights(self, vocab_size: int) -> tuple[float, float, float, float, float]:
        """`a, b, c, e, k`."""
        raise NotImplementedError

    @property
    def needs(self) -> RowNeeds:
        """What the terms with a weight see."""
        # The weights say nothing else of the vocabulary than their constant.
        _, by_mean, by_square, by_entropy, _ = self.weights(2)
        return RowNeeds(logsumexp=by_square != 0, mean=by_mean != 0, entropy=by_entropy != 0)

    def sweep(self, vocab_size: int) -> Sweep:
        """See `Objective.sweep`."""
        return Sweep(_SWEPT, self.weights(vocab_size))

    def evaluate(self, seen: Statistics, vocab_size: int) -> Tensor:
        """See `Objective.evaluate`."""
        a, b, c, e, constant = self.weights(vocab_size)
        value = torch.full_like(seen.log_odds, constant)
        # A row without log-odds (a bad label, NaN) has no loss either.
        value = value + 0 * seen.log_odds.masked_fill(seen.log_odds.isinf(), 0.0)
        if a:
            value = value + a * softplus(-seen.log_odds)
        if seen.uniform_cross_entropy is not None and b:
            value = value + b * seen.uniform_cross_entropy
        if seen.logsumexp is not None and c:
            value = value + c * seen.logsumexp.square()
        if seen.entropy is not None and e:
            value = value + e * seen.entropy
        return value

    def differentiate(self, seen: Statistics, vocab_size: int) -> Statistics:
        """See `Objective.differentiate`."""
        a, b, c, e, _ = self.weights(vocab_size)
        d = seen.log_odds
        return Statistics(
            -a * torch.sigmoid(-d),
            logsumexp=2 * c * seen.logsumexp if seen.logsumexp is not None and c else None,
            uniform_cross_entropy=torch.full_like(d, b) if b else None,
            entropy=torch.full_like(d, e) if e else None,
        )

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """See `Objective.value`."""
        return self.evaluate(Statistics(log_odds), vocab_size)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """See `Objective.slope`."""
        return self.differentiate(Statistics(log_odds), vocab_size).log_odds


@register
@dataclasses.dataclass(frozen=True)
class CrossEntropy(_WeightedStatistics):
    """`-log p_y`, the usual language-modelling loss, with what is commonly added to it.

    `(1 - label_smoothing) (-log p_y) + label_smoothing (-mean_j log p_j) + z_loss L^2 + entropy H`,
    where the mean is over all V tokens as in `torch.nn.functional.cross_entropy`, `L` is the
    logsumexp of the logits and `H` the entropy of their softmax. Each term is paid for only where
    its weight is not 0.

    Attributes:
        label_smoothing: Share of the target that is spread evenly over the vocabulary, in [0, 1].
        z_loss: Weight of the squared logsumexp (PaLM, arXiv 2204.02311, takes 1e-4); Liger-Kernel's
            `lse_square_scale` and Cut Cross-Entropy's z-loss.
        entropy: Weight of the entropy, of either sign; a negative one penalises confidence
            (arXiv 1701.06548).

    Raises:
        ValueError: `label_smoothing` is not in [0, 1], or `z_loss` is negative.
    """

    name: ClassVar[str] = "cross_entropy"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy: float = 0.0

    def __post_init__(self) -> None:
        """Check the weights."""
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss must be at least 0, got {self.z_loss}")

    def weights(self, vocab_size: int) -> tuple[float, float, float, float, float]:
        """See `_WeightedStatistics`."""
        return 1 - self.label_smoothing, self.label_smoothing, self.z_loss, self.entropy, 0.0

    @property
    def reports(self) -> bool:
        """The z-loss, where there is one."""
        return self.z_loss != 0

    def report(self, seen: Statistics, vocab_size: int) -> Tensor:
        """`z_loss L^2`."""
        assert seen.logsumexp is not None
        return self.z_loss * seen.logsumexp.square()

    def sweep(self, vocab_size: int) -> Sweep:
        """See `Objective.sweep`."""
        return super().sweep(vocab_size) if any(self.needs) else Sweep(self.name)

    def evaluate(self, seen: Statistics, vocab_size: int) -> Tensor:
        """See `Objective.evaluate`."""
        return super().evaluate(seen, vocab_size) if any(self.needs) else softplus(-seen.log_odds)


@register
@dataclasses.dataclass(frozen=True)
class MaxEntropy(_WeightedStatistics):
    """ME (arXiv 2410.08109): `KL(uniform || p) = -(mean_j log p_j) - log V`, in nats, >= 0.

    The label does not enter. Infinite where a token has probability 0; the authors' code adds
    1e-12 to each probability, which bounds that.
    """

    name: ClassVar[str] = "max_entropy"

    def weights(self, vocab_size: int) -> tuple[float, float, float, float, float]:
        """See `_WeightedStatistics`."""
        return 0.0, 1.0, 0.0, 0.0, -math.log(vocab_size)


@register
@dataclasses.dataclass(frozen=True)
class Entropy(_WeightedStatistics):
    """`weight H`, the entropy of the softmax in nats. The label does not enter.

    Attributes:
        weight: -1, the default, flattens the distribution; a positive one sharpens it.
    """

    name: ClassVar[str] = "entropy"
    weight: float = -1.0

    def weights(self, vocab_size: int) -> tuple[float, float, float, float, float]:
        """See `_WeightedStatistics`."""
        return 0.0, 0.0, 0.0, self.weight, 0.0


@register
@dataclasses.dataclass(frozen=True)
class PDU(Objective):
    """PDU's forget loss (arXiv 2506.05314): `(max_j z_j - mean_j z_j)^2`.

    It flattens the logits; the label does not enter. The authors average over all positions, those
    of the prompt and of padding too; this is a loss of the positions that have a label. Its retain
    weight follows the retain loss: see `UnlearningArguments.dual_step_size`.
    """

    name: ClassVar[str] = "pdu"

    @property
    def needs(self) -> RowNeeds:
        """The largest logit, and the mean."""
        return RowNeeds(runner_up=True, mean=True)

    def evaluate(self, seen: Statistics, vocab_size: int) -> Tensor:
        """`(log p_max + U)^2`, in which no common offset of the logits is left."""
        return self._excess(seen).square()

    def differentiate(self, seen: Statistics, vocab_size: int) -> Statistics:
        """`2 (log p_max + U)` by either, of which the larger of label and runner-up is one."""
        assert seen.runner_up_log_prob is not None
        slope = 2 * self._excess(seen)
        is_label = log_sigmoid(seen.log_odds) >= seen.runner_up_log_prob
        return Statistics(
            torch.where(is_label, slope * torch.sigmoid(-seen.log_odds), 0.0),
            torch.where(is_label, 0.0, slope),
            uniform_cross_entropy=slope,
        )

    @staticmethod
    def _excess(seen: Statistics) -> Tensor:
        """`max_j z_j - mean_j z_j`."""
        assert seen.runner_up_log_prob is not None
        assert seen.uniform_cross_entropy is not None
        largest = torch.maximum(-softplus(-seen.log_odds), seen.runner_up_log_prob)
        return largest + seen.uniform_cross_entropy


# ---- functions of the caller's -----------------------------------------------------------------


class RowStatistics(NamedTuple):
    """What a function of statistics sees, `[n]` each, differentiable; None where not asked for.

    Attributes:
        log_odds: `logit(p_y)` of the label.
        log_prob: `log p_y` of the label.
        runner_up_log_prob: `log max_{j != y} p_j`.
        logsumexp: Of the logits.
        uniform_cross_entropy: `-(mean_j log p_j)` of all V tokens.
        entropy: Of the softmax, in nats.
    """

    log_odds: Tensor
    log_prob: Tensor
    runner_up_log_prob: Tensor | None = None
    logsumexp: Tensor | None = None
    uniform_cross_entropy: Tensor | None = None
    entropy: Tensor | None = None

    @staticmethod
    def of(seen: Statistics) -> RowStatistics:
        """From what the rows gave."""
        return RowStatistics(seen.log_odds, log_sigmoid(seen.log_odds), *seen[1:])


_NEEDS = {
    "log_odds": PLAIN,
    "log_prob": PLAIN,
    "runner_up_log_prob": RowNeeds(runner_up=True),
    "logsumexp": RowNeeds(logsumexp=True),
    "uniform_cross_entropy": RowNeeds(mean=True),
    "entropy": RowNeeds(entropy=True),
}


@dataclasses.dataclass(frozen=True)
class StatisticsFunction:
    """A loss of the caller's, `[n]` numbers from `RowStatistics`; see `of_statistics`.

    Attributes:
        function: The loss.
        needs: What the rows are asked for.
    """

    function: Callable[[RowStatistics], Tensor]
    needs: RowNeeds

    def __call__(self, seen: Statistics) -> Tensor:
        """The losses, `[n]`."""
        return self.function(RowStatistics.of(seen))


def of_statistics(
    *names: str,
) -> Callable[[Callable[[RowStatistics], Tensor]], StatisticsFunction]:
    """Decorator: a differentiable function of a row's statistics, which it names, as an objective.

    Args:
        names: Fields of `RowStatistics`; `log_odds` and `log_prob` are always there.

    Raises:
        ValueError: There is no such statistic.

    Example:
        >>> import torch
        >>> from unilogit_kernels import objective_loss
        >>> @of_statistics("entropy")
        ... def loss(seen):
        ...     return -seen.log_prob - 0.01 * seen.entropy
        >>> objective_loss(torch.randn(4, 100), torch.arange(4), loss).shape
        torch.Size([])
    """
    needs = PLAIN
    for name in names:
        if name not in _NEEDS:
            raise ValueError(f"a row has no statistic {name!r}; it has {', '.join(_NEEDS)}")
        needs = needs.union(_NEEDS[name])
    return lambda function: StatisticsFunction(function, needs)
