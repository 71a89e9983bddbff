"""The CPU row kernels against the speed of memory: `python -m benchmarks.cpu_rows`.

There are two floors, both one read and one non-temporal write of the logits by the same threads: a
copy into memory that exists, which every ratio here refers to, and a copy into new memory as
`torch.empty` hands it out, which is the least that an implementation pays whose gradient is new in
every call. "loss and gradient" is the whole call with autograd, first as it is (the pages of the
previous call's gradient are used again), then with nothing kept. Kernels take turns within each
repeat, so that whatever else the machine does meets all of them; a ratio is taken within its
repeat.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.turns import in_turns
from unilogit_kernels import unilogit_loss
from unilogit_kernels.backends import memory
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.cpu import library
from unilogit_kernels.backends.cpu.kernels import CpuKernels
from unilogit_kernels.bench.devices import Cpu
from unilogit_kernels.maths import row_state

SHAPES = ((512, 49_152), (1024, 131_072), (8, 131_072))
DTYPES = (torch.float32, torch.bfloat16)
FLOOR = "copy into existing memory (floor)"


class Timing(NamedTuple):
    """Times of one kernel, in seconds, and relative to the floor of the same repeat."""

    name: str
    seconds: list[float]
    ratios: list[float]


def kernels(n: int, v: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the floor comes first."""
    rows = CpuKernels()
    loaded = library.load_library()
    threads = torch.get_num_threads()
    transform = LogitTransform()
    logits = torch.randn(n, v).mul_(2).to(dtype)
    out = torch.empty_like(logits)
    labels = torch.randint(0, v, (n,))
    weight = torch.ones(n)
    state = row_state.empty_state(n, logits.device)
    rows.log_odds_update(Tile(logits, labels, transform=transform), state)
    scratch_state = state.clone()
    size = logits.numel() * logits.element_size()
    leaf = logits.clone().requires_grad_()

    def call() -> object:
        return torch.autograd.grad(unilogit_loss(leaf, labels), leaf)

    def call_with_nothing_kept() -> object:
        memory.release()
        return call()

    return {
        FLOOR: lambda: loaded.unilogit_stream_copy(
            logits.data_ptr(), out.data_ptr(), size, threads
        ),
        "copy into new memory": lambda: library.stream_copy(logits, torch.empty_like(logits)),
        "loss and gradient": call,
        "loss and gradient, nothing kept": call_with_nothing_kept,
        "sweep": lambda: rows.log_odds_sweep(
            Tile(logits, labels, transform=transform), weight, "unilogit", v, out
        ),
        "sweep, loss alone": lambda: rows.log_odds_sweep(
            Tile(logits, labels, transform=transform), weight, "unilogit", v, None
        ),
        "update": lambda: rows.log_odds_update(
            Tile(logits, labels, transform=transform), scratch_state
        ),
        "gradient": lambda: rows.log_odds_gradient(
            Tile(logits, labels, transform=transform), state, weight, out
        ),
    }


def measure(functions: dict[str, Callable[[], object]], repeats: int) -> list[Timing]:
    """Time the functions in turn, `repeats` times, after one untimed turn."""
    found = in_turns(functions, Cpu(), repeats)
    seconds = {name: [t / 1e3 for t in times] for name, times in found.items()}
    floor = seconds[FLOOR]
    return [
        Timing(name, times, [t / f for t, f in zip(times, floor, strict=True)])
        for name, times in seconds.items()
    ]


def spread(values: list[float], scale: float = 1.0) -> str:
    """`median (min .. max)`."""
    low, high = min(values) * scale, max(values) * scale
    return f"{statistics.median(values) * scale:.2f} ({low:.2f} .. {high:.2f})"


def main() -> None:
    """Print a table for every shape and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="at least 7")
    repeats = max(7, parser.parse_args().repeats)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{library.instruction_set()}; medians of {repeats} (min .. max)"
    )
    for n, v in SHAPES:
        for dtype in DTYPES:
            # Small shapes take less than a scheduler's tick: repeat them more often.
            more = max(1, (1 << 26) // (n * v) // 4)
            timings = measure(kernels(n, v, dtype), repeats * more)
            size = 2 * n * v * dtype.itemsize
            floor = statistics.median(timings[0].seconds)
            name = str(dtype).removeprefix("torch.")
            print(f"\n[{n}, {v}] {name}: floor {size / floor / 1e9:.1f} GB/s")
            for timing in timings:
                best = min(timing.seconds) / min(timings[0].seconds)
                print(
                    f"  {timing.name:34s} {spread(timing.seconds, 1e3):28s} ms   "
                    f"{spread(timing.ratios):24s} x floor, best/best {best:.2f}"
                )


if __name__ == "__main__":
    main()
