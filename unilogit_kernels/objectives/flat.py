"""FLAT: losses of sequences by f-divergences between refusals and answers."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from unilogit_kernels.objectives.base import register
from unilogit_kernels.objectives.sequence import SequenceObjective
from unilogit_kernels.objectives.token import Probability, log_sigmoid


class _FLATBase(SequenceObjective):
    """FLAT (arXiv 2410.11143): `-g(P(template)) + f*(g(P(forget)))`, `P` the mean probability.

    The paper's f-divergence losses, which differ in the variational function `g` and the conjugate
    `f*` (its table of f-divergences). Template answers come first in the batch, forget answers
    second. The authors' code averages p over padding as well; this is the paper's mean over the
    answer's tokens.
    """

    members: ClassVar[int] = 2

    def tokens(self, log_odds: Tensor) -> Tensor:
        """The probability of each token."""
        return Probability()(log_odds, 0)

    def token_slopes(self, log_odds: Tensor) -> Tensor:
        """`p (1 - p)`."""
        return Probability().slope(log_odds, 0)

    def losses(self, sums: Tensor, counts: Tensor) -> Tensor:
        """See `SequenceObjective.losses`."""
        template, forget = (sums / counts.clamp(min=1)).chunk(2)
        return self.conjugate(forget) - self.variational(template)

    def derivatives(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Those of `-g` for templates and of `f*(g)` for forget answers, over their lengths."""
        lengths = counts.clamp(min=1)
        template, forget = (sums / lengths).chunk(2)
        slopes = torch.cat((-self.variational_slope(template), self.conjugate_slope(forget)))
        return slopes / lengths

    def variational(self, x: Tensor) -> Tensor:
        """`g(x)`."""
        raise NotImplementedError

    def variational_slope(self, x: Tensor) -> Tensor:
        """`g'(x)`."""
        raise NotImplementedError

    def conjugate(self, x: Tensor) -> Tensor:
        """`f*(g(x))`."""
        raise NotImplementedError

    def conjugate_slope(self, x: Tensor) -> Tensor:
        """The derivative of `f*(g(x))`."""
        raise NotImplementedError


@register
@dataclasses.dataclass(frozen=True, eq=False)
class FLAT(_FLATBase):
    """FLAT with the total variation, the authors' default: `g = tanh(x) / 2`, `f*(g) = g`."""

    name: ClassVar[str] = "flat"

    def variational(self, x: Tensor) -> Tensor:
        """`tanh(x) / 2`."""
        return torch.tanh(x) / 2

    def variational_slope(self, x: Tensor) -> Tensor:
        """`(1 - tanh(x)^2) / 2`."""
        return (1 - torch.tanh(x).square()) / 2

    def conjugate(self, x: Tensor) -> Tensor:
        """`tanh(x) / 2`."""
        return torch.tanh(x) / 2

    def conjugate_slope(self, x: Tensor) -> Tensor:
        """`(1 - tanh(x)^2) / 2`."""
        return self.variational_slope(x)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class FLATKL(_FLATBase):
    """FLAT with the KL divergence: `g = x`, `f*(g) = exp(x - 1)`."""

    name: ClassVar[str] = "flat_kl"

    def variational(self, x: Tensor) -> Tensor:
        """`x`."""
        return x

    def variational_slope(self, x: Tensor) -> Tensor:
        """`1`."""
        return torch.ones_like(x)

    def conjugate(self, x: Tensor) -> Tensor:
        """`exp(x - 1)`."""
        return torch.exp(x - 1)

    def conjugate_slope(self, x: Tensor) -> Tensor:
        """`exp(x - 1)`."""
        return torch.exp(x - 1)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class FLATJensenShannon(_FLATBase):
    """FLAT with the Jensen-Shannon divergence.

    `g = log 2 - log(1 + e^-x)`, and `f*(u) = -log(2 - e^u)`, which is `log(1 + e^-x) + x - log 2`
    at `u = g(x)`.
    """

    name: ClassVar[str] = "flat_js"

    def variational(self, x: Tensor) -> Tensor:
        """`log 2 + log sigmoid(x)`."""
        return math.log(2) + log_sigmoid(x)

    def variational_slope(self, x: Tensor) -> Tensor:
        """`sigmoid(-x)`."""
        return torch.sigmoid(-x)

    def conjugate(self, x: Tensor) -> Tensor:
        """`x - log 2 - log sigmoid(x)`."""
        return x - math.log(2) - log_sigmoid(x)

    def conjugate_slope(self, x: Tensor) -> Tensor:
        """`sigmoid(x)`."""
        return torch.sigmoid(x)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class FLATPearson(_FLATBase):
    """FLAT with Pearson's chi-squared divergence: `g = x`, `f*(g) = x^2 / 4 + x`."""

    name: ClassVar[str] = "flat_pearson"

    def variational(self, x: Tensor) -> Tensor:
        """`x`."""
        return x

    def variational_slope(self, x: Tensor) -> Tensor:
        """`1`."""
        return torch.ones_like(x)

    def conjugate(self, x: Tensor) -> Tensor:
        """`x^2 / 4 + x`."""
        return x.square() / 4 + x

    def conjugate_slope(self, x: Tensor) -> Tensor:
        """`x / 2 + 1`."""
        return x / 2 + 1
