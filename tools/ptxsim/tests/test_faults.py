"""Broken kernels, each of which must be caught, and the correct ones beside them, which must not.

Tensors are views of longer ones, so that a stray access would neither crash nor be seen.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import faulty_kernels
import snippets
from ptxsim import (
    KernelFaultError,
    PtxError,
    Schedule,
    UnsupportedPtxError,
)
from ptxsim.triton_device import triton_device

SLACK = 4096
WARP = 32


def values(n: int) -> Tensor:
    return torch.randn(n + SLACK)[:n]


def caught(call: Callable[[], object], match: str, **options: object) -> None:
    with pytest.raises(KernelFaultError, match=match), triton_device(80, **options):  # type: ignore[arg-type]
        call()


# ---- memory


def test_write_out_of_bounds() -> None:
    x, out = values(1000), values(1000)
    caught(
        lambda: faulty_kernels.writes_one_too_many[(4,)](x, out, 1000, BLOCK=256),
        r"out-of-bounds global write of 4 bytes; nearest is 'out' of 4000 bytes, at its byte "
        r"offset 4000; thread \(\d+,0,0\) of block \(3,0,0\), source line \d+",
    )


def test_read_out_of_bounds() -> None:
    x, out = values(1000), values(1000)
    caught(
        lambda: faulty_kernels.reads_without_mask[(4,)](x, out, 1000, BLOCK=256),
        "out-of-bounds global read .* nearest is 'x'",
    )


def test_narrow_offset() -> None:
    x, out = values(1000), values(16)
    caught(
        lambda: faulty_kernels.row_of_narrow_offset[(1,)](x, out, 70000, 60000, BLOCK=16),
        "out-of-bounds global read",
    )


def test_misalignment() -> None:
    x, out = values(256), values(128)
    with triton_device(80):
        faulty_kernels.promises_alignment[(1,)](x, out, 4, BLOCK=128, num_warps=1)
    assert torch.equal(out, x[4:132])
    caught(
        lambda: faulty_kernels.promises_alignment[(1,)](x, out, 5, BLOCK=128, num_warps=1),
        "misaligned global access",
    )


@pytest.mark.parametrize("by_name", [True, False])
def test_write_to_read_only(by_name: bool) -> None:
    x, out = values(64), values(64)
    caught(
        lambda: faulty_kernels.copy[(1,)](x, out, 64, BLOCK=64),
        "write to read-only 'out'",
        read_only=("out",) if by_name else (out,),
    )
    with triton_device(80, read_only=("x",) if by_name else (x,)):
        faulty_kernels.copy[(1,)](x, out, 64, BLOCK=64)


def test_misspelt_read_only() -> None:
    x, out = values(64), values(64)
    with (
        pytest.raises(ValueError, match="no kernel has an argument named ouput"),
        triton_device(80, read_only=("ouput",)),
    ):
        faulty_kernels.copy[(1,)](x, out, 64, BLOCK=64)


def test_tensors_of_other_devices() -> None:
    x = torch.zeros(64, device="meta")
    with triton_device(80), pytest.raises(UnsupportedPtxError, match="'x' is on meta"):
        faulty_kernels.copy[(1,)](x, values(64), 64, BLOCK=64)


# ---- races


def reverse(has_barrier: bool) -> None:
    x, scratch, out = values(512), torch.zeros(512), torch.zeros(512)
    faulty_kernels.reverses[(1,)](x, scratch, out, 512, has_barrier, num_warps=4)
    assert torch.equal(out, 2 * x.flip(0))


@pytest.mark.parametrize("order", ["sequential", "reversed", "random"])
def test_missing_barrier(order: str) -> None:
    schedule = Schedule(order)
    with triton_device(80, schedule=schedule):
        reverse(True)
    caught(lambda: reverse(False), "data race, .* on 'scratch'", schedule=schedule)


@pytest.mark.parametrize("order", ["sequential", "reversed", "random"])
def test_race_between_blocks(order: str) -> None:
    x, out = values(1000), torch.zeros(1)
    schedule = Schedule(order)
    with triton_device(80, schedule=schedule):
        faulty_kernels.sums_into_one_cell[(4,)](x, out, 1000, BLOCK=256, ATOMIC=True)
    caught(
        lambda: faulty_kernels.sums_into_one_cell[(4,)](x, out, 1000, BLOCK=256, ATOMIC=False),
        "data race, .* on 'out'",
        schedule=schedule,
    )


def test_race_in_place() -> None:
    x = values(1000)
    caught(
        lambda: faulty_kernels.shifts_in_place[(4,)](x, 1000, BLOCK=256),
        "data race, write after unordered read.* on 'x'",
    )
    with triton_device(80):
        faulty_kernels.shifts_in_place[(1,)](x, 1000, BLOCK=1024)


def test_reversed_blocks_expose_order_dependence() -> None:
    """Without race checks the result shows it: the orders differ."""
    results = []
    for order in ("sequential", "reversed"):
        x = torch.arange(1000.0)
        with triton_device(80, schedule=Schedule(order, check_races=False)):
            faulty_kernels.shifts_in_place[(4,)](x, 1000, BLOCK=256)
        results.append(x)
    assert not torch.equal(*results)


SHARED = ".shared .align 16 .b32 memory[64];"
TO_SHARED = "  shl.b32 %r2, %r0, 2;\n  mov.u32 %r3, memory;\n  add.s32 %r4, %r3, %r2;\n"
EXCHANGE = (
    TO_SHARED
    + """
  st.shared.b32 [%r4], %r0;
  {barrier}
  xor.b32 %r5, %r2, {distance};
  add.s32 %r6, %r3, %r5;
  ld.shared.b32 %r7, [%r6];
  mul.wide.u32 %rd2, %r0, 4;
  add.s64 %rd3, %rd0, %rd2;
  st.global.b32 [%rd3], %r7;
