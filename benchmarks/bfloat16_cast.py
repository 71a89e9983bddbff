"""Where a bfloat16 fused linear's time goes: `python -m benchmarks.bfloat16_cast`.

On a CPU without products of bfloat16 numbers, float32 GEMMs take its operands. For each shape:

- ours, the literal loss and the bare GEMMs of float32 operands, in turns;
- how many times as long as these GEMMs the literal loss takes: no loss that calls them can be
  faster than it by more;
- from torch's profiler, the shares of GEMMs, casts and the rest (row kernels, Python) in our step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.figures import command_of, write
from benchmarks.turns import in_turns
from unilogit_kernels.bench.devices import Device, find_device
from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.provider import OURS
from unilogit_kernels.bench.providers import providers
from unilogit_kernels.bench.suites import targets

LITERAL, GEMMS = "eager Unilogit", "bare GEMMs"
_PARTS = {"aten::mm": "GEMMs", "aten::addmm": "GEMMs", "aten::copy_": "casts"}
_REST = "the rest"


@dataclass(frozen=True)
class Found:
    """One shape.

    Attributes:
        title: Of the problem.
        milliseconds: Of ours, the literal loss and the float32 GEMMs, by round.
        parts_ms: Milliseconds of one profiled step of ours, by what they went to.
    """

    title: str
    milliseconds: dict[str, list[float]]
    parts_ms: dict[str, float]

    def ratio(self, one: str, other: str) -> float:
        """The median over the rounds of a time over another."""
        pairs = zip(self.milliseconds[one], self.milliseconds[other], strict=True)
        return statistics.median(first / second for first, second in pairs)

    def row(self) -> str:
        """Of the Markdown table."""
        ours, total = OURS["unilogit"], sum(self.parts_ms.values())
        cells = [
            self.title,
            *(
                f"{statistics.median(self.milliseconds[who]):,.0f}"
                for who in (ours, GEMMS, LITERAL)
            ),
            *(f"{self.ratio(LITERAL, who):.2f}x" for who in (ours, GEMMS)),
            *(f"{self.parts_ms[part] / total:.0%}" for part in ("GEMMs", "casts", _REST)),
        ]
        return f"| {' | '.join(cells)} |"


def _step(shape: Shape, name: str, device: Device) -> Callable[[], object]:
    job = next(p for p in providers("linear") if p.name == name).prepare(
        Problem(shape, device.type)
    )
    return lambda: job.backward(job.forward())


def _parts(step: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    parts = {"GEMMs": 0.0, "casts": 0.0, _REST: 0.0}
    for event in found.key_averages():
        parts[_PARTS.get(event.key, _REST)] += event.self_cpu_time_total / 1e3
    return parts


def measure(shape: Shape, device: Device, rounds: int) -> Found:
    """Times in turns, after a step of each that does not count; then a profile."""
    steps = {
        OURS["unilogit"]: _step(shape, OURS["unilogit"], device),
        GEMMS: _step(replace(shape, dtype="float32"), GEMMS, device),
        LITERAL: _step(shape, LITERAL, device),
    }
    milliseconds = in_turns(steps, device, rounds)
    return Found(shape.title, milliseconds, _parts(steps[OURS["unilogit"]]))


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, nargs=3, metavar=("N", "H", "V"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/bfloat16-cast.json"))
    options = parser.parse_args(arguments)
    device = find_device("cpu")
    facts = device.facts()
    command = command_of("bfloat16_cast", arguments)
    shapes = [s for s in targets("cpu") if s.h is not None and s.dtype == "bfloat16"]
    if options.size:
        n, h, v = options.size
        shapes = [Shape(n, v, "bfloat16", h, frozen) for frozen in (False, True)]
    results = []
    for shape in shapes:
        results.append(measure(shape, device, options.rounds))
        print(results[-1].row(), file=sys.stderr)
    lines = [
        f"By `{command}`: medians of {options.rounds} rounds, milliseconds of a training step.",
        "The literal loss is eager Unilogit on `F.linear`; the GEMMs are those of a step alone, in",
        "float32: no loss that calls them is faster than the literal one by more than the ratio of",
        "these two. The shares are of our step, by torch's profiler.",
        "",
        "| problem | ours | float32 GEMMs | literal loss | literal / ours | literal / GEMMs "
        "| in GEMMs | in casts | in the rest |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(found.row() for found in results),
    ]
    figures = [asdict(found) for found in results]
    title = "A bfloat16 fused linear by float32 GEMMs"
    write(options.json, facts, command, title, lines, figures)


if __name__ == "__main__":
    main()
