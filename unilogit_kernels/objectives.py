"""Losses that see a token only through its own probability, as functions of its log-odds.

With `d = logit(p_y)` the log-odds of the label, `p_y = sigmoid(d)`, `log p_y = -softplus(-d)` and
`log(1 - p_y) = -softplus(d)`. An objective is a value `f(d)` and its slope `f'(d)`; the kernels
compute `d` and turn a slope into a gradient row, and know nothing else of the loss. A new loss is
a subclass of `Objective` with a `value`, and a `slope` where automatic differentiation of the value
would lose digits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, accurate for every x in float32 and float64; NaN and infinities pass.

    `torch.nn.functional.softplus` returns `x` above 20, which float64 can tell apart.
    """
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A per-token loss `f(d)` of the log-odds `d`.

    Call an instance with log-odds of any shape for a differentiable value. Subclasses are frozen
    dataclasses; their fields are float parameters.

    Example:
        >>> import torch
        >>> d = torch.tensor([0.0, 5.0], requires_grad=True)
        >>> UnilogitReverse()(d, vocab_size=100).sum().backward()
        >>> bool((d.grad > 0).all())
        True
    """

    name: ClassVar[str]

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`f(d)`, elementwise, in the dtype of `log_odds`."""
        raise NotImplementedError

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`f'(d)`, elementwise. The default differentiates `value`."""
        with torch.enable_grad():
            x = log_odds if log_odds.requires_grad else log_odds.detach().requires_grad_()
            total = self.value(x, vocab_size).sum()
            create_graph = log_odds.requires_grad
            return torch.autograd.grad(total, x, create_graph=create_graph)[0]

    def parameters(self) -> list[float]:
        """The values of the dataclass fields, in order."""
        return [float(getattr(self, field.name)) for field in dataclasses.fields(self)]

    def __call__(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`f(d)` with `f'(d)` as its derivative; differentiable twice where `slope` is once."""
        result: Tensor = _ValueWithSlope.apply(log_odds, self, vocab_size)
        return result


class _ValueWithSlope(torch.autograd.Function):
    """Pairs a value with its own slope formula, since differentiating the value loses digits."""

    @staticmethod
    def forward(ctx: Any, log_odds: Tensor, objective: Objective, vocab_size: int) -> Tensor:
        ctx.save_for_backward(log_odds)
        ctx.objective, ctx.vocab_size = objective, vocab_size
        return objective.value(log_odds, vocab_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (log_odds,) = ctx.saved_tensors
        return grad * ctx.objective.slope(log_odds, ctx.vocab_size), None, None


REGISTRY: dict[str, type[Objective]] = {}
"""Objectives by name. The fused losses can compute these with the gradient in the forward pass."""

_ObjectiveType = TypeVar("_ObjectiveType", bound=type[Objective])


def register(cls: _ObjectiveType) -> _ObjectiveType:
    """Class decorator: make an objective available by its `name`, and to the fused losses.

    Raises:
        ValueError: The name is taken by another class.
    """
    if REGISTRY.setdefault(cls.name, cls) is not cls:
        raise ValueError(f"objective name {cls.name!r} is already taken by {REGISTRY[cls.name]}")
    return cls


def resolve(
    objective: str | Objective | Callable[[Tensor], Tensor],
) -> Objective | Callable[[Tensor], Tensor]:
    """Turn what a user may pass as `objective` into an instance, or leave a callable as it is.

    Raises:
        ValueError: Unknown name.
        TypeError: Neither a name, an instance nor a callable.
    """
    if isinstance(objective, str):
        if objective not in REGISTRY:
            known = ", ".join(sorted(REGISTRY))
            raise ValueError(f"objective {objective!r} is unknown; expected one of: {known}")
        return REGISTRY[objective]()
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(
            "objective must be a name, an Objective instance or a function of the log-odds, "
            f"got {objective!r}"
        )
    return objective


def is_registered(objective: object) -> TypeGuard[Objective]:
    """Whether the fused losses know this objective by name, so that they can rebuild it."""
    return isinstance(objective, Objective) and REGISTRY.get(objective.name) is type(objective)


def uniform_log_odds(vocab_size: int) -> float:
    """`u = -log(V - 1)`: the log-odds of a token that has probability `1/V`."""
    return -math.log(vocab_size - 1)


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
        tail = torch.sigmoid(-d.abs())
        log1p_term = torch.log1p(torch.exp(-d.abs()))
        below = tail * (d - u) - log1p_term + softplus_u
        above = (softplus_u - u) - tail * (d - u) - log1p_term
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
class CrossEntropy(Objective):
    """`-log p_y = softplus(-d)`: the usual language-modelling loss, for retain data."""

    name: ClassVar[str] = "cross_entropy"

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`softplus(-d)` in nats."""
        return softplus(-log_odds)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`-sigmoid(-d) = p_y - 1`."""
        return -torch.sigmoid(-log_odds)


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
