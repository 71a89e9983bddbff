"""Host time of GPU calls, without a GPU: `python -m benchmarks.gpu_host_cost`.

Launches go through the project's own code to a driver that does nothing, so what is left is what
the host does: Python, triton's launcher, torch's allocations; for the kernels in CUDA C++ all but
`cuda.core`. By themselves the row kernels' calls; then one fused step of the default plan, on
tensors without data, whose GEMMs are counted and not called (a call of cuBLAS costs the host some
10 us), and whose elementwise operators run in Python, so that it is a bound from above.
Microseconds of the process's own CPU time on one thread, the least of many repeats. Prints
Markdown.

With `--before PATH`, a checkout of another commit, both are measured in turns, by processes of
their own, so that what else the machine does is no difference between them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tests.backends.triton.aot import Driver
from unilogit_kernels.backends.contract import RowKernels, Tile
from unilogit_kernels.backends.cuda.driver import launching_through
from unilogit_kernels.backends.cuda.launch import CudaKernels
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
SHORT = 50
"""Repeats of a few calls for each of a fused step: the least of many is less of the machine's."""
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


class H100:
    """A launcher of the kernels in CUDA C++ that launches nothing."""

    def __init__(self) -> None:
        self.count = 0

    def multiprocessors(self, tensor: Tensor) -> int:
        """How many there are."""
        return 132

    def cache_bytes(self, tensor: Tensor) -> int:
        """Of the last cache."""
        return 50 << 20

    def launch(self, *_: Any) -> None:
        """Counts itself."""
        self.count += 1


Figures = dict[str, tuple[int, int, float]]
"""By what was measured: GEMMs, launches of row kernels, and microseconds."""


def measured(repeats: int) -> Figures:
    """Calls of both backends' row kernels, and fused steps of Triton's."""
    torch.set_num_threads(1)
    silent, h100 = Silent(GPUTarget("cuda", 90, 32)), H100()
    triton.runtime.driver.set_active(silent)
    gemms = 0

    def count_gemm(*_: Any, **__: Any) -> None:
        nonlocal gemms
        gemms += 1

    def figures(
        step: Callable[[], object], calls: int, repeats: int = repeats
    ) -> tuple[int, int, float]:
        step()
        before = gemms, silent.count + h100.count
        step()
        counts = gemms - before[0], silent.count + h100.count - before[1]
        return *counts, microseconds(step, calls, repeats)

    found: Figures = {}
    kernels = TritonKernels()
    with launching_through(h100):
        for language, each in (("Triton", kernels), ("CUDA C++", CudaKernels())):
            for n in (8192, 8):
                for name, call in calls(each, n, 128_256).items():
                    found[f"{language} {name} | {n:,}"] = figures(call, 5, SHORT * repeats)
    GemmDtypes.multiply = count_gemm  # type: ignore[method-assign]
    for shape in SHAPES:
        for train_weight in (True, False):
            step = fused_step(kernels, *shape, train_weight=train_weight)
            size = " x ".join(f"{k:,}" for k in shape)
            head = "trained" if train_weight else "frozen"
            found[f"{size} | {head}"] = figures(step, 1)
    return found


def in_turns(checkouts: list[Path], rounds: int, repeats: int) -> list[Figures]:
    """The least of several rounds of each."""
    best: list[Figures] = [{} for _ in checkouts]
    for _ in range(rounds):
        for checkout, least in zip(checkouts, best, strict=True):
            command = [sys.executable, str(Path(__file__).resolve()), "--json"]
            result = subprocess.run(
                [*command, f"--repeats={repeats}"],
                cwd=checkout,
                env={**os.environ, "PYTHONPATH": str(checkout)},
                capture_output=True,
                text=True,
                check=True,
            )
            for name, (gemms, launches, took) in json.loads(result.stdout).items():
                least[name] = (gemms, launches, min(took, least.get(name, (0, 0, took))[2]))
    return best


def table(figures: list[Figures], *, steps: bool) -> str:
    """Markdown: of calls, or of fused steps."""
    unit, scale, digits = ("ms", 1e3, 2) if steps else ("us", 1, 1)
    what = "fused step, bfloat16 | lm_head | GEMMs" if steps else "call | rows"
    columns = [f"host, {unit}"] if len(figures) == 1 else [f"before, {unit}", f"now, {unit}"]
    head = f"| {what} | launches | {' | '.join(columns)} |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for name, (gemms, launches, _) in figures[-1].items():
        if name[0].isdigit() == steps:
            times = " | ".join(f"{each[name][2] / scale:.{digits}f}" for each in figures)
            lines.append(f"| {name} |{f' {gemms} |' if steps else ''} {launches} | {times} |")
    return "\n".join(lines)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=3, help="of each, with --before")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.before is None:
        figures = [measured(arguments.repeats)]
    else:
        here = Path(__file__).resolve().parents[1]
        checkouts = [arguments.before.resolve(), here]
        figures = in_turns(checkouts, arguments.rounds, arguments.repeats)
    if arguments.json:
        print(json.dumps(figures[0]))
    else:
        print(table(figures, steps=False), table(figures, steps=True), sep="\n\n")


if __name__ == "__main__":
    main()
