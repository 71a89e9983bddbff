"""The C++ row kernels by themselves: every instruction set, dtype and layout against float64.

The bar is the error budget of `unilogit_kernels.testing`: twice what plain torch makes in float32,
cast once to the dtype of the output, plus one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.layouts import CANARY, LAYOUTS, assert_only_written, place
from unilogit_kernels import objective_loss, objectives
from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile, TilePair
from unilogit_kernels.backends.cpu.kernels import CpuKernels
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.backends.ids import OBJECTIVE_IDS
from unilogit_kernels.maths import pair_state, row_state
from unilogit_kernels.testing import assert_within_budget

KERNELS = CpuKernels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = LogitTransform()
CAPPED = LogitTransform(scale=0.7, softcap=5.0)
TRANSFORMS = (PLAIN, LogitTransform(scale=-1.5), LogitTransform(softcap=30.0), CAPPED)
STREAM_BYTES = 4 << 20
"""Outputs from this size on bypass the cache: `kStreamBytes` of `csrc/cpu/rows.h`."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the oracle is many small operations
    yield
    torch.set_num_threads(before)


SMALLEST = 2.0**-100
"""Rows below this need not be accurate: the next products of a training step underflow."""


# ---- the oracle -------------------------------------------------------------------------------


class Oracle:
    """The definitions in torch: in float64 the truth, in float32 what plain torch makes of it."""

    def __init__(
        self, logits: Tensor, labels: Tensor, transform: LogitTransform, dtype: torch.dtype
    ) -> None:
        z = logits.to(dtype) * transform.scale
        self.cap_slope = torch.ones_like(z)
        if transform.softcap:
            tanh = torch.tanh(z / transform.softcap)
            z, self.cap_slope = transform.softcap * tanh, 1 - tanh.square()
        self.transform = transform
        self.v = logits.shape[1]
        exists = (labels >= 0) & (labels < self.v)
        column = labels.clamp(0, self.v - 1)[:, None]
        self.is_label = torch.zeros_like(z, dtype=torch.bool).scatter_(1, column, exists[:, None])
        self.rest = z.masked_fill(self.is_label, -math.inf)
        self.target = z.gather(1, column)[:, 0].masked_fill(~exists, -math.inf)
        self.rest_max = self.rest.amax(1)
        shift = self.rest_max.masked_fill(self.rest_max == -math.inf, 0.0)
        self.rest_sum = torch.exp(self.rest - shift[:, None]).sum(1)
        bad = z.isnan().any(1) | (z == math.inf).any(1) | ~exists | (z == -math.inf).all(1)
        log_odds = (self.target - shift) - torch.log(self.rest_sum)
        self.log_odds = torch.where(bad, math.nan, log_odds)
        softmax = torch.exp(self.rest - shift[:, None]) / self.rest_sum[:, None]
        self.softmax = softmax.masked_fill(self.is_label, 0.0)

    def gradient(self, slope: Tensor) -> Tensor:
        """The rows `slope * (onehot - softmax of the rest) * dz/dx`; zero where slope is zero."""
        row = self.is_label.to(self.softmax.dtype) - self.softmax
        row = row * self.cap_slope * (self.transform.scale * slope.to(row.dtype))[:, None]
        return row.masked_fill((slope == 0)[:, None], 0.0)


def oracles(logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Oracle, Oracle]:
    """The truth, and plain torch."""
    return (
        Oracle(logits, labels, transform, torch.float64),
        Oracle(logits, labels, transform, torch.float32),
    )