"""
)


def test_shared_memory_needs_barriers_between_warps() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    good = EXCHANGE.format(barrier="bar.sync 0;", distance=4 * WARP)
    snippets.run(good, [out], threads=64, declarations=SHARED)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ WARP)
    with pytest.raises(KernelFaultError, match=r"data race, .* in shared memory"):
        snippets.run(
            EXCHANGE.format(barrier="", distance=4 * WARP),
            [out],
            threads=64,
            declarations=SHARED,
        )


# ---- barriers and warps

DIVERGENT = """
  setp.lt.u32 %p1, %r0, 40;
  @%p1 bra few;
  {others}
  bra done;
few:
  bar.sync 0;
done:
"""


@pytest.mark.parametrize("others", ["", "bar.sync 0;", "bar.sync 1;"])
@pytest.mark.parametrize("order", ["sequential", "random"])
def test_divergent_barrier(others: str, order: str) -> None:
    body = DIVERGENT.format(others=others) + "  bar.sync 0;"
    with pytest.raises(KernelFaultError, match="divergent barrier"):
        snippets.run(body, [], threads=64, schedule=Schedule(order))


def test_returned_threads_are_not_waited_for() -> None:
    body = "  setp.lt.u32 %p1, %r0, 40;\n  @%p1 ret;\n  bar.sync 0;"
    snippets.run(body, [], threads=64)


def test_divergent_warp() -> None:
    body = """
  setp.lt.u32 %p1, %r0, 16;
  @%p1 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
  @%p1 bra done;
  bar.sync 0;
done:
  bar.sync 0;
"""
    with pytest.raises(KernelFaultError, match="divergent barrier"):
        snippets.run(body, [])


@pytest.mark.parametrize(
    ("mask", "match"), [("0xfffe", "own member mask"), ("0x1", "outside its member mask")]
)
def test_member_masks(mask: str, match: str) -> None:
    with pytest.raises(KernelFaultError, match=match):
        snippets.run(f"  shfl.sync.bfly.b32 %r2, %r0, 1, 31, {mask};", [])


def test_lanes_that_return_have_voted() -> None:
    """Whoever reads a ballot late still sees the votes of those that are gone by then."""
    out = torch.zeros(32, dtype=torch.int32)
    body = """
  vote.sync.ballot.b32 %r2, 1, -1;
  mul.wide.u32 %rd2, %r0, 4;
  add.s64 %rd3, %rd0, %rd2;
  st.global.b32 [%rd3], %r2;
"""
    for order in ("sequential", "random"):
        snippets.run(body, [out], schedule=Schedule(order))
        assert out.tolist() == [-1] * WARP


def test_exchanges_of_part_of_a_warp() -> None:
    """Half of the lanes have one exchange more behind them when all meet."""
    out = torch.zeros(32, dtype=torch.int32)
    body = """
  mov.b32 %r2, %r0;
  setp.lt.u32 %p1, %r0, 16;
  @%p1 shfl.sync.bfly.b32 %r2, %r0, 1, 31, 0xffff;
  shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;
  mul.wide.u32 %rd2, %r0, 4;
  add.s64 %rd3, %rd0, %rd2;
  st.global.b32 [%rd3], %r3;
"""
    snippets.run(body, [out])
    assert out.tolist() == [*range(16, 32), *(i ^ 1 for i in range(16))]


def test_shuffles_from_lanes_that_returned() -> None:
    body = "  setp.eq.u32 %p1, %r0, 1;\n  @%p1 ret;\n  shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;"
    with pytest.raises(KernelFaultError, match="a lane that returned"):
        snippets.run(body, [])


def test_blocks_have_at_most_1024_threads() -> None:
    with pytest.raises(PtxError, match="1056 threads"):
        snippets.run("", [], threads=1056)


def test_loops_end() -> None:
    """A spin lock that another block must release never opens: blocks run one after another."""
    body = "loop:\n  ld.relaxed.gpu.global.b32 %r2, [%rd0];\n  bra loop;"
    with pytest.raises(KernelFaultError, match="a loop does not end"):
        snippets.run(body, [torch.zeros(1)], threads=1, schedule=Schedule(check_races=False))


# ---- what was never written


def test_registers_are_poisoned() -> None:
    x = torch.zeros(3)
    snippets.run("  st.global.f32 [%rd0], %f7;", [x], threads=1)
    assert x[0].isnan()
    halves = torch.zeros(2, dtype=torch.bfloat16)
    snippets.run("  st.global.b16 [%rd0], %h7;", [halves], threads=1)
    assert halves[0].isnan()
    assert halves.half()[0].isnan()


def test_shared_memory_is_poisoned() -> None:
    x = torch.zeros(1)
    body = "  ld.shared.b32 %r2, [memory+8];\n  st.global.b32 [%rd0], %r2;"
    snippets.run(body, [x], threads=1, declarations=SHARED)
    assert x[0].isnan()


def test_shared_memory_bounds() -> None:
    for offset, match in ((256, "outside the allocation"), (2, "misaligned shared access")):
        with pytest.raises(KernelFaultError, match=match):
            snippets.run(f"  ld.shared.b32 %r2, [memory+{offset}];", [], declarations=SHARED)


def test_blocks_do_not_inherit_shared_memory() -> None:
    out = torch.zeros(2)
    body = """
  setp.eq.u32 %p1, %r1, 0;
  @%p1 st.shared.b32 [memory], 0;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd0, %rd2;
  ld.shared.b32 %r2, [memory];
  st.global.b32 [%rd3], %r2;
"""
    snippets.run(body, [out], threads=1, blocks=2, declarations=SHARED)
    assert out[0] == 0
    assert out[1].isnan()
