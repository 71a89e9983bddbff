"""What becomes of a teacher's label entry: closed forms on its log-odds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from unilogit_kernels.maths.elementwise import uniform_log_odds


@dataclass(frozen=True)
class Rewrite:
    """What becomes of the teacher's label entry; the other tokens keep their proportions."""

    name: ClassVar[str] = "none"

    def log_odds(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """The label's log-odds after the rewrite, of those before; NaN stays NaN."""
        return log_odds

    def at_temperature(self, temperature: float) -> Rewrite:
        """The same rewrite of logits that have been divided by `temperature`."""
        return self

    def parameters(self) -> list[float]:
        """The values of the fields, in order."""
        return [float(getattr(self, field.name)) for field in fields(self)]


@dataclass(frozen=True)
class Shift(Rewrite):
    """Lower the label's logit by `gamma`: the target of UnDIAL (arXiv 2402.10052).

    Attributes:
        gamma: In logits, before any temperature; the larger, the less probable the label.

    Example:
        >>> Shift(10.0).parameters()
        [10.0]
    """

    gamma: float
    name: ClassVar[str] = "shift"

    def log_odds(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`d - gamma`."""
        return log_odds - self.gamma

    def at_temperature(self, temperature: float) -> Shift:
        """The shift is one of the logits, so that the temperature divides it."""
        return Shift(self.gamma / temperature)


@dataclass(frozen=True)
class Uniform(Rewrite):
    """Give the label probability `1/V`: Unilogit's target (arXiv 2505.06027) from another model.

    Example:
        >>> import torch
        >>> torch.sigmoid(Uniform().log_odds(torch.tensor([9.0]), vocab_size=4))
        tensor([0.2500])
    """

    name: ClassVar[str] = "uniform"

    def log_odds(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`-log(V - 1)`."""
        return torch.where(log_odds.isnan(), log_odds, uniform_log_odds(vocab_size))


@dataclass(frozen=True)
class Mask(Rewrite):
    """Give the label probability 0. For the forward direction: the reverse KL is infinite.

    Example:
        >>> import torch
        >>> torch.sigmoid(Mask().log_odds(torch.tensor([9.0]), vocab_size=4))
        tensor([0.])
    """

    name: ClassVar[str] = "mask"

    def log_odds(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`-inf`."""
        return torch.where(log_odds.isnan(), log_odds, -math.inf)


REWRITES: dict[str, type[Rewrite]] = {cls.name: cls for cls in (Rewrite, Shift, Uniform, Mask)}
