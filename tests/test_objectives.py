"""Objectives as functions of the log-odds, against arithmetic of 60 digits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.objectives import Objective

Exact = Callable[[Any, int], tuple[Any, Any]]


def _softplus(x: Any) -> Any:
    return mpmath.log1p(mpmath.exp(x))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def _unilogit(d: Any, v: int) -> tuple[Any, Any]:
    """KL(p || q) as a sum over two outcomes, from the probabilities themselves."""
    p, q = _sigmoid(d), mpmath.mpf(1) / v
    not_p = _sigmoid(-d)
    value = p * mpmath.log(p / q) + not_p * mpmath.log(not_p / (1 - q))
    return value, p * not_p * (d + mpmath.log(v - 1))


def _unilogit_forward(d: Any, v: int) -> tuple[Any, Any]:
    p, q, not_p = _sigmoid(d), mpmath.mpf(1) / v, _sigmoid(-d)
    return q * mpmath.log(q / p) + (1 - q) * mpmath.log((1 - q) / not_p), p - q


EXACT: dict[str, Exact] = {
    "unilogit": _unilogit,
    "unilogit_forward": _unilogit_forward,
    "cross_entropy": lambda d, v: (_softplus(-d), -_sigmoid(-d)),
    "gradient_ascent": lambda d, v: (-_softplus(-d), _sigmoid(-d)),
}


def test_every_objective_has_an_oracle() -> None:
    assert set(EXACT) == set(objectives.REGISTRY)


@pytest.mark.parametrize("name", sorted(EXACT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    d=st.one_of(st.floats(-1e4, 1e4), st.floats(-40, 40), st.floats(-13, -11)),
    v=st.sampled_from([2, 3, 1000, 128_256, 262_144]),
)
def test_value_and_slope(name: str, dtype: torch.dtype, d: float, v: int) -> None:
    """The value to a few ulps of its largest term, the slope to a few ulps of itself."""
    x = torch.tensor(d, dtype=dtype)
    objective = objectives.REGISTRY[name]()
    with mpmath.workdps(60 + int(abs(d))):
        value, slope = EXACT[name](mpmath.mpf(x.item()), v)
        value, slope = float(value), float(slope)
    eps, tiny = torch.finfo(dtype).eps, 1e-37
    u = math.log(v - 1)
    assert abs(objective.value(x, v).item() - value) <= 4 * eps * max(abs(value), 1.0)
    # Where the slope crosses 0, it is a difference of numbers that were rounded already.
    crossing = torch.sigmoid(-x.abs()).item() * max(u, 1.0)
    allowed = 6 * eps * max(abs(slope), crossing if name.startswith("unilogit") else 0.0)
    if name == "unilogit_forward":
        allowed = 4 * eps * max(abs(slope), 1 / v)
    assert abs(objective.slope(x, v).item() - slope) <= allowed + tiny


@pytest.mark.parametrize("name", sorted(EXACT))
def test_autograd_uses_the_slope_and_goes_twice(name: str) -> None:
    objective = objectives.REGISTRY[name]()
    d = torch.linspace(-20, 20, 41, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return objective(x, 500)

    assert torch.equal(torch.autograd.grad(function(d).sum(), d)[0], objective.slope(d, 500))
    assert torch.autograd.gradcheck(function, (d,))
    assert torch.autograd.gradgradcheck(function, (d,))


@pytest.mark.parametrize("name", sorted(EXACT))
@pytest.mark.parametrize("d", [math.inf, -math.inf, math.nan])
def test_infinite_log_odds(name: str, d: float) -> None:
    """Limits, and NaN for NaN."""
    objective, v, x = objectives.REGISTRY[name](), 1000, torch.tensor(d)
    value, slope = objective.value(x, v).item(), objective.slope(x, v).item()
    if math.isnan(d):
        assert math.isnan(value)
        assert math.isnan(slope)
        return
    expected = {
        "unilogit": (math.log(v), 0) if d > 0 else (math.log(v / (v - 1)), 0),
        "unilogit_forward": (math.inf, 1 - 1 / v if d > 0 else -1 / v),
        "cross_entropy": (0, 0) if d > 0 else (math.inf, -1),
        "gradient_ascent": (0, 0) if d > 0 else (-math.inf, 1),
    }[name]
    assert (value, slope) == pytest.approx(expected, rel=1e-6)


def test_slope_by_default_differentiates_the_value() -> None:
    @dataclasses.dataclass(frozen=True)
    class Squared(Objective):
        name: ClassVar[str] = "squared"
        weight: float = 3.0

        def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
            return self.weight * log_odds.square()

    d = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    objective = Squared()
    assert objective.parameters() == [3.0]
    assert torch.equal(objective.slope(d.detach(), 10), 6 * d.detach())
    assert torch.autograd.gradgradcheck(lambda x: objective(x, 10), (d,))
    assert not objectives.is_registered(objective)


def test_registering_a_taken_name_is_an_error() -> None:
    class Impostor(Objective):
        name = "unilogit"

    with pytest.raises(ValueError, match="'unilogit' is already taken"):
        objectives.register(Impostor)
    assert objectives.REGISTRY["unilogit"] is objectives.UnilogitReverse
