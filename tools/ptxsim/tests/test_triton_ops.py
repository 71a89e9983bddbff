"""Every kind of operation, compiled by Triton for several GPUs, executed, compared with torch.

All run with every check on; the random order is the one most likely to expose a wrong executor.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ptxsim import KernelFaultError, Launch, Schedule, zoo_kernels
from ptxsim.triton_device import triton_device

pytestmark = pytest.mark.prove
SCHEDULES = (
    Schedule(),
    Schedule("reversed", early_copies=True),
    Schedule("random", seed=1),
    Schedule("random", seed=2),
)
ROUNDING = 2.0**-23
OTHER_ARCHITECTURES = (75, 86, 89, 100, 120)


@pytest.fixture(params=[pytest.param(80, marks=pytest.mark.pinned_triton), 90])
def launches(request: pytest.FixtureRequest) -> Iterator[list[Launch]]:
    with triton_device(request.param, schedule=SCHEDULES[2]) as made:
        yield made


def assert_close(actual: Tensor, exact: Tensor, roundings: float) -> None:
    """At most so many roundings of float32, relative to the largest entry."""
    error, largest = (actual.double() - exact).abs().max(), exact.abs().max()
    assert error <= roundings * ROUNDING * largest, f"error {error:.2e} of {largest:.2e}"


def run_cross_entropy(v: int, dtype: torch.dtype, block: int, num_warps: int) -> None:
    x = (torch.randn(3, v) * 4).to(dtype)
    labels = torch.randint(0, v, (3,))
    losses, lses = torch.zeros(3), torch.zeros(3)
    zoo_kernels.cross_entropy[(3,)](
        x, labels, losses, lses, v, x.stride(0), BLOCK=block, num_warps=num_warps
    )
    exact = torch.nn.functional.cross_entropy(x.double(), labels, reduction="none")
    assert_close(losses, exact, 16)
    assert_close(lses, torch.logsumexp(x.double(), -1), 16)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_orders(schedule: Schedule) -> None:
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    with triton_device(80, schedule=schedule, read_only={"x", y}):
        zoo_kernels.add[(4,)](x, y, out, 1000, BLOCK=256)
        run_cross_entropy(5003, torch.bfloat16, 1024, 4)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("arch", OTHER_ARCHITECTURES)
def test_other_architectures(arch: int) -> None:
    with triton_device(arch):
        run_cross_entropy(777, torch.bfloat16, 256, 2)


@pytest.mark.parametrize(
    ("v", "dtype", "block", "num_warps"),
    [(1, torch.float32, 128, 1), (777, torch.float16, 256, 1), (9001, torch.bfloat16, 4096, 8)],
)
def test_cross_entropy(
    launches: list[Launch], v: int, dtype: torch.dtype, block: int, num_warps: int
) -> None:
    run_cross_entropy(v, dtype, block, num_warps)
    assert [launch.name for launch in launches] == ["cross_entropy"]
    assert launches[0].grid == (3, 1, 1)


@pytest.mark.parametrize("num_warps", [1, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_reductions(launches: list[Launch], axis: int, num_warps: int) -> None:
    x = torch.randn(32, 64)
    kept = 64 if axis == 0 else 32
    sums, maxima = torch.zeros(kept), torch.zeros(kept)
    argmaxima = torch.zeros(kept, dtype=torch.int32)
    zoo_kernels.reduce_[(1,)](x, sums, maxima, argmaxima, 32, 64, axis, num_warps=num_warps)
    assert torch.equal(maxima, x.amax(axis))
    assert torch.equal(argmaxima.long(), x.argmax(axis))
    assert_close(sums, x.double().sum(axis), 16)


@pytest.mark.parametrize("reverse", [False, True])
def test_scans(launches: list[Launch], reverse: bool) -> None:
    x = torch.randn(16, 128)
    rows, columns = torch.zeros(16, 128), torch.zeros(16, 128)
    zoo_kernels.scan[(1,)](x, rows, columns, 16, 128, reverse)
    exact = x.double().flip(1).cumsum(1).flip(1) if reverse else x.double().cumsum(1)
    assert_close(rows, exact, 16)
    assert_close(columns, x.double().cumsum(0), 16)


def test_sort(launches: list[Launch]) -> None:
    x, out = torch.randn(8, 64), torch.zeros(8, 64)
    zoo_kernels.sort[(1,)](x, out, 8, 64)
    assert torch.equal(out, x.sort(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_transpose(launches: list[Launch], dtype: torch.dtype) -> None:
    x = (torch.randn(32, 64) * 10).to(dtype)
    out = torch.zeros(64, 32, dtype=dtype)
    zoo_kernels.transpose[(1,)](x, out, 32, 64)
    assert torch.equal(out, x.t())


def test_gather(launches: list[Launch]) -> None:
    x, out = torch.randn(8, 64), torch.zeros(8, 64)
    index = torch.randint(0, 64, (8, 64), dtype=torch.int32)
    zoo_kernels.gather[(1,)](x, index, out, 8, 64)
    assert torch.equal(out, x.gather(1, index.long()))


def test_histogram(launches: list[Launch]) -> None:
    x = torch.randint(0, 16, (256,), dtype=torch.int32)
    out = torch.zeros(16, dtype=torch.int32)
    zoo_kernels.histogram[(1,)](x, out, 256, 16)
    assert torch.equal(out.long(), torch.bincount(x, minlength=16))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_atomics(arch: int, dtype: torch.dtype) -> None:
    x = torch.randint(-1, 2, (1000,)).to(dtype)  # sums stay exact in every order
    sums, maxima = torch.zeros(7, dtype=dtype), torch.zeros(5, dtype=torch.int32)
    # Before sm_90, a bfloat16 is added by compare and swap, whose first guess is a plain load:
    # harmless, and a race by the letter.
    swaps = dtype == torch.bfloat16 and arch < 90
    with triton_device(arch, schedule=Schedule("random", seed=1, check_races=not swaps)):
        zoo_kernels.atomics[(4,)](x, sums, maxima, 1000, BLOCK=256)
    exact = torch.zeros(7, dtype=torch.double)
    exact.index_add_(0, torch.arange(1000) % 7, x.double())
    assert torch.equal(sums.double(), exact)
    assert maxima.tolist() == [995, 996, 997, 998, 999]


def test_mathematics(launches: list[Launch]) -> None:
    x = torch.randn(700) * 3
    x[:4] = torch.tensor([1e-30, 80.0, 0.5, -7.0])
    out = torch.zeros(15, 700)
    zoo_kernels.mathematics[(3,)](x, out, 700, BLOCK=256)
    d = x.double()
    exact = torch.stack(
        [
            d.exp(),
            d.abs().log(),
            d.abs().sqrt(),
            1 / d,
            d.sin(),
            d.erf(),
            d.sigmoid(),
            d.exp2(),
            d.abs().rsqrt(),
            d.floor(),
            d.tanh(),
            d * d + d,
            d.abs().log2(),
            d / (x * x + 1.37).double(),
            d.abs().log1p(),
        ]
    )
    # exp is exp2 of a rounded product: 80 / log 2 in float32 is off by 2^-18.
    error = ((out.double() - exact).abs() / exact.abs().clamp(min=1e-6)).amax(1)
    assert error.max() <= 80 * ROUNDING, error.tolist()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_integers(launches: list[Launch], dtype: torch.dtype) -> None:
    a = torch.randint(-20000, 20000, (200,)).to(dtype)
    b = torch.randint(1, 100, (200,)).to(dtype) * torch.tensor([-1, 1], dtype=dtype).repeat(100)
    out = torch.zeros(4, 200, dtype=dtype)
    zoo_kernels.integers[(1,)](a, b, out, 200, BLOCK=256)
    quotient = torch.div(a, b, rounding_mode="trunc")
    exact = torch.stack([quotient, torch.fmod(a, b), a * b, (a >> 3) ^ (b << 2)])
    assert torch.equal(out, exact)


def test_random_numbers(launches: list[Launch]) -> None:
    out = torch.zeros(512)
    zoo_kernels.uniform[(1,)](out, 1234, BLOCK=512)
    assert out.unique().numel() > 500
    assert 0 <= out.min() < 0.02 < 0.98 < out.max() < 1


def test_casts(launches: list[Launch]) -> None:
    x = torch.randn(256) * 100
    x[:6] = torch.tensor([1e-41, 65504.0, 1e-6, float("inf"), 0.1, 3.3895e38])
    half, bfloat = torch.zeros(256, dtype=torch.half), torch.zeros(256, dtype=torch.bfloat16)
    integer = torch.zeros(256, dtype=torch.int32)
    zoo_kernels.casts[(1,)](x, half, bfloat, integer, BLOCK=256)
    assert torch.equal(half, x.half())
    assert torch.equal(bfloat, x.bfloat16())
    assert torch.equal(integer[6:], x[6:].int())


@pytest.mark.parametrize(
    ("dtype", "precision", "roundings"),
    [
        (torch.float16, None, 4),
        (torch.bfloat16, None, 4),
        (torch.float32, "ieee", 8),
        (torch.float32, "tf32", 2.0**14),
        (torch.float32, "bf16x3", 2.0**8),
        (torch.int8, None, 0),
    ],
    ids=str,
)
def test_dot(dtype: torch.dtype, precision: str | None, roundings: float) -> None:
    spread = 10 if dtype == torch.int8 else 1
    a, b = (torch.randn(32, 64) * spread).to(dtype), (torch.randn(64, 32) * spread).to(dtype)
    c = torch.zeros(32, 32, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    with triton_device(80, schedule=SCHEDULES[2]):
        zoo_kernels.matmul[(1,)](a, b, c, 32, 32, 64, precision)
    assert_close(c, a.double() @ b.double(), roundings)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_asynchronous_copies(schedule: Schedule) -> None:
    a, b = torch.randn(32, 160).half(), torch.randn(160, 32).half()
    c = torch.zeros(32, 32)
    with triton_device(80, schedule=schedule):
        zoo_kernels.pipelined_matmul[(1,)](a, b, c, 160, 32, 32, 32)
    assert_close(c, a.double() @ b.double(), 4)


def test_device_assertions() -> None:
    x = torch.ones(64)
    with triton_device(80):
        zoo_kernels.checked[(1,)](x, BLOCK=64, debug=True)
        x[17] = -1
        with pytest.raises(KernelFaultError, match="assert"):
            zoo_kernels.checked[(1,)](x, BLOCK=64, debug=True)
