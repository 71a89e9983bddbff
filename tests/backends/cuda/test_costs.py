"""What the CUDA kernels move and compute for each logit, counted by the PTX executor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptxsim import Launch, collect
from tests.backends.cuda import devices
from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import Tile, TilePair
from unilogit_kernels.backends.cuda import geometry
from unilogit_kernels.backends.cuda.driver import launching_through
from unilogit_kernels.backends.cuda.launch import CudaKernels
from unilogit_kernels.maths import pair_state, row_state
from unilogit_kernels.maths.row_state import RowNeeds

pytestmark = [
    pytest.mark.skipif(devices.NVCC is None, reason=devices.WITHOUT_NVCC),
    pytest.mark.prove,
]
N, V = 2, 128_256
KERNELS = CudaKernels()
MOST_OVER_FLOOR = 1.02

# For each logit, in PTX, where a `mov` counts too: a little above what was counted, so that what
# makes a kernel slower shows.
MOST_INSTRUCTIONS = {
    (torch.bfloat16, "update"): 8.0,
    (torch.bfloat16, "gradient"): 7.4,
    (torch.bfloat16, "sweep"): 15.2,
    (torch.float32, "update"): 7.4,
    (torch.float32, "gradient"): 7.1,
    (torch.float32, "sweep"): 15.0,
    (torch.bfloat16, "mean update"): 15.8,
    (torch.bfloat16, "entropy update"): 15.5,
    (torch.bfloat16, "variance update"): 25.0,
    (torch.bfloat16, "general gradient"): 11.6,
    (torch.float32, "mean update"): 12.7,
    (torch.float32, "entropy update"): 13.3,
    (torch.float32, "variance update"): 27.2,
    (torch.float32, "general gradient"): 11.8,
    # Of both rows' logits in a column.
    (torch.bfloat16, "pair update"): 26.0,
    (torch.bfloat16, "pair gradient"): 29.0,
    (torch.float32, "pair update"): 24.0,
    (torch.float32, "pair gradient"): 26.0,
}


NEEDS = {
    "mean update": RowNeeds(mean=True),
    "entropy update": RowNeeds(entropy=True),
    "variance update": RowNeeds(entropy=True, variance=True),
    "general gradient": RowNeeds(entropy=True),
}

HALF_SECTORS = 2
"""Of two float32 rows, a thread's eight columns are two accesses, each of which takes half of a
sector: the second one is for the L1 cache."""


def is_halved(what: str, dtype: torch.dtype) -> bool:
    return what.startswith("pair") and dtype == torch.float32


def launches_of(what: str, dtype: torch.dtype) -> list[Launch]:
    logits = torch.randn(N, V).to(dtype)
    labels, weight = torch.tensor([5, 70_000]), torch.ones(N)
    out = torch.empty_like(logits)
    if what.startswith("pair"):
        return pair_launches(what, logits, labels, out)
    needs = NEEDS.get(what, row_state.PLAIN)
    state = row_state.empty_state(N, logits.device, needs=needs)
    state[row_state.ROW_MAX], state[row_state.ROW_SUM] = 5.0, 1e3
    slope = torch.ones(5, N) if needs.general else weight
    with collect() as launches:
        if what.endswith("update"):
            KERNELS.log_odds_update(Tile(logits, labels), state, needs)
        elif what.endswith("gradient"):
            KERNELS.log_odds_gradient(Tile(logits, labels), state, slope, out)
        else:
            KERNELS.log_odds_sweep(Tile(logits, labels), weight, "unilogit", V, out)
    return launches


def pair_launches(what: str, a: Tensor, labels: Tensor, out: Tensor) -> list[Launch]:
    """The gradient is that of the reverse KL, which has the longer formula."""
    b = torch.randn(N, V).to(a.dtype)
    state = pair_state.empty_state(N, a.device)
    coefficients = torch.tensor([[0.1], [0.2], [0.0], [0.3]]).repeat(1, N)
    with collect() as launches:
        KERNELS.divergence_update(TilePair(a, b, labels), state)
        KERNELS.divergence_gradient(TilePair(a, b, labels), state, coefficients, "a", out)
    return launches[:1] if what == "pair update" else launches[1:]


@pytest.mark.parametrize(
    ("what", "passes"),
    [
        ("update", 1),
        ("gradient", 2),
        ("sweep", 3),
        ("mean update", 1),
        ("entropy update", 1),
        ("variance update", 1),
        ("general gradient", 2),
        ("pair update", 2),
        ("pair gradient", 3),
    ],
)
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
    instructions = only.counters.total_instructions / (N * V)
    moved = only.counters.global_bytes / floor
    sectors = 32 * (only.counters.sectors_loaded + only.counters.sectors_stored) / floor
    print(
        f"{what} {dtype}: {instructions:.2f} instructions a logit, {moved:.3f} of the floor in "
        f"bytes, {sectors:.3f} in sectors"
    )
    assert 1 <= moved <= MOST_OVER_FLOOR
    assert 1 <= sectors <= MOST_OVER_FLOOR * (HALF_SECTORS if is_halved(what, dtype) else 1)
    assert instructions <= MOST_INSTRUCTIONS[dtype, what]


def test_split_rows_are_near_the_floor() -> None:
    """Two rows for a whole H100: labels and parts of 124 blocks come on top."""
    with launching_through(devices.PtxLauncher(arch=90, sms=132)):
        launches = launches_of("update", torch.bfloat16)
    assert len(launches) == 2
    sectors = 32 * sum(x.counters.sectors_loaded + x.counters.sectors_stored for x in launches)
    assert sectors <= 1.05 * N * V * 2
