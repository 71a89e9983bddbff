"""Host time of GPU calls, without a GPU: `python -m benchmarks.gpu_host_cost`.

Triton's launches go through the project's own code to a driver that does nothing, so what is left
is what the host does: Python, triton's launcher, torch's allocations. By themselves the row
kernels' calls; then one fused step of the default plan, on tensors without data, whose GEMMs are
counted and not called (a call of cuBLAS costs the host some 10 us), and whose elementwise
operators run in Python, so that it is a bound from above. Microseconds of the process's own CPU
time on one thread, the least of many repeats. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tests.backends.triton.aot import Driver
from unilogit_kernels.backends.contract import RowKernels, Tile
from unilogit_kernels.backends.triton.launch import TritonKernels
from unilogit_kernels.fused_linear.budget import LinearShape
from unilogit_kernels.fused_linear.gemm import GemmDtypes, LinearHead, Needs
from unilogit_kernels.fused_linear.loops import linear_loss
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.fused_linear.plan import plan_linear
from unilogit_kernels.fused_linear.tiles import Gradients
from unilogit_kernels.maths import row_state
from unilogit_kernels.objectives import UnilogitReverse
from unilogit_kernels.rows.objective import ObjectiveLoss, RowProblem, Weighted

META = torch.device("meta")
SHAPES = ((2048, 4096, 128_256), (8192, 4096, 128_256), (65_536, 4096, 128_256))


class Silent(Driver):
    """A driver whose launches only count themselves: nothing is looked up twice for one kernel."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.count = 0

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> Any:
        """A module and a function that are none."""
        return self, 1, 0, 0, 1024

    def _launcher(self, source: Any, metadata: Any) -> Any:
        def launch(*_: Any) -> None:
            self.count += 1

        return launch


def microseconds(step: Callable[[], object], calls: int, repeats: int) -> float:
    """Least CPU time of a call."""
    step()
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(calls):
            step()
        best = min(best, (time.thread_time() - start) / calls)
    return 1e6 * best


def calls(kernels: RowKernels, n: int, v: int) -> dict[str, Callable[[], object]]:
    """The row kernels' calls on bfloat16 logits `[n, v]`."""
    logits = torch.empty(n, v, dtype=torch.bfloat16, device=META)
    labels = torch.empty(n, dtype=torch.int64, device=META)
    weight, slope = (torch.empty(n, device=META) for _ in range(2))
    state, tile = row_state.empty_state(n, META), Tile(logits, labels)
    return {
        "update": lambda: kernels.log_odds_update(tile, state),
        "gradient": lambda: kernels.log_odds_gradient(tile, state, slope, logits),
        "sweep": lambda: kernels.log_odds_sweep(tile, weight, "unilogit", v, logits),
    }


def fused_step(
    kernels: RowKernels, n: int, h: int, v: int, *, train_weight: bool
) -> Callable[[], Tensor]:
    """Loss and gradients of one call, by the plan of a GPU."""
    dtype = torch.bfloat16
    dtypes, needs = GemmDtypes.of(dtype, "cuda"), Needs(True, train_weight, False)
    plan = plan_linear(LinearShape(n, h, v, dtypes, dtype, "cuda", needs), passes=2)
    hidden, weight = (torch.empty(k, h, dtype=dtype, device=META) for k in (n, v))
    labels = torch.empty(n, dtype=torch.int64, device=META)
    rows = RowProblem(labels, Tile(hidden, labels).transform, v, kernels)
    row_weight, factor = torch.empty(n, device=META), torch.empty((), device=META)
    loss = ObjectiveLoss(rows, Weighted(UnilogitReverse(), row_weight, factor))
    head = LinearHead(hidden, weight, None, dtypes)

    def step() -> Tensor:
        gradients = Gradients(
            torch.empty_like(hidden), torch.empty_like(weight) if train_weight else None, None
        )
        return linear_loss((head,), loss, plan, gradients, LinearOptions(compact=False))

    return step


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    driver, config = Silent(GPUTarget("cuda", 90, 32)), triton.runtime.driver
    config.set_active(driver)
    kernels = TritonKernels()

    gemms = 0

    def count_gemm(*_: Any, **__: Any) -> None:
        nonlocal gemms
        gemms += 1

    def gemms_of(step: Callable[[], object]) -> int:
        before = gemms
        step()
        return gemms - before

    def launches_of(step: Callable[[], object]) -> int:
        step()
        before = driver.count
        step()
        return driver.count - before

    print("| call of Triton's row kernels | rows | launches | host, us |\n|---|---|---|---|")
    for n in (8192, 8):
        for name, call in calls(kernels, n, 128_256).items():
            took = microseconds(call, 20, repeats)
            print(f"| {name} | {n:,} | {launches_of(call)} | {took:.1f} |")
    GemmDtypes.multiply = count_gemm  # type: ignore[method-assign]
    print("\n| fused step, bfloat16 | lm_head | GEMMs | Triton's launches | host, ms |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        for train_weight in (True, False):
            step = fused_step(kernels, *shape, train_weight=train_weight)
            took = microseconds(step, 1, repeats) / 1e3
            size = " x ".join(f"{k:,}" for k in shape)
            head = "trained" if train_weight else "frozen"
            counts = f"{gemms_of(step)} | {launches_of(step)}"
            print(f"| {size} | {head} | {counts} | {took:.2f} |")


if __name__ == "__main__":
    main()
