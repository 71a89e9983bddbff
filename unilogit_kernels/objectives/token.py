"""Losses of one token's own probability, as functions of its log-odds.

A new one is a subclass of `Objective` with a `value`, and a `slope` where automatic differentiation
of the value would lose digits, or where a paper stops a gradient.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from unilogit_kernels.maths.elementwise import softplus, uniform_log_odds
from unilogit_kernels.objectives.base import Objective, per_token, register

# Beyond this, sigmoid(-|d|) is 0 in float64 as well; it keeps 0 * inf out of bounded values.
_SATURATED = 1e4


@register
@dataclasses.dataclass(frozen=True)
class UnilogitReverse(Objective):
    """Unilogit, KL(p || q): the paper's loss (arXiv 2505.06027).

    The target q gives the label `1/V` and keeps the proportions of the rest, so the KL over V
    entries is a KL over two: with `u = -log(V-1)` and `delta = d - u`,
    `f = sigmoid(d) * delta - softplus(d) + softplus(u)`, `f' = sigmoid(d) * sigmoid(-d) * delta`.
    Bounded: 0 at `p = 1/V`, `log V` at `p = 1`, `log(V / (V-1))` at `p = 0`.
    """

    name: ClassVar[str] = "unilogit"

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`f(d)` in nats, >= 0; written separately for each sign of d so that nothing cancels."""
        u = uniform_log_odds(vocab_size)
        softplus_u = math.log1p(1 / (vocab_size - 1))
        d = log_odds.clamp(-2 * _SATURATED, 2 * _SATURATED)
        smaller = -d.abs()
        tilt = torch.sigmoid(smaller) * (d - u)
        log1p_term = torch.log1p(torch.exp(smaller))
        below = tilt - log1p_term + softplus_u
        above = (softplus_u - u) - tilt - log1p_term
        return torch.where(d > 0, above, below).clamp(min=0)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`sigmoid(d) * sigmoid(-d) * (d - u)`."""
        d = log_odds.clamp(-2 * _SATURATED, 2 * _SATURATED)
        return torch.sigmoid(d) * torch.sigmoid(-d) * (d - uniform_log_odds(vocab_size))


@register
@dataclasses.dataclass(frozen=True)
class UnilogitForward(Objective):
    """Unilogit with the other direction, KL(q || p); q as in `UnilogitReverse`.

    `f = softplus(d) - softplus(u) - sigmoid(u) * delta`, `f' = sigmoid(d) - sigmoid(u)`, where
    `sigmoid(u) = 1/V`. Unbounded as `p -> 1`, as cross-entropy is as `p -> 0`.
    """

    name: ClassVar[str] = "unilogit_forward"

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`f(d)` in nats, >= 0."""
        u = uniform_log_odds(vocab_size)
        constant = u / vocab_size - math.log1p(1 / (vocab_size - 1))
        d = log_odds
        log1p_term = torch.log1p(torch.exp(-d.abs()))
        linear = torch.where(d > 0, (1 - 1 / vocab_size) * d, -d / vocab_size)
        return (linear + (log1p_term + constant)).clamp(min=0)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`sigmoid(d) - 1/V`."""
        return torch.sigmoid(log_odds) - 1 / vocab_size


@register
@dataclasses.dataclass(frozen=True)
class GradientAscent(Objective):
    """`log p_y = -softplus(-d)`: minimising it is gradient ascent on the likelihood. Unbounded."""

    name: ClassVar[str] = "gradient_ascent"

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`-softplus(-d)` in nats."""
        return -softplus(-log_odds)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`sigmoid(-d) = 1 - p_y`."""
        return torch.sigmoid(-log_odds)


def log_sigmoid(x: Tensor) -> Tensor:
    """`log sigmoid(x)` with the slope `sigmoid(-x)`: accurate in both tails, and at 0."""
    return GradientAscent()(x, 0)


@register
@dataclasses.dataclass(frozen=True)
class CEU(Objective):
    """CE-U, cross-entropy unlearning (arXiv 2503.01224): `-log(1 - p_y) = softplus(d)`.

    The paper's target is the model's own distribution without the label, and its gradient is
    stopped. Off the label both have the same proportions, so KL(target || p) is this; the paper's
    cross-entropy is larger by the target's entropy, which has no gradient. Unbounded as `p -> 1`.
    """

    name: ClassVar[str] = "ceu"

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`softplus(d)` in nats."""
        return softplus(log_odds)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`sigmoid(d) = p_y`."""
        return torch.sigmoid(log_odds)


@register
@dataclasses.dataclass(frozen=True)
class Probability(Objective):
    """`p_y = sigmoid(d)`: minimising it is a bounded gradient ascent, weighted by p_y.

    To first order, what FLAT (arXiv 2410.11143) does to a forget answer.
    """

    name: ClassVar[str] = "probability"

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`sigmoid(d)`."""
        return torch.sigmoid(log_odds)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`sigmoid(d) * sigmoid(-d) = p_y (1 - p_y)`."""
        return torch.sigmoid(log_odds) * torch.sigmoid(-log_odds)


def _power(log_probability: Tensor, exponent: float) -> Tensor:
    """`p^exponent`, with `0^0 = 1`."""
    if exponent == 0:
        return torch.ones_like(log_probability)
    return torch.exp(exponent * log_probability)


class _WeightedAscent(Objective):
    """`w(p_y) log p_y` with the weight's gradient stopped: `f' = w (1 - p_y)`.

    In float64: a power of p_y is an exponential, which magnifies the rounding of its argument.
    """

    def weight(self, log_odds: Tensor) -> Tensor:
        """`w`, elementwise."""
        raise NotImplementedError

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`-w * softplus(-d)`; 0 where the weight is 0."""
        d = log_odds.double()
        weight = self.weight(d)
        return torch.where(weight == 0, 0.0, -weight * softplus(-d)).to(log_odds.dtype)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`w * sigmoid(-d)`."""
        d = log_odds.double()
        return (self.weight(d) * torch.sigmoid(-d)).to(log_odds.dtype)


@register
@dataclasses.dataclass(frozen=True)
class WGA(_WeightedAscent):
    """Weighted gradient ascent (arXiv 2502.19301): `p_y^alpha log p_y`, the weight detached.

    Attributes:
        alpha: The paper's inverse-confidence exponent; 0 is gradient ascent. OpenUnlearning calls
            it beta and sets 1.
    """

    name: ClassVar[str] = "wga"
    alpha: float = 1.0

    def weight(self, log_odds: Tensor) -> Tensor:
        """`p_y^alpha`."""
        return _power(log_sigmoid(log_odds), self.alpha)


@register
@dataclasses.dataclass(frozen=True)
class SatImp(_WeightedAscent):
    """SatImp (arXiv 2505.11953): `p_y^beta1 (1 - p_y)^beta2 log p_y`, the weight detached.

    The defaults are OpenUnlearning's `configs/trainer/SatImp.yaml`.

    Attributes:
        beta1: Exponent of the saturation weight.
        beta2: Exponent of the importance weight.
    """

    name: ClassVar[str] = "satimp"
    beta1: float = 5.0
    beta2: float = 1.0

    def weight(self, log_odds: Tensor) -> Tensor:
        """`p_y^beta1 (1 - p_y)^beta2`."""
        return _power(log_sigmoid(log_odds), self.beta1) * _power(
            log_sigmoid(-log_odds), self.beta2
        )


@register
@dataclasses.dataclass(frozen=True)
class SelfUnDIAL(Objective):
    """UnDIAL (arXiv 2402.10052) with the model itself as teacher: the label's logit less gamma.

    The target q has log-odds `d - gamma`, its gradient stopped, and the proportions of the rest;
    KL(q || p) is one over two outcomes. The paper's cross-entropy is larger by q's entropy. With
    the starting model as teacher it is no function of d.

    Attributes:
        gamma: How far the target's logit is lowered. OpenUnlearning calls it beta and sets 10.
    """

    name: ClassVar[str] = "self_undial"
    gamma: float = 10.0

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`KL(q || p)` in nats, >= 0."""
        d = log_odds.clamp(-2 * _SATURATED, 2 * _SATURATED)
        t = d - self.gamma
        at_label = torch.sigmoid(t) * (softplus(-d) - softplus(-t))
        elsewhere = torch.sigmoid(-t) * (softplus(d) - softplus(t))
        return (at_label + elsewhere).clamp(min=0)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`sigmoid(d) - sigmoid(d - gamma)`, as a product in which nothing cancels."""
        difference = -math.expm1(-self.gamma)
        return difference * torch.sigmoid(log_odds) * torch.sigmoid(self.gamma - log_odds)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class TNPO(_WeightedAscent):
    """Token-wise NPO, and WTNPO (arXiv 2502.19301): `w log p_y`, the weight detached.

    `w = 2 p_y^(beta + alpha) / (p_y^beta + p_ref^beta)`. The authors' code adds 1e-5 to the
    denominator, which matters where both probabilities are tiny; this does not.

    Attributes:
        reference: `log p_ref` of each token under the starting model, in the labels' shape.
        beta: As NPO's inverse temperature.
        alpha: WTNPO's exponent of WGA's weight; 0 is TNPO.
    """

    name: ClassVar[str] = "tnpo"
    reference: Tensor = per_token()
    beta: float = 0.1
    alpha: float = 0.0

    def weight(self, log_odds: Tensor) -> Tensor:
        """`2 sigmoid(beta (log p_y - log p_ref)) p_y^alpha`."""
        log_p = log_sigmoid(log_odds)
        ratio = torch.sigmoid(self.beta * (log_p - self.reference))
        return 2 * ratio * _power(log_p, self.alpha)
