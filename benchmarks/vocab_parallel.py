"""Two ranks that share a vocabulary, beside one process that has all of it: time and memory.

Each process has one thread. The figure that counts is the ratio of a rank's time to half of the one
process's: 1 is a perfect split. Both run in turns, in the same two processes: first one of them
alone, then both together. Peaks of memory are of processes of their own.

    python -m benchmarks.vocab_parallel --json benchmarks/results/vocab-parallel.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.figures import command_of, write
from unilogit_kernels import VocabParallel, linear_unilogit_loss
from unilogit_kernels.bench.devices import find_device

RANKS = 2


class Shape(NamedTuple):
    """A problem: tokens, hidden size, columns, and whether the lm_head is trained."""

    n: int
    h: int
    v: int
    trains: bool
    dtype: str = "float32"

    def __str__(self) -> str:
        what = "trained" if self.trains else "frozen"
        return f"{self.n:,} x {self.h:,} x {self.v:,}, {self.dtype}, {what}"


SHAPES = [
    Shape(512, 1024, 65_536, trains=True),
    Shape(512, 1024, 65_536, trains=False),
    Shape(1024, 576, 131_072, trains=True),
    Shape(1024, 576, 131_072, trains=False),
]


def operands(shape: Shape, ranks: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, this rank's rows of the weight, and labels."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    hidden = torch.randn(shape.n, shape.h, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, shape.v, (shape.n,), generator=generator)
    own = torch.empty(shape.v // ranks, shape.h, dtype=dtype)
    own.normal_(0, shape.h**-0.5, generator=torch.Generator().manual_seed(rank))
    return hidden, own.requires_grad_(shape.trains), labels


def step_of(shape: Shape, ranks: int, rank: int) -> Callable[[], None]:
    """A forward and a backward."""
    hidden, weight, labels = operands(shape, ranks, rank)
    options: dict[str, Any] = {} if ranks == 1 else {"vocab_parallel": VocabParallel()}

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_unilogit_loss(hidden, weight, labels, **options).backward()

    return step


def timed(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def times(rank: int, rendezvous: str, shape: Shape, rounds: int, out: Any) -> None:
    """What one of the processes does: rank 0 alone, then both, again and again."""
    join(rank, rendezvous)
    alone = step_of(shape, 1, 0) if rank == 0 else None
    together = step_of(shape, RANKS, rank)
    together()
    found: dict[str, list[float]] = {"alone": [], "together": []}
    for i in range(rounds + 1):
        if alone is not None:
            seconds = timed(alone)
            found["alone"] += [seconds] if i else []
        dist.barrier()
        seconds = timed(together)
        found["together"] += [seconds] if i else []
        dist.barrier()
    if rank == 0:
        out.put(found)


def peak(rank: int, rendezvous: str, shape: Shape, ranks: int, out: Any) -> None:
    """MiB that a process takes at most for two steps, operands included."""
    if ranks > 1:
        join(rank, rendezvous)
    torch.set_num_threads(1)
    small = shape._replace(n=8, v=1024)
    step_of(small, ranks, rank)()
    before = resident()
    step = step_of(shape, ranks, rank)
    step()
    step()
    if rank == 0:
        out.put(resident() - before)
    if ranks > 1:
        dist.barrier()


def resident() -> float:
    """MiB, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def join(rank: int, rendezvous: str) -> None:
    """The group of the processes, one thread each."""
    torch.set_num_threads(1)
    method = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=RANKS)


def in_processes(function: Callable[..., None], count: int, *args: Any) -> Any:
    """What the first of some processes found."""
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=function, args=(rank, f"{folder}/group", *args, out))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        found = out.get()
        for process in started:
            process.join()
    return found


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    found = in_processes(times, RANKS, shape, rounds)
    ratios = [
        together / (alone / RANKS)
        for alone, together in zip(found["alone"], found["together"], strict=True)
    ]
    head = shape.v * shape.h * torch.finfo(getattr(torch, shape.dtype)).bits / 8 / 2**20
    return {
        "shape": str(shape),
        "alone_ms": 1e3 * statistics.median(found["alone"]),
        "together_ms": 1e3 * statistics.median(found["together"]),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "head_mib": head,
        "alone_mib": in_processes(peak, 1, shape, 1),
        "together_mib": in_processes(peak, RANKS, shape, RANKS),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    return [
        "| tokens x hidden x vocabulary | one process | two ranks | ratio to half (least - most) | "
        "lm_head | one process's peak | a rank's peak |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {r['shape']} | {r['alone_ms']:,.0f} ms | {r['together_ms']:,.0f} ms | "
            f"{r['ratio']:.2f} ({r['least']:.2f} - {r['most']:.2f}) | {r['head_mib']:,.0f} MiB | "
            f"{r['alone_mib']:,.0f} MiB | {r['together_mib']:,.0f} MiB |"
            for r in rows
        ),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("runs/vocab-parallel.json"))
    given = parser.parse_args(arguments)
    rows = [measure(shape, given.rounds) for shape in SHAPES]
    lines = [
        "`linear_unilogit_loss`, forward and backward, one thread a process. The ratio is of a",
        "rank's time to half of the one process's, in turns; 1 would be a perfect split. Peaks are",
        "of fresh processes, operands and gradients included.",
        "",
        *table(rows),
    ]
    facts = find_device("cpu").facts()
    command = command_of("vocab_parallel", arguments)
    write(given.json, facts, command, "Two ranks that share a vocabulary", lines, rows)


if __name__ == "__main__":
    main()
