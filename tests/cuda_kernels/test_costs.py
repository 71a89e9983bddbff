"""What the CUDA kernels move and compute for each logit, counted by the PTX executor."""

from __future__ import annotations

import pytest
import torch
from ptxsim import Launch, collect

from cuda_kernels import devices
from unilogit_kernels import row_state
from unilogit_kernels.backends import LogitTransform, gpu
from unilogit_kernels.backends.cuda import geometry
from unilogit_kernels.backends.cuda.launch import CudaKernels
from unilogit_kernels.backends.cuda.launcher import launching_through

pytestmark = pytest.mark.skipif(devices.NVCC is None, reason=devices.WITHOUT_NVCC)
N, V = 2, 128_256
KERNELS = CudaKernels()
MOST_OVER_FLOOR = 1.02

# For each logit, in PTX, where a `mov` counts too: a little above what was counted, so that what
# makes a kernel slower shows.
MOST_INSTRUCTIONS = {
    (torch.bfloat16, "update"): 9.0,
    (torch.bfloat16, "gradient"): 8.5,
    (torch.bfloat16, "sweep"): 17.0,
    (torch.float32, "update"): 8.0,
    (torch.float32, "gradient"): 8.0,
    (torch.float32, "sweep"): 16.0,
}


def launches_of(what: str, dtype: torch.dtype) -> list[Launch]:
    logits = torch.randn(N, V).to(dtype)
    labels, weight = torch.tensor([5, 70_000]), torch.ones(N)
    state = row_state.empty_state(N, torch.device("cpu"))
    state[row_state.ROW_MAX], state[row_state.ROW_SUM] = 5.0, 1e3
    out, plain = torch.empty_like(logits), LogitTransform()
    with collect() as launches:
        if what == "update":
            KERNELS.log_odds_update(logits, labels, 0, state, plain)
        elif what == "gradient":
            KERNELS.log_odds_gradient(logits, labels, 0, state, weight, out, plain)
        else:
            KERNELS.log_odds_sweep(logits, labels, weight, "unilogit", V, out, plain)
    return launches


@pytest.mark.parametrize(("what", "passes"), [("update", 1), ("gradient", 2), ("sweep", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_is_at_the_floor(
    dtype: torch.dtype, what: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A visit reads a logit once and writes it once; a sweep's second read is for the cache."""
    monkeypatch.setattr(gpu, "WAVES", 1)
    with (
        devices.block_sizes(geometry.ROW_THREADS, geometry.SPLIT_THREADS, geometry.ROW_THREADS),
        launching_through(devices.PtxLauncher(arch=90, sms=1, l2_bytes=1 << 30)),
    ):
        (only,) = launches_of(what, dtype)
    floor = passes * N * V * dtype.itemsize
    assert floor <= only.counters.global_bytes <= MOST_OVER_FLOOR * floor
    sectors = 32 * (only.counters.sectors_loaded + only.counters.sectors_stored)
    assert floor <= sectors <= MOST_OVER_FLOOR * floor
    instructions = only.counters.total_instructions / (N * V)
    moved = only.counters.global_bytes / floor
    print(f"{what} {dtype}: {instructions:.2f} instructions a logit, {moved:.3f} of the floor")
    assert instructions <= MOST_INSTRUCTIONS[dtype, what]


def test_split_rows_are_near_the_floor() -> None:
    """Two rows for a whole H100: labels and parts of 124 blocks come on top."""
    with launching_through(devices.PtxLauncher(arch=90, sms=132)):
        launches = launches_of("update", torch.bfloat16)
    assert len(launches) == 2
    sectors = 32 * sum(x.counters.sectors_loaded + x.counters.sectors_stored for x in launches)
    assert sectors <= 1.05 * N * V * 2
