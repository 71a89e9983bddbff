"""Loss and gradients against float64, on every backend, through both entries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.problems import OBJECTIVES, TRANSFORMS, check, linear_problem, logits_problem
from unilogit_kernels import linear_unilogit_loss, reference, target_log_odds, unilogit_loss
from unilogit_kernels.testing import HardRow, assert_within_budget, hard_rows

# Smallest normal float32: below it, units flush to zero or not as they like.
TINY = torch.finfo(torch.float32).tiny
ODD_SIZES = [(1, 2), (3, 7), (5, 501), (2, 4099), (9, 128)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_logits(backend: str, dtype: torch.dtype, objective: str, options: dict[str, Any]) -> None:
    check(logits_problem(11, 503, dtype, objective, **options), backend)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_linear(backend: str, dtype: torch.dtype, objective: str, options: dict[str, Any]) -> None:
    check(linear_problem(11, 24, 503, dtype, objective, bias=True, **options), backend)


@pytest.mark.parametrize(("n", "v"), ODD_SIZES)
def test_odd_sizes(backend: str, dtype: torch.dtype, n: int, v: int) -> None:
    check(logits_problem(n, v, dtype), backend)
    check(linear_problem(n, 5, v, dtype), backend)


@pytest.mark.parametrize("v", [50_257, 262_147])
def test_long_rows(backend: str, dtype: torch.dtype, v: int) -> None:
    check(logits_problem(2, v, dtype), backend)


@pytest.mark.parametrize("v", [262_147, 1 << 19])
def test_sum_over_a_long_row_is_exact(backend: str, v: int) -> None:
    """V equal logits: the rest sums to V - 1, so d = -log(V - 1) and the loss is 0."""
    labels = torch.tensor([0, v - 1, 4097])
    d = target_log_odds(torch.full((3, v), 7.0), labels, backend=backend)
    exact = torch.full((3,), -math.log(v - 1), dtype=torch.float64)
    assert_within_budget(d, exact, exact.float())


@pytest.mark.parametrize("d", [-1e4, -100.0, -30.0, -5.0, 5.0, 13.8, 20.0, 34.0, 60.0, 100.0, 1e4])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_extreme_log_odds(backend: str, d: float, direction: str) -> None:
    """Where 1 - p_y has lost all its digits, loss and gradient have not.

    The literal eager loss is no yardstick here, since it returns NaN: the error is held to that of
    rounding the inputs, a few ulps of d, through the exact slope.
    """
    v = 1000
    logits = torch.linspace(-1, 1, v)[None].clone()
    rest = torch.logsumexp(logits[0, 1:].double(), 0)
    logits[0, 0] = float(d + rest)
    exact_d = logits[0, 0].double() - rest
    exact_d.requires_grad_()
    x = logits.requires_grad_()
    loss = unilogit_loss(x, torch.tensor([0]), direction=direction, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x)
    u = -math.log(v - 1)
    p, not_p = torch.sigmoid(exact_d), torch.sigmoid(-exact_d)
    softplus = -torch.nn.functional.logsigmoid(-exact_d)
    softplus_u = math.log1p(1 / (v - 1))
    if direction == "reverse":
        cut = -torch.nn.functional.logsigmoid(exact_d)
        above = -u - not_p * (exact_d - u) - cut + softplus_u
        below = p * (exact_d - u) - softplus + softplus_u
        exact = above if d > 0 else below
        slope = p * not_p * (exact_d - u)
    else:
        exact = softplus - softplus_u - (exact_d - u) / v
        slope = p - 1 / v
    conditioning = 8 * torch.finfo(torch.float32).eps * (1 + abs(d))
    assert abs(loss.item() - exact.item()) <= conditioning * max(abs(slope.item()), exact.item())
    assert abs(gradient[0, 0].item() - slope.item()) <= conditioning * abs(slope.item()) + TINY
    rest_gradient = -slope * torch.softmax(logits[0, 1:].double(), 0)
    error = (gradient[0, 1:].double() - rest_gradient).abs().max()
    assert error <= conditioning * rest_gradient.abs().max() + TINY


def test_loss_is_never_negative(backend: str) -> None:
    """Around p_y = 1/V the loss is smaller than the rounding of its terms."""
    logits = torch.zeros(2001, 1000)
    logits[:, 5] = torch.linspace(-1e-3, 1e-3, 2001)
    labels = torch.full((2001,), 5)
    for direction in ("reverse", "forward"):
        loss = unilogit_loss(logits, labels, direction=direction, reduction="none", backend=backend)
        assert (loss >= 0).all()
        assert loss.max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6, 1e8])
def test_common_offset(backend: str, offset: float) -> None:
    """A common offset changes d by the rounding of the inputs alone."""
    shifted = torch.randn(5, 700) * 3 + offset
    labels = torch.randint(0, 700, (5,))
    exact = target_log_odds(shifted.double() - offset, labels)
    plain = reference.target_log_odds(shifted, labels)
    d = target_log_odds(shifted, labels, backend=backend)
    assert_within_budget(d, exact, plain)
    exact_gradient = _gradient(shifted.double() - offset, labels, "eager")
    gradient = _gradient(shifted, labels, backend)
    literal = shifted.clone().requires_grad_()
    (plain_gradient,) = torch.autograd.grad(reference.unilogit_loss(literal, labels), literal)
    assert_within_budget(gradient, exact_gradient, plain_gradient)


def _gradient(logits: torch.Tensor, labels: torch.Tensor, backend: str) -> torch.Tensor:
    x = logits.clone().requires_grad_()
    return torch.autograd.grad(unilogit_loss(x, labels, backend=backend), x)[0]


@pytest.mark.parametrize("row", hard_rows(), ids=lambda row: row.name)
@pytest.mark.parametrize("vocab_size", [37, 5000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hard_rows(backend: str, row: HardRow, vocab_size: int, reduction: str) -> None:
    """The row between two ordinary ones, which it must not disturb."""
    row = next(r for r in hard_rows(vocab_size) if r.name == row.name)
    logits = torch.randn(3, vocab_size)
    logits[1] = row.logits
    logits.requires_grad_()
    labels = torch.tensor([1, row.label, 2])
    losses = unilogit_loss(logits, labels, reduction="none", backend=backend)
    loss = unilogit_loss(logits, labels, reduction=reduction, backend=backend).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    if math.isnan(row.loss):
        assert losses[1].isnan()
        assert gradient[1].isnan().all()
    else:
        rounding = 2 * torch.finfo(torch.float32).eps
        assert abs(losses[1].item() - row.loss) <= rounding * max(row.loss, 1.0)
        assert gradient[1].isfinite().all()
    if row.zero_gradient:
        assert (gradient[1] == 0).all()
    others = torch.tensor([0, 2])
    (alone,) = torch.autograd.grad(
        unilogit_loss(logits[others], labels[others], reduction="sum", backend=backend), logits
    )
    expected = alone[others] / (3 if reduction == "mean" else 1)
    tolerance = 8 * torch.finfo(torch.float32).eps * expected.abs().amax(1, keepdim=True)
    assert ((gradient[others] - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("where", ["block", "label alone"])
def test_empty_parts_merge(backend: str, where: str) -> None:
    """A block that is all -inf, or that holds the label alone, is an empty part."""
    logits = torch.randn(2, 10_000)
    label = 9000
    keep = logits[:, label].clone()
    logits[:, 8192:] = -math.inf
    if where == "label alone":
        logits[:, label] = keep
    labels = torch.tensor([label, label] if where == "label alone" else [3, 4])
    d = target_log_odds(logits, labels, backend=backend)
    exact = target_log_odds(logits.double(), labels)
    assert_within_budget(d, exact, target_log_odds(logits, labels, backend="eager"))


def test_softcap_does_not_unmask_padding(backend: str) -> None:
    """Columns beyond vocab_size carry no probability even though tanh would make -inf finite."""
    logits = torch.randn(4, 40)
    logits[:, 33:] = 1e4
    labels = torch.tensor([0, 1, 2, 32])
    x = logits.clone().requires_grad_()
    loss = unilogit_loss(x, labels, softcap=5.0, vocab_size=33, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x)

    def cut(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z = logits[:, :33].to(dtype).requires_grad_()
        expected = unilogit_loss(z, labels, softcap=5.0, backend="eager")
        return expected, torch.autograd.grad(expected, z)[0]

    exact, plain = cut(torch.float64), cut(torch.float32)
    assert_within_budget(loss, exact[0], plain[0], "loss", smallest_scale=1.0)
    assert_within_budget(gradient[:, :33], exact[1], plain[1], "gradient")
    assert (gradient[:, 33:] == 0).all()


def test_padding_rows_of_the_weight_get_zero_gradient(backend: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(9, 16).to(dtype)
    weight = torch.randn(300, 16).to(dtype).requires_grad_()
    bias = torch.randn(300).to(dtype).requires_grad_()
    with torch.no_grad():
        weight[290:] = math.nan
    loss = linear_unilogit_loss(
        hidden, weight, torch.arange(9), bias=bias, vocab_size=290, backend=backend
    )
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert (gradient[290:] == 0).all()
        assert gradient[:290].isfinite().all()


def test_gradient_rows_sum_to_zero(backend: str) -> None:
    logits = (torch.randn(6, 5000) * 4).requires_grad_()
    labels = torch.randint(0, 5000, (6,))
    (gradient,) = torch.autograd.grad(
        unilogit_loss(logits, labels, reduction="sum", backend=backend), logits
    )
    eps = torch.finfo(torch.float32).eps
    assert (gradient.double().sum(1).abs() <= 8 * eps * gradient.double().abs().sum(1)).all()


def test_float64_is_never_cast_down() -> None:
    logits = (torch.randn(4, 50, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.arange(4)
    d = target_log_odds(logits, labels)
    others = logits.detach().clone().scatter(1, labels[:, None], -math.inf)
    exact = logits.detach().gather(1, labels[:, None])[:, 0] - others.logsumexp(1)
    assert d.dtype == torch.float64
    assert (d - exact).abs().max() < 1e-14
