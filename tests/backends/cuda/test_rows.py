"""The CUDA kernels by themselves, executed as PTX: layouts, dtypes, hard rows, orders, limits.

Inputs and oracle are those of the C++ kernels' tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ptxsim import Schedule
from tests.backends import test_statistics_kernels as statistics
from tests.backends.cpu import rows
from tests.backends.cuda import devices
from tests.support.layouts import CANARY, LAYOUTS, assert_only_written, place
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.cuda.launch import CudaKernels
from unilogit_kernels.backends.ids import GPU_OBJECTIVES
from unilogit_kernels.maths import row_state
from unilogit_kernels.testing import assert_within_budget

pytestmark = pytest.mark.skipif(devices.NVCC is None, reason=devices.WITHOUT_NVCC)
KERNELS = CudaKernels()
PAIRS = [(a, b) for a in rows.DTYPES for b in rows.DTYPES]


@pytest.fixture(params=devices.SHARES, autouse=True)
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[devices.PtxLauncher]:
    """A device on which blocks own whole rows, or share them."""
    monkeypatch.setattr(rows, "KERNELS", KERNELS)
    with devices.small_problems(str(request.param)) as device:
        yield device


def macros(device: devices.PtxLauncher) -> set[str]:
    return {kernel.macro for kernel in device.launched}


@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS, ids=str)
def test_sweep_of_every_pair_of_dtypes(
    device: devices.PtxLauncher, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    shape = (64, 2049)
    logits, labels, weight = rows.problem(*shape, dtype)
    weight[5] = 0.0
    out, memory = place(torch.zeros(shape, dtype=out_dtype), "unaligned")
    rows.check_sweep(logits, labels, weight, "unilogit", rows.PLAIN, out)
    assert_only_written(out, memory)
    whole = device.sms == devices.SHARES["whole rows"]
    assert ("LOG_ODDS_SWEEP" in macros(device)) == whole
    if whole and (dtype == out_dtype or dtype == torch.float32):
        rows.check_sweep(logits, labels, weight, "unilogit", rows.CAPPED, out)
        assert_only_written(out, memory)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_place(layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, labels, weight = rows.problem(64, 1085, dtype)
        view, memory = place(logits, layout)
        rows.check_sweep(view, labels, weight, "unilogit", rows.CAPPED, view)
        assert_only_written(view, memory)


@pytest.mark.parametrize("objective", sorted(GPU_OBJECTIVES))
def test_hard_rows(objective: str) -> None:
    v = 1100
    hard = rows.hard_rows(v)
    logits, labels = torch.randn(len(hard), v), torch.zeros(len(hard), dtype=torch.int64)
    for i, (entries, label) in enumerate(hard.values()):
        for column, value in entries:
            logits[i, column] = value
        labels[i] = label
    weight = torch.ones(len(hard))
    weight[list(hard).index("label ignored")] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        x = logits.to(dtype).repeat(3, 1)
        out = torch.full_like(x, CANARY)
        rows.check_sweep(x, labels.repeat(3), weight.repeat(3), objective, rows.PLAIN, out)


def test_finite_extremes_stay_finite() -> None:
    """A mask of the most negative number, and logits at the other end of float32."""
    v = 700
    largest = torch.finfo(torch.float32).max
    logits = torch.full((64, v), -largest)
    logits[::2, 5] = 1.0
    logits[1::2] = largest
    labels, weight = torch.full((64,), 5), torch.ones(64)
    out = torch.empty_like(logits)
    values = KERNELS.log_odds_sweep(Tile(logits, labels), weight, "unilogit", v, out)
    exact = torch.tensor([math.log(v), 0.0], dtype=torch.float64).repeat(32)
    # Both are differences of terms of log(v).
    assert_within_budget(values, exact, exact.float(), smallest_scale=math.log(v))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("scale", [1.0, -1.5, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_every_magnitude(dtype: torch.dtype, scale: float) -> None:
    """The products of maximum, scale and log2(e) are rounded, and would overflow at last.

    Larger logits that are scaled are left out, and other scales: a target is a rounded product,
    where exponents are of unrounded ones.
    """
    magnitudes = torch.tensor([0.0, -37, 3e2, -1e3, 1e4, -1e4])
    if scale == 1:
        larger = torch.tensor([1e5, -1e5, 1e8, -1e8, 1.2e9, -1.3e9, 1.5e9, -1.6e9, 3e38, -3e38])
        magnitudes = torch.cat((magnitudes, larger))
    logits, labels, weight = rows.problem(len(magnitudes), 1500, torch.float32)
    x = (logits.nan_to_num(0.0) + magnitudes[:, None]).to(dtype)
    transform = LogitTransform(scale=scale)
    out = torch.empty_like(x)
    rows.check_sweep(x, labels, weight, "cross_entropy", transform, out)
    exact, plain = rows.oracles(x, labels, transform)
    state = rows.folded_state(x, labels, transform, 601)
    KERNELS.log_odds_gradient(Tile(x, labels, transform=transform), state, weight, out)
    rows.assert_rows_within_budget(
        out, exact.gradient(weight.double()), plain.gradient(weight), "gradient"
    )


@pytest.mark.parametrize("scale", [-1.5, 0.3])
def test_columns_in_chunks(scale: float) -> None:
    transform = LogitTransform(scale=scale)
    logits, labels, slope = rows.problem(64, 1500, torch.float32)
    exact, plain = rows.oracles(logits, labels, transform)
    state = rows.folded_state(logits, labels, transform, 601)
    out = torch.empty_like(logits)
    for first in range(0, 1500, 601):
        columns = slice(first, first + 601)
        KERNELS.log_odds_gradient(
            Tile(logits[:, columns], labels, first, transform), state, slope, out[:, columns]
        )
    rows.assert_rows_within_budget(
        out, exact.gradient(slope.double()), plain.gradient(slope), "gradient"
    )


def results(device: devices.PtxLauncher, schedule: Schedule) -> list[Tensor]:
    device.schedule = schedule
    logits, labels, weight = rows.problem(64, 1085, torch.bfloat16)
    slope = torch.linspace(-1, 1, 320).view(5, 64)
    state = rows.folded_state(logits, labels, rows.CAPPED, 500)
    out = torch.empty_like(logits)
    KERNELS.log_odds_gradient(Tile(logits, labels, transform=rows.CAPPED), state, weight, out)
    everything = statistics.fold(KERNELS, logits, labels)
    rows_of_everything = torch.empty_like(logits)
    KERNELS.log_odds_gradient(Tile(logits, labels), everything, slope, rows_of_everything)
    values = KERNELS.log_odds_sweep(Tile(logits, labels), weight, "unilogit", 1085, logits)
    return [state, out, everything.view(torch.int32), rows_of_everything, values, logits]


@pytest.mark.parametrize("arch", [75, 90])
def test_no_order_of_blocks_and_threads_changes_a_bit(
    device: devices.PtxLauncher, arch: int
) -> None:
    device.arch = arch
    expected = results(device, Schedule())
    for schedule in (Schedule("reversed"), Schedule("random", 1), Schedule("random", 2)):
        for before, after in zip(expected, results(device, schedule), strict=True):
            assert torch.equal(before, after)


def test_larger_blocks() -> None:
    """Several warps and tiles of several vectors, as on a GPU."""
    with devices.block_sizes(128, 64, 256):
        for dtype in (torch.float32, torch.bfloat16):
            for transform in (rows.PLAIN, rows.CAPPED):
                logits, labels, weight = rows.problem(16, 9001, dtype)
                out, memory = place(torch.zeros_like(logits), "padded rows")
                rows.check_sweep(logits, labels, weight, "unilogit", transform, out)
                assert_only_written(out, memory)


def test_rows_of_weight_zero_are_not_read() -> None:
    logits, labels, weight = rows.problem(64, 700, torch.float32)
    logits[::2], weight[::2], labels[::2] = math.nan, 0.0, -100
    out = torch.full_like(logits, CANARY)
    loss = KERNELS.log_odds_sweep(Tile(logits, labels), weight, "unilogit", 700, out)
    assert loss[::2].count_nonzero() == 0
    assert out[::2].count_nonzero() == 0
    assert bool(loss.isfinite().all())
    assert bool(out.isfinite().all())


def distant_rows(device: devices.PtxLauncher) -> None:
    """Two rows that are further apart than 32 bits count, in place."""
    device.schedule = Schedule(check_races=False)  # which would take memory for all in between
    stride = 2**31 + 8
    memory = torch.empty(stride + 3000, dtype=torch.bfloat16)
    logits, labels, weight = rows.problem(2, 2048, torch.bfloat16)
    view = memory.as_strided((2, 2048), (stride, 1))
    view.copy_(logits)
    expected = logits.clone()
    for x in (expected, view):
        KERNELS.log_odds_sweep(Tile(x, labels), weight, "unilogit", 2048, x)
    assert torch.equal(view, expected)


def test_offsets_beyond_32_bits(device: devices.PtxLauncher) -> None:
    distant_rows(device)


@pytest.mark.parametrize("count", [1, 7, 4096, 5003])
@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
def test_scale(dtype: torch.dtype, count: int) -> None:
    for offset in (0, 1):
        memory = torch.full((count + 64,), math.nan, dtype=dtype)
        values = memory[offset : offset + count]
        values.copy_(torch.randn(count))
        expected = (values.float() * 0.37).to(dtype)
        KERNELS.scale_(values, torch.tensor(0.37))
        assert torch.equal(values, expected)
        KERNELS.scale_(values, torch.tensor(1.0))
        assert torch.equal(values, expected)
        assert_only_written(values, memory)


def test_float64_is_refused() -> None:
    logits = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float64.*eager backend"):
        KERNELS.log_odds_update(Tile(logits, torch.zeros(2, dtype=torch.int64)), torch.zeros(3, 2))


def test_no_rows() -> None:
    logits, labels = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    state = row_state.empty_state(0, torch.device("cpu"))
    KERNELS.log_odds_update(Tile(logits, labels), state)
    KERNELS.log_odds_gradient(Tile(logits, labels), state, torch.empty(0), logits)
    loss = KERNELS.log_odds_sweep(Tile(logits, labels), torch.empty(0), "unilogit", 7, logits)
    assert loss.shape == (0,)
    KERNELS.scale_(torch.empty(0), torch.tensor(2.0))
