"""The harness that compiles for any GPU, on kernels whose cost is known."""

from __future__ import annotations

import pytest
import torch
import triton

from ptxsim import zoo_kernels
from tests.backends.triton.aot import (
    TARGETS,
    Instruction,
    Launch,
    compiling_for,
    loop_accesses,
    resources,
)

BLOCK = 2048


def compile_add(target: str, n: int) -> Launch:
    x = torch.zeros(n)
    with compiling_for(target) as launches:
        zoo_kernels.add[(triton.cdiv(n, BLOCK),)](x, x, x, n, BLOCK=BLOCK, num_warps=4)
    (launch,) = launches
    return launch


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target: str) -> None:
    launch = compile_add(target, 2 * BLOCK)
    assert f"{launch.target.backend}:{launch.target.arch}" == target
    assert launch.grid == (2, 1, 1)
    assert launch.name == "add"
    if target == "cuda:103" and triton.__version__.startswith("3.6."):
        return  # which compiles for it, and brings no disassembler that knows it
    found = resources(launch)
    assert found.registers > 0
    assert found.spilled == found.shared == 0
    assert found.instructions > 10
    assert 0.5 <= found.occupancy <= 1
    assert found.loop_accesses == {}  # it has no loop


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
@pytest.mark.parametrize(("stride", "widths"), [(4096, {128}), (4097, {0})])
def test_width_of_accesses_in_loops(target: str, stride: int, widths: set[int]) -> None:
    """Rows of an odd length cannot be read in 128 bits."""
    logits, labels, out = torch.zeros(2, stride), torch.zeros(2, dtype=torch.long), torch.zeros(2)
    with compiling_for(target) as launches:
        zoo_kernels.cross_entropy[(2,)](logits, labels, out, out, stride, stride, BLOCK=1024)
    found = resources(launches[0])
    assert set(found.loop_accesses) == widths
    assert found.shared > 0  # the reduction over warps


@pytest.mark.parametrize(("last", "found"), [("s_endpgm", {}), ("s_cbranch", {128: 1})])
def test_a_block_behind_the_end_that_jumps_back_is_no_loop(
    last: str, found: dict[int, int]
) -> None:
    """The rare block jumps back to a load, which leads there again only past the `last`."""
    lines: list[Instruction | str] = [
        Instruction("s_cbranch", ".rare", goes_on=True),
        ".often",
        Instruction("global_load_dwordx4", None, goes_on=True),
        Instruction(last, None, goes_on=last != "s_endpgm"),
        ".rare",
        Instruction("s_branch", ".often", goes_on=False),
    ]
    assert loop_accesses(lines) == found


def test_the_same_kernel_is_compiled_once_and_launched_twice() -> None:
    x = torch.zeros(BLOCK)
    with compiling_for("cuda:80") as launches:
        for _ in range(2):
            zoo_kernels.add[(1,)](x, x, x, BLOCK, BLOCK=BLOCK)
    assert len(launches) == 2
    assert launches[0].kernel is launches[1].kernel


def test_shared_memory_that_no_multiprocessor_has_is_refused() -> None:
    """Two operands of 64 KiB; in TF32, since a dot on plain cores is unrolled for minutes."""
    x = torch.zeros(16, 1024)
    with (
        compiling_for("cuda:86") as launches,
        pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"),
    ):
        zoo_kernels.matmul[(1,)](x, x, x, 16, 16, 1024, "tf32")
    assert launches == []


def test_spills_are_seen() -> None:
    """A warp that keeps a block of 16384 values until it knows their maximum: 512 a thread."""
    v = 16384
    x, out = torch.zeros(1, v), torch.zeros(1)
    labels = torch.zeros(1, dtype=torch.long)
    with compiling_for("cuda:90") as launches:
        zoo_kernels.cross_entropy[(1,)](x, labels, out, out, v, v, BLOCK=v, num_warps=1)
    found = resources(launches[0])
    assert found.spilled > 0
