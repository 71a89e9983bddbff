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

from tests.support import literal
from tests.support.roundings import assert_rounded
from unilogit_kernels import objective_loss, objectives
from unilogit_kernels.maths.statistics import Statistics
from unilogit_kernels.objectives import TNPO, LoKU, Mixture, Objective, SequenceObjective
from unilogit_kernels.testing import assert_sum_within_budget, assert_within_budget

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


def _self_undial(d: Any, v: int) -> tuple[Any, Any]:
    q, not_q, p, not_p = _sigmoid(d - 10), _sigmoid(10 - d), _sigmoid(d), _sigmoid(-d)
    return q * mpmath.log(q / p) + not_q * mpmath.log(not_q / not_p), p - q


def _weighted(alpha: int, beta: int) -> Exact:
    """`w log p` and its slope with a constant weight, `w = p^alpha (1-p)^beta`."""

    def exact(d: Any, v: int) -> tuple[Any, Any]:
        weight = _sigmoid(d) ** alpha * _sigmoid(-d) ** beta
        return -weight * _softplus(-d), weight * _sigmoid(-d)

    return exact


EXACT: dict[str, Exact] = {
    "unilogit": _unilogit,
    "unilogit_forward": _unilogit_forward,
    "cross_entropy": lambda d, v: (_softplus(-d), -_sigmoid(-d)),
    "gradient_ascent": lambda d, v: (-_softplus(-d), _sigmoid(-d)),
    "ceu": lambda d, v: (_softplus(d), _sigmoid(d)),
    "probability": lambda d, v: (_sigmoid(d), _sigmoid(d) * _sigmoid(-d)),
    "self_undial": _self_undial,
    "wga": _weighted(1, 0),
    "satimp": _weighted(5, 1),
}

# Powers of p and an offset of d magnify the rounding of what is exponentiated: in the dtype for
# the offset, in float64 for powers.
CONDITION: dict[str, Callable[[float], float]] = {
    "self_undial": lambda d: 1 + abs(d),
    "wga": lambda d: 1 + abs(d),
    "satimp": lambda d: 1 + 6 * abs(d),
}
STOPPED = {"wga", "satimp", "self_undial"}
"""Objectives whose slope is not the derivative of their value: a gradient is stopped."""


def test_every_objective_has_an_oracle() -> None:
    of_sequences = {
        name for name, cls in objectives.REGISTRY.items() if issubclass(cls, SequenceObjective)
    }
    of_rows = {"loku", "max_entropy", "entropy", "pdu"}
    assert set(EXACT) | of_sequences | of_rows | {"tnpo"} == set(objectives.REGISTRY)
    assert set(EXACT) | of_rows == set(literal.TOKEN)


@pytest.mark.parametrize("name", sorted(EXACT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    d=st.one_of(st.floats(-1e4, 1e4), st.floats(-40, 40), st.floats(-13, -11)),
    v=st.sampled_from([2, 3, 1000, 128_256, 262_144]),
)
def test_value_and_slope(name: str, dtype: torch.dtype, d: float, v: int) -> None:
    """The value to a few ulps of its largest term, the slope to a few ulps of itself."""
    x = torch.tensor(d, dtype=dtype)
    objective = objectives.REGISTRY[name]()
    # Enough to tell 1 - p from 1: e^-|d| has |d| / 2.3 zeros.
    with mpmath.workdps(60 + int(abs(d) / 2.3)):
        value, slope = EXACT[name](mpmath.mpf(x.item()), v)
        value, slope = float(value), float(slope)
    eps, tiny = torch.finfo(dtype).eps, 1e-37
    u = math.log(v - 1)
    assert abs(objective.value(x, v).item() - value) <= 4 * eps * max(abs(value), 1.0)
    # Where the slope crosses 0, it is a difference of numbers that were rounded already.
    crossing = torch.sigmoid(-x.abs()).item() * max(u, 1.0)
    allowed = 6 * eps * max(abs(slope), crossing if name.startswith("unilogit") else 0.0)
    if name == "self_undial" or dtype == torch.float64:
        allowed *= CONDITION.get(name, lambda d: 1.0)(x.item())
    if name == "unilogit_forward":
        allowed = 4 * eps * max(abs(slope), 1 / v)
    assert abs(objective.slope(x, v).item() - slope) <= allowed + tiny


@settings(max_examples=100, deadline=None, derandomize=True)
@given(d=st.floats(-100, 100), rest=st.floats(-100, 0))
def test_loku(d: float, rest: float) -> None:
    """The value to a few ulps of the probabilities, each slope to a few ulps of itself.

    `rest` is the logarithm of the runner-up's share of what the label leaves.
    """
    x = torch.tensor(d)
    log_prob = torch.tensor(rest) - objectives.softplus(x)
    seen = Statistics(x, log_prob)
    with mpmath.workdps(120):
        p, m = 1 / (1 + mpmath.exp(-x.item())), mpmath.exp(log_prob.item())
        value, by_d = float(p + (1 - m)), float(p * (1 - p))
        relative = 4 * torch.finfo(torch.float32).eps * (1 + abs(log_prob.item()))
        assert abs(LoKU().evaluate(seen, 9).item() - value) <= relative * value + 1e-37
        slope = LoKU().differentiate(seen, 9)
        assert slope.runner_up_log_prob is not None
        assert abs(slope.log_odds.item() - by_d) <= relative * by_d + 1e-37
        assert abs(slope.runner_up_log_prob.item() + float(m)) <= relative * float(m) + 1e-37


@pytest.mark.parametrize("name", sorted(EXACT))
def test_autograd_uses_the_slope_and_goes_twice(name: str) -> None:
    objective = objectives.REGISTRY[name]()
    d = torch.linspace(-20, 20, 41, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return objective(x, 500)

    assert torch.equal(torch.autograd.grad(function(d).sum(), d)[0], objective.slope(d, 500))
    if name not in STOPPED:
        assert torch.autograd.gradcheck(function, (d,))
        assert torch.autograd.gradgradcheck(function, (d,))
    (slope,) = torch.autograd.grad(function(d).sum(), d, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), d)
    h = 1e-5
    difference = (objective.slope(d.detach() + h, 500) - objective.slope(d.detach() - h, 500)) / 2
    assert torch.allclose(second, difference / h, rtol=1e-6, atol=1e-8)


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
        "ceu": (math.inf, 1) if d > 0 else (0, 0),
        "probability": (1, 0) if d > 0 else (0, 0),
        "self_undial": (0, 0),
        "wga": (0, 0),
        "satimp": (0, 0),
    }[name]
    assert_rounded(torch.tensor([value, slope]), torch.tensor(expected, dtype=torch.float64))


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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    d=st.floats(-100, 40),
    start=st.floats(-100, 0),
    beta=st.sampled_from([0.1, 1.0, 4.5]),
    alpha=st.sampled_from([0.0, 1.0]),
)
def test_tnpo(d: float, start: float, beta: float, alpha: float) -> None:
    x, reference = torch.tensor([d]), torch.tensor([start])
    objective = TNPO(reference=reference, beta=beta, alpha=alpha)
    with mpmath.workdps(80):
        p = _sigmoid(mpmath.mpf(x.item()))
        start_p = mpmath.exp(mpmath.mpf(reference.item()))
        weight = 2 * p ** (beta + alpha) / (p**beta + start_p**beta)
        value, slope = float(weight * mpmath.log(p)), float(weight * (1 - p))
    allowed = 4 * torch.finfo(torch.float32).eps
    assert abs(objective.value(x, 10).item() - value) <= allowed * abs(value) + 1e-37
    assert abs(objective.slope(x, 10).item() - slope) <= allowed * abs(slope) + 1e-37


