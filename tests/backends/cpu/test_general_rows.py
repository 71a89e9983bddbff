"""Moments and general gradient rows in C++: what the shared tests of statistics leave out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.backends.cpu.rows import CAPPED, DTYPES, KERNELS, NAN, STREAM_BYTES, problem
from tests.support.layouts import CANARY, LAYOUTS, assert_only_written, place
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.maths import row_state, statistics
from unilogit_kernels.maths.row_state import RowNeeds

EVERYTHING = RowNeeds(*[True] * len(RowNeeds._fields))


def folded(logits: Tensor, labels: Tensor, transform: LogitTransform = CAPPED) -> Tensor:
    state = row_state.empty_state(len(labels), logits.device, needs=EVERYTHING)
    KERNELS.log_odds_update(Tile(logits, labels, 0, transform), state, EVERYTHING)
    return state


def gradient(logits: Tensor, labels: Tensor, slope: Tensor, out: Tensor) -> None:
    state = folded(logits.clone(), labels)
    KERNELS.log_odds_gradient(Tile(logits, labels, 0, CAPPED), state, slope, out)


def slopes(n: int) -> Tensor:
    return torch.randn(5, n, generator=torch.Generator().manual_seed(3))


def test_rows_of_one_coefficient(isa: str) -> None:
    """Each of the five counts by itself; five zeros are not even read."""
    logits, labels = torch.randn(6, 2100), torch.full((6,), 7)
    slope = torch.cat((torch.eye(5), torch.zeros(5, 1)), 1)
    state = folded(logits, labels, LogitTransform())
    logits[5] = NAN
    out = torch.full_like(logits, CANARY)
    KERNELS.log_odds_gradient(Tile(logits, labels), state, slope, out)
    written = out.count_nonzero(1).tolist()
    assert written[statistics.REST] == written[statistics.UNIFORM] == 2100 - 2
    assert written[statistics.TILT] == 2100 - 2  # at the maximum, which is the runner-up, it is 0
    assert written[statistics.AT_LABEL] == written[statistics.AT_RUNNER_UP] == 1
    assert written[5] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_and_number_of_threads(isa: str, layout: str, dtype: torch.dtype) -> None:
    for n, v in ((1, 20_001), (7, 3001)):
        logits, labels, _ = problem(n, v, dtype)
        state, expected = folded(logits, labels), torch.empty_like(logits)
        gradient(logits, labels, slopes(n), expected)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            view, memory = place(logits, layout)
            bits = folded(view, labels).view(torch.int32)
            assert torch.equal(bits, state.view(torch.int32))
            out, around = place(torch.zeros_like(logits), layout)
            for target in (out, view):
                gradient(view, labels, slopes(n), target)
                assert torch.equal(target, expected)
            assert_only_written(out, around)
            assert_only_written(view, memory)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_bypassing_the_cache_changes_nothing(isa: str, out_dtype: torch.dtype) -> None:
    v = 8193
    n = 3 + STREAM_BYTES // (v * out_dtype.itemsize)
    logits, labels, _ = problem(n, v, torch.bfloat16)
    out, memory = place(torch.zeros(n, v, dtype=out_dtype), "unaligned")
    gradient(logits, labels, slopes(n), out)
    expected = torch.empty(10, v, dtype=out_dtype)
    for i in range(0, n - 10, 40):
        rows = slice(i, i + 10)
        gradient(logits[rows], labels[rows], slopes(n)[:, rows].contiguous(), expected)
        assert torch.equal(out[rows], expected)
    assert_only_written(out, memory)
