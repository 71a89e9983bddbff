"""The C++ row kernels on rows that overflow, underflow or hold NaN, and on large offsets."""

from __future__ import annotations

import math

import pytest
import torch

from tests.backends.cpu.rows import (
    DTYPES,
    INF,
    KERNELS,
    NAN,
    OBJECTIVES,
    PLAIN,
    check_sweep,
    hard_problem,
    problem,
)
from tests.support.layouts import CANARY
from unilogit_kernels import objective_loss
from unilogit_kernels.backends.contract import Tile


@pytest.mark.parametrize("v", [5, 40, 3000])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows(isa: str, dtype: torch.dtype, objective: str, v: int) -> None:
    names, logits, labels, weight = hard_problem(v, dtype)
    for i, name in enumerate(names):
        out = torch.full((1, v), CANARY, dtype=dtype)
        row = slice(i, i + 1)
        try:
            check_sweep(logits[row], labels[row], weight[row], objective, PLAIN, out)
        except AssertionError as error:
            raise AssertionError(f"row {name!r}: {error}") from error


def test_unilogit_saturates_to_its_limits(isa: str) -> None:
    v = 3000
    logits = torch.randn(4, v)
    logits[0, 0], logits[1, 0], logits[2, 0], logits[3, 1:] = 1e4, -1e4, -INF, -INF
    out = torch.full_like(logits, CANARY)
    labels, weight = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    loss = KERNELS.log_odds_sweep(Tile(logits, labels), weight, "unilogit", v, out)
    certain, impossible = math.log(v), math.log(v / (v - 1))
    expected = torch.tensor([certain, impossible, impossible, certain])
    assert torch.equal(loss, expected)
    assert out.count_nonzero() == 0


def test_rows_of_weight_zero_are_not_read(isa: str) -> None:
    logits, labels, weight = problem(9, 2050, torch.float32)
    logits[::2], weight[::2], labels[::2] = NAN, 0.0, -100
    out = torch.full_like(logits, CANARY)
    loss = KERNELS.log_odds_sweep(Tile(logits, labels), weight, "unilogit", 2050, out)
    assert loss[::2].count_nonzero() == 0
    assert out[::2].count_nonzero() == 0
    assert bool(loss.isfinite().all())
    assert bool(out.isfinite().all())


def test_gradient_rows_sum_to_zero(isa: str) -> None:
    logits, labels, weight = problem(9, 50_257, torch.float32)
    out = torch.empty_like(logits)
    KERNELS.log_odds_sweep(Tile(logits, labels), weight, "unilogit", 50_257, out)
    rows = out.double()
    assert bool((rows.sum(1).abs() <= 2**-22 * rows.abs().sum(1)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_hold_no_subnormal_numbers(isa: str, dtype: torch.dtype) -> None:
    """A GEMM that reads them is many times slower; the caller's own arithmetic still has them."""
    logits = (25 * torch.randn(8, 5000)).to(dtype).requires_grad_()
    loss = objective_loss(logits, torch.arange(8), "cross_entropy", backend="cpu")
    size = torch.autograd.grad(loss, logits)[0].abs()
    tiny = torch.finfo(torch.float32).tiny
    assert (size == 0).any()
    assert not ((size > 0) & (size < tiny)).any()
    assert (torch.full((100_000,), tiny) / 2 > 0).all()


def test_offsets_beyond_32_bits(isa: str) -> None:
    stride = 2**31 + 7  # of a virtual allocation of which only the touched pages exist
    memory = torch.empty(stride + 3000, dtype=torch.bfloat16)
    logits, labels, weight = problem(2, 3000, torch.bfloat16)
    view = memory.as_strided((2, 3000), (stride, 1))
    view.copy_(logits)
    expected = torch.empty_like(logits)
    KERNELS.log_odds_sweep(Tile(logits, labels), weight, "unilogit", 3000, expected)
    KERNELS.log_odds_sweep(Tile(view, labels), weight, "unilogit", 3000, view)
    assert torch.equal(view, expected)
