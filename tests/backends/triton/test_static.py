"""What the compiled kernels take of their GPUs: nothing spills, and accesses are whole.

`python -m benchmarks.static` prints the same numbers, and those of the peers.
"""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.aot import TARGETS
from tests.backends.triton.costs import USES, Compiled, compile_ours

pytestmark = pytest.mark.prove
V_ODD, V_EVEN = 50_257, 128_256
WHOLE_ACCESS = 128
KERNELS = {
    "log_odds_update_kernel",
    "merge_parts_kernel",
    "log_odds_gradient_kernel",
    "log_odds_sweep_kernel",
    "scale_kernel",
}


def check(found: list[Compiled], dtype: torch.dtype) -> None:
    """No kernel is missing, none spills, and loops move 128 bits at a time."""
    # Rows of float16 have a scale each, which torch multiplies them by.
    missing = KERNELS - {kernel.launch.name for kernel in found}
    assert missing <= ({"scale_kernel"} if dtype == torch.float16 else set())
    check_resources(found)


def check_resources(found: list[Compiled]) -> None:
    assert found
    for kernel in found:
        what = f"{kernel.launch.name} ({kernel.use}): {kernel.resources}"
        assert kernel.resources.spilled == 0, what
        assert set(kernel.resources.loop_accesses) <= {WHOLE_ACCESS}, what


GENERATIONS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100")
"""One of each generation of code: what compiles for these compiles alike for its relatives."""
RELATIVES = tuple(target for target in TARGETS if target not in GENERATIONS)


@pytest.mark.parametrize(
    "target",
    [
        # A newer triton has another compiler for each of the rest.
        pytest.param(target, marks=pytest.mark.pinned_triton if target == "cuda:80" else [])
        for target in GENERATIONS
    ],
)
def test_every_generation(target: str) -> None:
    """An odd vocabulary in bfloat16: the rows begin at every alignment."""
    check(compile_ours(target, V_ODD, torch.bfloat16), torch.bfloat16)


@pytest.mark.pinned_triton
@pytest.mark.parametrize("target", RELATIVES)
def test_every_relative(target: str) -> None:
    """Two of the uses on each, all of them among three neighbours."""
    uses, first = list(USES), RELATIVES.index(target)
    some = [uses[(2 * first + i) % len(uses)] for i in range(2)]
    check_resources(compile_ours(target, V_ODD, torch.bfloat16, uses=some))


@pytest.mark.parametrize(
    ("v", "dtype", "softcap"),
    [
        pytest.param(V_ODD, torch.float32, None, marks=pytest.mark.pinned_triton),
        pytest.param(V_EVEN, torch.bfloat16, None, marks=pytest.mark.pinned_triton),
        (V_EVEN, torch.float16, 30.0),  # the most registers
    ],
    ids=str,
)
def test_occupancy_on_sm_90(v: int, dtype: torch.dtype, softcap: float | None) -> None:
    found = compile_ours("cuda:90", v, dtype, softcap)
    check(found, dtype)
    for kernel in found:
        if kernel.use == "every statistic" and kernel.launch.name == "merge_parts_kernel":
            continue  # a warp for each row, of which there are few where there are many parts
        assert kernel.resources.occupancy >= 0.5, f"{kernel.launch.name}: {kernel.resources}"