@dataclasses.dataclass(frozen=True)
class Focal(Objective):
    """What a user writes: a value alone."""

    name: ClassVar[str] = "focal_of_a_test"
    gamma: float = 2.0

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        return torch.sigmoid(-log_odds) ** self.gamma * torch.nn.functional.softplus(-log_odds)


def test_a_registered_objective_without_a_slope_runs_fused(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slope is differentiated inside the operator, where autograd is off."""
    monkeypatch.setitem(objectives.REGISTRY, Focal.name, Focal)
    logits, labels = torch.randn(4, 60, requires_grad=True), torch.arange(4)

    def literal(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = logits.detach().to(dtype).requires_grad_()
        p = torch.softmax(x, -1).gather(1, labels[:, None])[:, 0]
        terms = (1 - p) ** 3 * -p.log() / len(p)
        return terms, torch.autograd.grad(terms.sum(), x)[0]

    exact, plain = literal(torch.float64), literal(torch.float32)
    loss = objective_loss(logits, labels, Focal(gamma=3.0), backend=backend)
    assert_sum_within_budget(loss, exact[0], plain[0])
    assert_within_budget(torch.autograd.grad(loss, logits)[0], exact[1], plain[1])


def test_pack_and_unpack() -> None:
    tnpo = TNPO(reference=torch.randn(3), beta=0.3)
    npo = objectives.NPO(reference=torch.randn(1)).placed(torch.ones(1, 3, dtype=torch.bool))
    segments = torch.tensor([0, 1, 2])
    mixture = Mixture((tnpo, objectives.WGA(alpha=2.0), npo), segments)
    d = torch.randn(3)
    hinge = Mixture((tnpo, LoKU()), torch.tensor([0, 1, 1]))
    for objective in (tnpo, objectives.SatImp(), npo, mixture, Mixture((tnpo,), segments), hinge):
        again = objectives.unpack(*objectives.pack(objective))
        assert type(again) is type(objective)
        seen = Statistics(d, -d.abs())
        assert torch.equal(again.evaluate(seen, 10), objective.evaluate(seen, 10))
        for one, two in zip(
            again.differentiate(seen, 10), objective.differentiate(seen, 10), strict=True
        ):
            assert (one is None) == (two is None)
            assert one is None or two is None or torch.equal(one, two)


def test_names_and_parameters() -> None:
    assert objectives.by_name("wga", alpha=3.0) == objectives.WGA(alpha=3.0)
    assert objectives.parameter_names("npo") == ["beta"]
    for name, parameters, message in [
        ("forgetting", {}, "objective 'forgetting' is unknown; expected one of: ceu, cross"),
        ("wga", {"beta": 1.0}, "objective 'wga' has no parameter 'beta'; it has alpha"),
        ("ceu", {"beta": 1.0}, "it has none"),
        ("npo", {}, r"objective 'npo' needs tensors: pass objectives.NPO\(reference=...\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            objectives.by_name(name, **parameters)
