"""The C++ row kernels by themselves: every instruction set, dtype and layout against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.backends.cpu.rows import (
    CAPPED,
    DTYPES,
    KERNELS,
    OBJECTIVES,
    PLAIN,
    SHAPES,
    STREAM_BYTES,
    TRANSFORMS,
    assert_rows_within_budget,
    check_sweep,
    folded_state,
    oracles,
    problem,
)
from tests.support.layouts import CANARY, LAYOUTS, assert_only_written, place
from unilogit_kernels.backends.contract import Tile
from unilogit_kernels.maths import row_state
from unilogit_kernels.testing import assert_within_budget

# ---- update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels, _ = problem(*shape, dtype)
    for transform in TRANSFORMS:
        exact, plain = oracles(logits, labels, transform)
        whole = folded_state(logits, labels, transform, shape[1])
        if transform == PLAIN:
            assert torch.equal(whole[row_state.ROW_MAX], plain.rest_max)
            assert torch.equal(whole[row_state.TARGET], plain.target)
        for chunk in (shape[1], 1 + shape[1] // 3, 1500):
            state = folded_state(logits, labels, transform, chunk)
            actual = row_state.log_odds(state, labels, shape[1])
            # Log-odds are a difference, which is no more accurate than its terms.
            terms = float(torch.maximum(exact.target.abs(), exact.rest_max.abs()).max())
            assert_within_budget(
                actual, exact.log_odds, plain.log_odds, f"chunk {chunk}", smallest_scale=terms
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_of_any_layout_is_the_same(isa: str, layout: str, dtype: torch.dtype) -> None:
    logits, labels, _ = problem(5, 2085, dtype)
    view, _memory = place(logits, layout)
    expected = folded_state(logits, labels, CAPPED, 2085)
    assert torch.equal(folded_state(view, labels, CAPPED, 2085), expected)


def test_update_into_rows_of_a_larger_state(isa: str) -> None:
    logits, labels, _ = problem(4, 100, torch.float32)
    memory = row_state.empty_state(6, torch.device("cpu"))
    KERNELS.log_odds_update(Tile(logits, labels), memory[:, 1:5])
    assert torch.equal(memory[:, 1:5], folded_state(logits, labels, PLAIN, 100))
    assert torch.equal(memory[:, ::5], row_state.empty_state(2, torch.device("cpu")))


# ---- gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(isa: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for shape in SHAPES:
        logits, labels, slope = problem(*shape, dtype)
        for transform in TRANSFORMS:
            exact, plain = oracles(logits, labels, transform)
            state = folded_state(logits, labels, transform, shape[1])
            for chunk in (shape[1], 1 + shape[1] // 3):
                out, memory = place(torch.zeros(shape, dtype=out_dtype), "contiguous")
                for first in range(0, shape[1], chunk):
                    columns = slice(first, first + chunk)
                    KERNELS.log_odds_gradient(
                        Tile(logits[:, columns], labels, first, transform),
                        state,
                        slope,
                        out[:, columns],
                    )
                assert_rows_within_budget(
                    out, exact.gradient(slope.double()), plain.gradient(slope), f"{shape}"
                )
                assert_only_written(out, memory)


@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_any_layout_is_the_same(isa: str, layout: str, out_layout: str) -> None:
    for dtype in DTYPES:
        logits, labels, slope = problem(5, 2085, dtype)
        state = folded_state(logits, labels, CAPPED, 2085)
        expected = torch.empty_like(logits)
        KERNELS.log_odds_gradient(Tile(logits, labels, transform=CAPPED), state, slope, expected)
        view, _memory = place(logits, layout)
        out, memory = place(torch.zeros_like(logits), out_layout)
        KERNELS.log_odds_gradient(Tile(view, labels, transform=CAPPED), state, slope, out)
        assert torch.equal(out, expected)
        assert_only_written(out, memory)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_in_place(isa: str, layout: str, dtype: torch.dtype) -> None:
    logits, labels, slope = problem(5, 3001, dtype)
    state = folded_state(logits, labels, PLAIN, 3001)
    expected = torch.empty_like(logits)
    KERNELS.log_odds_gradient(Tile(logits, labels), state, slope, expected)
    view, memory = place(logits, layout)
    KERNELS.log_odds_gradient(Tile(view, labels), state, slope, view)
    assert torch.equal(view, expected)
    assert_only_written(view, memory)


def test_zero_slope_does_not_read_and_nan_slope_gives_nan(isa: str) -> None:
    logits = torch.full((4, 1100), math.nan)
    logits[1:] = torch.randn(3, 1100)
    labels = torch.tensor([5, 6, 1099, 0])
    state = folded_state(logits, labels, PLAIN, 1100)
    out = torch.full_like(logits, CANARY)
    slope = torch.tensor([0.0, math.nan, -0.0, 1.0])
    KERNELS.log_odds_gradient(Tile(logits, labels), state, slope, out)
    assert bool((out[0] == 0).all())
    assert bool(out[1].isnan().all())
    assert bool((out[2] == 0).all())
    assert bool(out[3].isfinite().all())


# ---- sweep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sweep(isa: str, objective: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        logits, labels, weight = problem(*shape, dtype)
        for transform in TRANSFORMS:
            out, memory = place(torch.zeros(shape, dtype=dtype), "contiguous")
            check_sweep(logits, labels, weight, objective, transform, out)
            assert_only_written(out, memory)
            check_sweep(logits, labels, weight, objective, transform, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_bypassing_the_cache_changes_nothing(
    isa: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    torch.set_num_threads(2)
    for v, layouts in ((8193, ("unaligned", "padded rows")), (16384, ("contiguous",))):
        n = 3 + STREAM_BYTES // (v * out_dtype.itemsize)
        logits, labels, weight = problem(n, v, dtype)
        weight[7] = 0.0
        state = folded_state(logits, labels, PLAIN, v)
        for layout in layouts:
            out, memory = place(torch.zeros(n, v, dtype=out_dtype), layout)
            expected = torch.empty(n, v, dtype=out_dtype)
            loss = KERNELS.log_odds_sweep(Tile(logits, labels), weight, "unilogit", v, out)
            for i in range(0, n, 10):
                rows = slice(i, i + 10)
                part = KERNELS.log_odds_sweep(
                    Tile(logits[rows], labels[rows]), weight[rows], "unilogit", v, expected[rows]
                )
                assert torch.equal(loss[rows], part)
            assert torch.equal(out, expected)
            assert_only_written(out, memory)
            KERNELS.log_odds_gradient(Tile(logits, labels), state, weight, out)
            for i in range(0, n, 10):
                rows = slice(i, i + 10)
                KERNELS.log_odds_gradient(
                    Tile(logits[rows], labels[rows]), state[:, rows], weight[rows], expected[rows]
                )
            assert torch.equal(out, expected)
            assert_only_written(out, memory)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sweep_in_place_and_of_any_layout(isa: str, layout: str, dtype: torch.dtype) -> None:
    logits, labels, weight = problem(7, 3001, dtype)
    expected = torch.empty_like(logits)
    loss = KERNELS.log_odds_sweep(
        Tile(logits, labels, transform=CAPPED), weight, "unilogit", 3001, expected
    )
    view, memory = place(logits, layout)
    again = KERNELS.log_odds_sweep(
        Tile(view, labels, transform=CAPPED), weight, "unilogit", 3001, view
    )
    assert torch.equal(loss, again)
    assert torch.equal(view, expected)
    assert_only_written(view, memory)


def test_sweep_takes_logits_of_an_unpadded_vocabulary(isa: str) -> None:
    logits, labels, weight = problem(6, 1100, torch.float32)
    out, memory = place(torch.zeros(6, 1097), "padded rows")
    check_sweep(logits[:, :1097], labels.clamp(max=1096), weight, "unilogit", PLAIN, out)
    assert_only_written(out, memory)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 33])
def test_results_do_not_depend_on_threads(isa: str, n: int) -> None:
    v = 20_001
    logits, labels, weight = problem(n, v, torch.bfloat16)
    results: list[list[Tensor]] = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        out = torch.empty_like(logits)
        loss = KERNELS.log_odds_sweep(
            Tile(logits, labels, transform=CAPPED), weight, "unilogit", v, out
        )
        state = folded_state(logits, labels, CAPPED, v)
        gradient = torch.empty_like(logits)
        KERNELS.log_odds_gradient(Tile(logits, labels, transform=CAPPED), state, weight, gradient)
        results.append([loss, out, state, gradient])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_no_rows(isa: str) -> None:
    logits, labels = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    state = row_state.empty_state(0, torch.device("cpu"))
    KERNELS.log_odds_update(Tile(logits, labels), state)
    KERNELS.log_odds_gradient(Tile(logits, labels), state, torch.empty(0), logits)
    loss = KERNELS.log_odds_sweep(Tile(logits, labels), torch.empty(0), "unilogit", 7, logits)
    assert loss.shape == (0,)
