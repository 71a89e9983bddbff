"""Bytes, instructions and special functions of the public loss, counted as its kernels run.

Held to the floor (one read of the logits; two reads and one write) and to Liger's cross-entropy on
the same inputs, both as compiled for sm_90.
"""

from __future__ import annotations

import pytest
import torch

from ptxsim import Schedule
from ptxsim.triton_device import triton_device
from tests.backends.triton.costs import (
    Call,
    execute,
    execute_each,
    liger_forward,
    liger_step,
    our_forward,
    our_pair,
    our_step,
)
from unilogit_kernels.backends.registry import load

# What is stated of costs (docs/gpu.md) is stated of one compiler.
pytestmark = [pytest.mark.pinned_triton, pytest.mark.prove]

WARPS = 4
"""Of a program of `scale_kernel` on sm_90."""

SLACK = 1.02
"""Above the floor: labels, weights, losses, and what each warp of a program reads for itself."""

INSTRUCTION_SLACK = 1.01
"""A step in float32 at V = 128,256 takes 0.7 % more instructions than Liger's, and about half as
many special functions; everything else takes fewer."""


MOST_PAIR = {torch.bfloat16: (22.5, 22.7), torch.float32: (21.2, 21.7)}
"""Instructions for each column of two rows, of the statistics and the gradient: a little above what
was counted."""


@pytest.mark.parametrize(
    ("v", "dtype"),
    # Rows that begin at every alignment are harder for the narrower dtype.
    [(50_257, torch.bfloat16), (128_256, torch.bfloat16), (128_256, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(
    ("ours", "peer", "floor"),
    [(our_forward, liger_forward, 1), (our_step, liger_step, 3)],
    ids=["forward", "forward and backward"],
)
def test_budget(ours: Call, peer: Call, floor: int, v: int, dtype: torch.dtype) -> None:
    cost, other = execute(ours, v, dtype), execute(peer, v, dtype)
    assert floor <= cost.bytes <= SLACK * floor
    assert cost.instructions <= INSTRUCTION_SLACK * other.instructions
    assert cost.special <= other.special


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_rows(dtype: torch.dtype) -> None:
    """One read of both; two reads and a write. `cuda/test_costs.py` has the same in CUDA."""
    update, gradient = execute_each(our_pair, 128_256, dtype)
    for cost, floor, most in zip((update, gradient), (2, 3), MOST_PAIR[dtype], strict=True):
        print(f"{cost.launches} {dtype}: {cost.instructions:.2f} instructions a column")
        assert floor <= cost.bytes <= SLACK * floor
        assert cost.instructions <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [7, 4096, 100_517])
def test_scale(dtype: torch.dtype, count: int) -> None:
    """One read and one write, whole vectors and ends; one number where the factor is 1."""
    kernels = load("triton")
    storage = torch.randn(count + 8).to(dtype)
    values, before = storage[:count], storage.clone()
    with triton_device(90, schedule=Schedule("random", 1)) as launches:
        kernels.scale_(values, torch.tensor(1.7))
        kernels.scale_(values, torch.tensor(1.0))
    assert torch.equal(values, (before[:count].float() * 1.7).to(dtype))
    assert torch.equal(storage[count:], before[count:])
    scaled, skipped = (launch.counters for launch in launches)
    assert scaled.global_bytes_stored == count * dtype.itemsize
    assert skipped.global_bytes_stored == 0
    assert skipped.distinct_bytes_loaded == 4 * WARPS * launches[1].grid[0]  # the factor