def assert_rows_within_budget(
    actual: Tensor, exact: Tensor, plain: Tensor, what: str, terms: Tensor | None = None
) -> None:
    """NaN is where the oracle has it; rows without are within the budget. `plain` is cast here.

    `terms` is the size, row by row, of the terms whose difference is the row's slope: no slope can
    be more accurate than they are.
    """
    assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaN lost or invented"
    whole = ~exact.isnan().any(1)
    actual, exact, plain = actual[whole], exact[whole], plain[whole].to(actual.dtype)
    if terms is None:
        assert_within_budget(actual, exact, plain, what, smallest_scale=SMALLEST)
        return
    # Division by a power of two is exact.
    scale = torch.exp2(torch.floor(torch.log2(terms[whole].clamp(min=SMALLEST))))[:, None]
    units = [(rows.double() / scale).to(rows.dtype) for rows in (actual, exact, plain)]
    assert_within_budget(units[0], units[1], units[2], what, smallest_scale=1.0)


# ---- problems -----------------------------------------------------------------------------------


def problem(n: int, v: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and slopes, peaked enough that rows differ in kind."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator) * 4
    labels = torch.randint(0, v, (n,), generator=generator)
    logits[::3].scatter_add_(1, labels[::3, None], torch.full((len(labels[::3]), 1), 12.0))
    slope = torch.randn(n, generator=generator)
    return logits.to(dtype), labels, slope


def folded_state(logits: Tensor, labels: Tensor, transform: LogitTransform, chunk: int) -> Tensor:
    state = row_state.empty_state(logits.shape[0], torch.device("cpu"))
    for first in range(0, logits.shape[1], chunk):
        columns = logits[:, first : first + chunk]
        KERNELS.log_odds_update(Tile(columns, labels, first, transform), state)
    return state


# ---- update -----------------------------------------------------------------------------------

# Enough rows each that plain torch's error is not a matter of luck.
SHAPES = [(16, 2), (17, 7), (16, 63), (16, 1000), (16, 2048), (16, 2049), (16, 4097), (19, 300)]


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


def slope_terms(objective: str, log_odds: Tensor, v: int) -> Tensor:
    """Size of the terms whose difference is the slope of an objective."""
    p, q = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    if objective == "unilogit":
        return p * q * (log_odds.abs().clamp(max=1e5) + math.log(v))
    return p + 1 / v if objective == "unilogit_forward" else q


def check_sweep(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    objective: str,
    transform: LogitTransform,
    out: Tensor | None,
) -> None:
    """One sweep against the oracle; `logits` may be `out`.

    Ordinary rows of plain torch's join the comparison, so that its error is no matter of luck.
    """
    n, v = logits.shape
    more, more_labels, more_weight = problem(32, v, logits.dtype, seed=1)
    all_weight = torch.cat((row_weight, more_weight))
    exact, plain = oracles(torch.cat((logits, more)), torch.cat((labels, more_labels)), transform)
    losses, slopes = [], []
    for oracle in (exact, plain):
        f = objectives.REGISTRY[objective]()
        skipped = all_weight == 0
        losses.append(f.value(oracle.log_odds, v).masked_fill(skipped, 0.0))
        slope = f.slope(oracle.log_odds, v) * all_weight.to(oracle.log_odds.dtype)
        slopes.append(slope.masked_fill(skipped, 0.0))
    loss = KERNELS.log_odds_sweep(
        Tile(logits, labels, transform=transform), row_weight, objective, v, out
    )
    loss = torch.cat((loss, losses[1][n:]))
    assert torch.equal(loss.isnan(), losses[0].isnan()), "loss: NaN lost or invented"
    unbounded = losses[0].isinf()
    assert torch.equal(loss[unbounded].double(), losses[0][unbounded])
    finite = losses[0].isfinite()
    assert_within_budget(
        loss[finite], losses[0][finite], losses[1][finite], "loss", smallest_scale=1.0
    )
    if out is not None:
        terms = slope_terms(objective, exact.log_odds, v) * all_weight.double().abs()
        terms = terms.masked_fill(all_weight == 0, 0.0)
        expected = plain.gradient(slopes[1])
        actual = torch.cat((out, expected[n:].to(out.dtype)))
        assert_rows_within_budget(actual, exact.gradient(slopes[0]), expected, objective, terms)


@pytest.mark.parametrize("objective", sorted(OBJECTIVE_IDS))
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


# ---- hard inputs ------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan


def hard_rows(v: int) -> dict[str, tuple[list[tuple[int, float]], int]]:
    """By name: entries that replace those of a random row, and the label."""
    return {
        "certain": ([(3, 1e4)], 3),
        "impossible": ([(3, -1e4)], 3),
        "label -inf": ([(3, -INF)], 3),
        "label +inf": ([(3, INF)], 3),
        "label NaN": ([(3, NAN)], 3),
        "other +inf": ([(v - 1, INF)], 3),
        "other NaN": ([(v - 1, NAN)], 3),
        "first NaN": ([(0, NAN)], 3),
        "label only": ([(j, -INF) for j in range(v) if j != 3], 3),
        "one other": ([(j, -INF) for j in range(v) if j != 4], 3),
        "nothing": ([(j, -INF) for j in range(v)], 3),
        "rest NaN": ([(j, NAN) for j in range(v) if j != 3], 3),
        "label below": ([], -1),
        "label ignored": ([], -100),
        "label above": ([], v),
        "label far above": ([], 2**40),
        "empty blocks": ([(j, -INF) for j in range(v // 3, v)], 3),
        "empty blocks before": ([(j, -INF) for j in range(v // 2)], v - 1),
        "shifted": ([(j, 1e4 + j % 7) for j in range(v)], 3),
        "far shifted": ([(j, 1e8 + 8 * (j % 7)) for j in range(v)], 3),
        "subnormal": ([(j, -90.0 - j % 14) for j in range(1, v)], 0),
    }


@pytest.mark.parametrize("v", [5, 40, 3000])
@pytest.mark.parametrize("objective", sorted(OBJECTIVE_IDS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows(isa: str, dtype: torch.dtype, objective: str, v: int) -> None:
    rows = hard_rows(v)
    logits = torch.randn(len(rows), v)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    for i, (entries, label) in enumerate(rows.values()):
        for column, value in entries:
            logits[i, column] = value
        labels[i] = label
    logits = logits.to(dtype)
    weight = torch.ones(len(rows))
    weight[list(rows).index("label ignored")] = 0.0
    for i, name in enumerate(rows):
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


@st.composite
def fuzz_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, str, LogitTransform, str]:
    """A sweep over random shapes, layouts, dtypes and special values."""
    n = draw(st.integers(1, 9))
    v = draw(st.one_of(st.integers(2, 70), st.integers(2000, 4200)))
    dtype = draw(st.sampled_from(DTYPES))
    logits, labels, weight = problem(n, v, dtype, seed=draw(st.integers(0, 1000)))
    specials = st.sampled_from([INF, -INF, NAN, 0.0, 60.0, -60.0])
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, n - 1)), draw(st.integers(0, v - 1))
        logits[row, column] = draw(specials)
    for _ in range(draw(st.integers(0, 2))):
        weight[draw(st.integers(0, n - 1))] = draw(st.sampled_from([0.0, -3.0, 1e3]))
        labels[draw(st.integers(0, n - 1))] = draw(st.sampled_from([0, v - 1, v, -100]))
    objective = draw(st.sampled_from(sorted(OBJECTIVE_IDS)))
    transform = draw(st.sampled_from((PLAIN, LogitTransform(scale=0.5))))
    return logits, labels, weight, objective, transform, draw(st.sampled_from(LAYOUTS))


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=fuzz_cases())
def test_fuzz(isa: str, case: tuple[Tensor, Tensor, Tensor, str, LogitTransform, str]) -> None:
    logits, labels, weight, objective, transform, layout = case
    view, _memory = place(logits, layout)
    out, memory = place(torch.zeros_like(logits), layout)
    check_sweep(view, labels, weight, objective, transform, out)
    assert_only_written(out, memory)


@st.composite
def pair_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, str, str]:
    """Two rows of random shapes, layouts, dtypes and special values, and gradient coefficients."""
    n = draw(st.integers(4, 9))
    v = draw(st.one_of(st.integers(30, 70), st.integers(1000, 4200)))
    seed = draw(st.integers(0, 1000))
    a, labels, _ = problem(n, v, draw(st.sampled_from(DTYPES)), seed)
    b, _, _ = problem(n, v, draw(st.sampled_from(DTYPES)), seed + 1)
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, n - 1)), draw(st.integers(0, v - 1))
        a[row, column] = draw(st.sampled_from([INF, -INF, NAN, 0.0, 60.0]))
        b[row, column] = draw(st.sampled_from([INF, NAN, 0.0, 60.0]))
    labels[draw(st.integers(0, n - 1))] = draw(st.sampled_from([0, v - 1, v, -1, -100]))
    coefficients = torch.randn(4, n, generator=torch.Generator().manual_seed(seed))
    coefficients[:, draw(st.integers(0, n - 1))] = 0.0
    layout = draw(st.sampled_from(LAYOUTS))
    return a, b, labels, coefficients, layout, draw(st.sampled_from(("a", "b")))


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=pair_cases())
def test_fuzz_of_two_rows(
    isa: str, case: tuple[Tensor, Tensor, Tensor, Tensor, str, Literal["a", "b"]]
) -> None:
    a, b, labels, coefficients, layout, student = case
    a_view, _ = place(a, layout)
    b_view, _ = place(b, layout)
    transforms = (LogitTransform(scale=0.5), PLAIN)
    runs: list[tuple[RowKernels, Tensor, Tensor, torch.dtype]] = [
        (KERNELS, a_view, b_view, torch.float32),
        (EagerKernels(), a.double(), b.double(), torch.float64),
        (EagerKernels(), a.float(), b.float(), torch.float32),
    ]
    states, gradients = [], []
    for kernels, x, y, dtype in runs:
        state = pair_state.empty_state(len(labels), a.device, dtype)
        for columns in (slice(0, 700), slice(700, None)):
            first = columns.start
            kernels.divergence_update(
                TilePair(x[:, columns], y[:, columns], labels, first, *transforms), state
            )
        log_odds = pair_state.log_odds(state, labels, a.shape[1])
        states.append(torch.stack((pair_state.rest_divergence(state), *log_odds)))
        # A row that is not finite has no finite coefficients; one that does not count has zeros.
        bad = state[[pair_state.A_SUM, pair_state.B_SUM]].isnan().any(0) & (coefficients != 0).any(
            0
        )
        factors = torch.where(bad, NAN, coefficients).to(dtype)
        like = a if student == "a" else b
        out, memory = place(torch.zeros_like(like if kernels is KERNELS else x), layout)
        kernels.divergence_gradient(
            TilePair(x, y, labels, 0, *transforms), state, factors, student, out
        )
        gradients.append(out.clone())
        assert_only_written(out, memory)
    assert torch.equal(states[0].isnan(), states[1].isnan())
    assert torch.equal(states[0] == INF, states[1] == INF)
    assert torch.equal(gradients[0].isnan(), gradients[1].isnan()), "NaN lost or invented"
    ours, exact, plain = (x.nan_to_num(0.0).flatten() for x in gradients)
    assert_within_budget(ours, exact, plain.to(ours.dtype))


def test_no_rows(isa: str) -> None:
    logits, labels = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    state = row_state.empty_state(0, torch.device("cpu"))
    KERNELS.log_odds_update(Tile(logits, labels), state)
    KERNELS.log_odds_gradient(Tile(logits, labels), state, torch.empty(0), logits)
    loss = KERNELS.log_odds_sweep(Tile(logits, labels), torch.empty(0), "unilogit", 7, logits)
    assert loss.shape == (0,)
