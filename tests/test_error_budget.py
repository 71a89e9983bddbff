"""The gate that all numerical tests go through: what passes by chance, and what never does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.tiny_models import one_thread
from unilogit_kernels.testing import (
    assert_sum_within_budget,
    assert_tensors_within_budget,
    assert_within_budget,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

SEEDS = 200
SHAPES = [(11, 503), (64, 24), (1, 300), (2, 5000)]
NOISE = 1e-5
"""Of a computation, relative to its results: far above a few roundings of float32."""


def draw(*shape: int) -> tuple[Tensor, Callable[[float], Tensor]]:
    """Exact values of unequal rows, and float32 values that are off by so much noise."""
    rows = torch.logspace(-1, 0, shape[0], dtype=torch.float64)
    exact = torch.randn(*shape, dtype=torch.float64) * rows.reshape(-1, *[1] * (len(shape) - 1))

    def computed(factor: float) -> Tensor:
        scale = exact.abs().amax(-1, keepdim=True)
        return (exact + factor * NOISE * scale * torch.randn_like(exact)).float()

    return exact, computed


def passes(check: Callable[..., None], *values: object) -> bool:
    try:
        check(*values)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_plain_torch_passes_whatever_the_seed(shape: tuple[int, int]) -> None:
    for _ in range(SEEDS):
        exact, computed = draw(*shape)
        assert_within_budget(computed(1.0), exact, computed(1.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_times_the_error_fails_whatever_the_seed(shape: tuple[int, int]) -> None:
    for _ in range(SEEDS):
        exact, computed = draw(*shape)
        assert not passes(assert_within_budget, computed(3.0), exact, computed(1.0))


@pytest.mark.parametrize("independent", [2, 4, 9])
def test_errors_that_hang_on_few_numbers(independent: int) -> None:
    """Rows whose entries are all off by one factor: chance passes, a slope that is wrong fails."""
    exact = torch.randn(1, 300, dtype=torch.float64).expand(independent, -1)

    def computed(factor: float = 1.0) -> Tensor:
        return (exact * (1 + factor * NOISE * torch.randn(independent, 1))).float()

    def check(factor: float) -> bool:
        values = (computed(factor).flatten(), exact.flatten(), computed().flatten())
        return passes(partial(assert_within_budget, independent=independent), *values)

    assert sum(check(1.0) for _ in range(SEEDS)) >= 0.98 * SEEDS
    assert not any(check(10_000.0) for _ in range(SEEDS))


def corrupt(values: Tensor, by: float) -> Tensor:
    """One entry is off by so many times the noise of its row."""
    values = values.clone()
    row, column = values.shape[0] // 2, values.shape[1] // 3
    values[row, column] += by * NOISE * values[row].abs().max()
    return values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_wrong_entry_fails_among_thousands(shape: tuple[int, int]) -> None:
    for _ in range(SEEDS):
        exact, computed = draw(*shape)
        wrong = corrupt(computed(1.0), by=30)
        assert not passes(assert_within_budget, wrong, exact, computed(1.0))


PARAMETERS = {"embedding": (500, 32), "norm": (1, 32), "bias": (1, 5), "head": (900, 32)}


def parameters(wrong: str = "", factor: float = 1.0) -> list[dict[str, Tensor]]:
    drawn = {name: draw(*shape) for name, shape in PARAMETERS.items()}
    ours = {
        name: computed(factor if wrong in (name, "all") else 1.0)
        for name, (_, computed) in drawn.items()
    }
    exact = {name: exact for name, (exact, _) in drawn.items()}
    return [ours, exact, {name: computed(1.0) for name, (_, computed) in drawn.items()}]


def test_tensors_of_a_model() -> None:
    """Small ones among large ones: chance fails none of them, and their errors are not hidden."""
    for _ in range(SEEDS // 4):
        assert_tensors_within_budget(*parameters())
        assert not passes(assert_tensors_within_budget, *parameters("all", 3.0))
        for name in PARAMETERS:
            assert not passes(assert_tensors_within_budget, *parameters(name, 30.0))
        ours, exact, plain = parameters()
        del ours["norm"]
        assert not passes(assert_tensors_within_budget, ours, exact, plain)


def test_sums() -> None:
    """That the errors of plain torch's terms cancel, by chance, makes its sum no yardstick."""
    n = 9
    for _ in range(SEEDS):
        exact = torch.rand(n, dtype=torch.float64) / n
        noise = [NOISE / n * torch.randn(n, dtype=torch.float64) for _ in range(2)]
        ours, plain = ((exact + each).float() for each in noise)
        assert_sum_within_budget(ours.sum(), exact, plain)
        lucky = (exact + noise[1] - noise[1].mean()).float()
        assert_sum_within_budget(ours.sum(), exact, lucky)
        assert not passes(assert_sum_within_budget, ours.sum() + 10 * NOISE, exact, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_to_the_last_bit_by_luck(dtype: torch.dtype) -> None:
    """What plain torch has exactly may be off by a few roundings, not by many."""
    exact = torch.full((3, 8), 1.0, dtype=torch.float64)
    plain, eps = exact.to(dtype), torch.finfo(dtype).eps
    rounded, wrong = plain.clone(), plain.clone()
    rounded[1] += eps
    wrong[1, 2] += 6 * eps
    assert_within_budget(rounded, exact, plain)
    assert not passes(assert_within_budget, wrong, exact, plain)
    assert not passes(assert_within_budget, plain + 6 * eps, exact, plain)


def test_float16_below_its_normal_numbers() -> None:
    """One rounding is a fixed amount there, larger than eps of the value."""
    exact = torch.full((2, 8), 3.1e-7, dtype=torch.float64)
    plain = exact.half()
    other = (plain.float() + 2**-24).half()
    assert_within_budget(other, exact, plain)
    assert not passes(assert_within_budget, (plain.float() + 2**-21).half(), exact, plain)


def test_nan_infinity_and_rows_of_zeros() -> None:
    exact, computed = draw(5, 40)
    exact[2] = 0.0
    plain = computed(1.0)
    assert_within_budget(computed(1.0), exact, plain)
    for value in (torch.nan, torch.inf):
        wrong = computed(1.0)
        wrong[4, 7] = value
        assert not passes(assert_within_budget, wrong, exact, plain)
    wrong = computed(1.0)
    wrong[2, 3] = 1e-30
    assert not passes(assert_within_budget, wrong, exact, plain)
    assert not passes(assert_within_budget, torch.zeros_like(plain), exact, plain)


def test_a_row_that_plain_torch_loses_is_no_licence() -> None:
    exact, computed = draw(5, 40)
    lost, wrong = computed(1.0), computed(1.0)
    lost[1] = torch.nan
    assert_within_budget(computed(1.0), exact, lost)
    wrong[1] *= 3
    assert not passes(assert_within_budget, wrong, exact, lost)


V, H, N = 97, 16, 24


def gradients(
    operands: tuple[Tensor, ...], labels: Tensor, orders: tuple[Tensor, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Of a small model, whose sums run over the vocabulary and the features in these orders."""
    vocabulary, features = orders
    x, body, head = (operand.to(dtype) for operand in operands)
    leaves = {"body": body[features], "bias": x.new_zeros(H), "head": head[:, features][vocabulary]}
    trained = [leaf.requires_grad_() for leaf in leaves.values()]
    hidden = torch.tanh(x @ leaves["body"].t() + leaves["bias"])
    loss = F.cross_entropy(hidden @ leaves["head"].t(), vocabulary.argsort()[labels])
    d_body, d_bias, d_head = torch.autograd.grad(loss, trained)
    back = features.argsort()
    d_head = d_head[vocabulary.argsort()][:, back]
    return {"body": d_body[back], "bias": d_bias[back], "head": d_head}


def test_chance_does_not_fail_real_computations() -> None:
    """Errors of a model's gradients are few, unequal, and none of them Gaussian."""
    in_order = torch.arange(V), torch.arange(H)
    for _ in range(SEEDS):
        operands = torch.randn(N, H), torch.randn(H, H) / 2, torch.randn(V, H)
        labels = torch.randint(0, V, (N,))
        shuffled = torch.randperm(V), torch.randperm(H)
        one = gradients(operands, labels, in_order, torch.float32)
        other = gradients(operands, labels, shuffled, torch.float32)
        exact = gradients(operands, labels, in_order, torch.float64)
        assert_tensors_within_budget(one, exact, other)
        assert_tensors_within_budget(other, exact, one)
