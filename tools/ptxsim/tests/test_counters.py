"""Counters against what can be counted by hand."""

from __future__ import annotations

import pytest
import torch

import faulty_kernels
import snippets
from ptxsim import Counters, InstructionClass, Schedule, collect
from ptxsim.triton_device import triton_device

WARP = 32
SECTOR = 32
ADDRESS_OF_THREAD = """
  mad.lo.s32 %r2, %r1, 32, %r0;
  mul.wide.s32 %rd2, %r2, {stride};
  add.s64 %rd3, %rd0, %rd2;
"""


def copy(n: int, dtype: torch.dtype, block: int = 1024) -> Counters:
    x = torch.arange(n).to(dtype)
    out = torch.zeros(n, dtype=dtype)
    with triton_device(80) as launches:
        faulty_kernels.copy[(-(-n // block),)](x, out, n, BLOCK=block, num_warps=4)
    assert torch.equal(out, x)
    (launch,) = launches
    return launch.counters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copy(dtype: torch.dtype) -> None:
    n = 4096
    counters = copy(n, dtype)
    size = dtype.itemsize
    assert counters.global_bytes_loaded == counters.global_bytes_stored == size * n
    assert counters.global_bytes == 2 * size * n
    assert counters.sectors_loaded == counters.sectors_stored == size * n // SECTOR
    # Accesses of 128 bits: that many threads issue one load and one store each.
    accesses = size * n // 16
    assert counters.instructions[InstructionClass.GLOBAL_LOAD] == accesses
    assert counters.instructions[InstructionClass.GLOBAL_STORE] == accesses
    assert counters.special_function_operations == 0


@pytest.mark.parametrize(("n", "vector"), [(1008, 4), (1000, 1)])
def test_masked_copy(n: int, vector: int) -> None:
    """The rest of the block is issued, and moves nothing.

    Where n is no multiple of 16, Triton takes the elements one by one. Each thread has four
    neighbours then, so that each of four accesses touches all the sectors.
    """
    counters = copy(n, torch.float32)
    assert counters.global_bytes_loaded == counters.global_bytes_stored == 4 * n
    touched = 4 * n // SECTOR * 4 // vector
    assert counters.sectors_loaded == counters.sectors_stored == touched
    assert counters.instructions[InstructionClass.GLOBAL_LOAD] == 1024 // vector


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"),
    [(4, 0, 4), (4, 1, 5), (0, 0, 1), (8, 0, 8), (32, 0, 32), (128, 0, 32)],
)
def test_sectors_of_a_warp(stride: int, offset: int, sectors: int) -> None:
    """Neighbours share a sector, an odd base costs one more, far lanes have one each."""
    store_apart = torch.zeros(1)
    aligned = torch.zeros(5000)
    first = -aligned.data_ptr() % SECTOR // 4 + offset
    body = ADDRESS_OF_THREAD.format(stride=stride) + "  ld.global.b32 %r3, [%rd3];"
    counters = snippets.run(body, [aligned[first:], store_apart], threads=2 * WARP).counters
    assert counters.global_bytes_loaded == 2 * WARP * 4
    assert counters.distinct_bytes_loaded == 2 * (WARP * 4 if stride else 4)
    assert counters.sectors_loaded == 2 * sectors
    assert counters.sectors_stored == counters.distinct_bytes_stored == 0


def test_lanes_that_share_bytes() -> None:
    """Two neighbours load the same eight bytes, and all of them the same four."""
    body = """
  and.b32 %r2, %r0, 30;
  mul.wide.u32 %rd2, %r2, 4;
  add.s64 %rd3, %rd0, %rd2;
  ld.global.b64 %rd4, [%rd3];
  ld.global.b32 %r3, [%rd0];
"""
    x = torch.zeros(64)
    counters = snippets.run(body, [x[-x.data_ptr() % SECTOR // 4 :]]).counters
    assert counters.global_bytes_loaded == WARP * (8 + 4)
    assert counters.distinct_bytes == counters.distinct_bytes_loaded == WARP // 2 * 8 + 4


def test_each_execution_is_an_access() -> None:
    """A loop that reads the same line eight times asks for it eight times."""
    body = (
        ADDRESS_OF_THREAD.format(stride=4)
        + """
  mov.u32 %r4, 0;
loop:
  ld.global.b32 %r3, [%rd3];
  add.s32 %r4, %r4, 1;
  setp.lt.s32 %p1, %r4, 8;
  @%p1 bra loop;
"""
    )
    x = torch.zeros(64)
    x = x[-x.data_ptr() % SECTOR // 4 :]
    counters = snippets.run(body, [x]).counters
    assert counters.global_bytes_loaded == 8 * 4 * WARP
    assert counters.sectors_loaded == 8 * 4
    assert counters.instructions[InstructionClass.GLOBAL_LOAD] == 8 * WARP
    assert counters.instructions[InstructionClass.ARITHMETIC] == (3 + 8 * 2) * WARP
    assert counters.instructions[InstructionClass.CONTROL] == (8 + 1) * WARP
    # Beside the argument and two special registers, the loop counter is moved.
    moves = 1 + snippets.PROLOGUE_MOVES + 1
    assert counters.instructions[InstructionClass.MOVE] == moves * WARP
    assert counters.total_instructions == (8 + 19 + 9 + moves) * WARP


def test_branches_count_where_they_are_taken() -> None:
    body = """
  setp.lt.u32 %p1, %r0, 10;
  @%p1 bra few;
  bra done;
few:
  add.s32 %r2, %r0, 1;
done:
"""
    counters = snippets.run(body, []).counters
    assert counters.instructions[InstructionClass.ARITHMETIC] == WARP + 10
    assert counters.instructions[InstructionClass.CONTROL] == WARP + (WARP - 10) + WARP


def test_guarded_instructions_are_issued_but_move_nothing() -> None:
    body = """
  setp.lt.u32 %p1, %r0, 10;
  mul.wide.u32 %rd2, %r0, 4;
  add.s64 %rd3, %rd0, %rd2;
  @%p1 st.global.b32 [%rd3], %r0;
  @!%p1 ex2.approx.f32 %f1, 0f00000000;
"""
    x = torch.zeros(32)
    x = x[-x.data_ptr() % SECTOR // 4 :]
    counters = snippets.run(body, [x]).counters
    assert counters.global_bytes_stored == 40
    assert counters.sectors_stored == 2
    assert counters.instructions[InstructionClass.GLOBAL_STORE] == WARP
    assert counters.special_function_operations == WARP


def test_classes_and_special_functions() -> None:
    body = """
  mov.f32 %f0, 0f3F800000;
  ex2.approx.ftz.f32 %f1, %f0;
  lg2.approx.f32 %f1, %f0;
  rcp.approx.f32 %f1, %f0;
  div.full.f32 %f1, %f0, %f0;
  tanh.approx.bf16x2 %r2, %r0;
  cvt.rn.bf16.f32 %h0, %f0;
  cvt.f32.bf16 %f1, %h0;
  fma.rn.f32 %f1, %f0, %f0, %f0;
  st.shared.b32 [memory], %r0;
  bar.sync 0;
  ld.shared.b32 %r3, [memory];
  shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
"""
    shared = ".shared .align 16 .b32 memory[4];"
    schedule = Schedule(check_races=False)
    counters = snippets.run(body, [], declarations=shared, schedule=schedule).counters
    expected = {
        InstructionClass.SPECIAL_FUNCTION: 5,
        InstructionClass.CONVERSION: 2,
        InstructionClass.ARITHMETIC: 1,
        InstructionClass.SHARED: 2,
        InstructionClass.BARRIER: 1,
        InstructionClass.WARP: 1,
        InstructionClass.CONTROL: 1,
        InstructionClass.MOVE: snippets.PROLOGUE_MOVES + 1,
    }
    counted = {kind: n // WARP for kind, n in counters.instructions.items() if n}
    assert counted == expected
    assert counters.special_function_operations == 6 * WARP


def test_atomics_load_and_store() -> None:
    body = "  red.global.add.u32 [%rd0], 1;"
    x = torch.zeros(1, dtype=torch.int32)
    counters = snippets.run(body, [x], blocks=3).counters
    assert x.item() == 3 * WARP
    assert counters.global_bytes_loaded == counters.global_bytes_stored == 3 * WARP * 4
    assert counters.sectors_loaded == counters.sectors_stored == 3
    assert counters.instructions[InstructionClass.ATOMIC] == 3 * WARP


@pytest.mark.parametrize("order", ["reversed", "random"])
def test_the_order_changes_nothing(order: str) -> None:
    body = ADDRESS_OF_THREAD.format(stride=4) + "  ld.global.b32 %r3, [%rd3];"
    x = torch.zeros(128)
    first = snippets.run(body, [x], blocks=4).counters
    assert snippets.run(body, [x], blocks=4, schedule=Schedule(order)).counters == first


def test_collectors_nest() -> None:
    with collect() as outer:
        snippets.run("", [])
        with collect() as inner:
            snippets.run("", [], blocks=2)
    assert [launch.grid for launch in outer] == [(1, 1, 1), (2, 1, 1)]
    assert inner == outer[1:]
    assert outer[0].block == (32, 1, 1)
