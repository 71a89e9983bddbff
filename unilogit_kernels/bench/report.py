"""Runs a set of shapes and writes what was measured: JSON, a table for people, Markdown."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import unilogit_kernels
from unilogit_kernels.backends import cpu
from unilogit_kernels.bench.measure import Measurement, measure
from unilogit_kernels.bench.problems import Shape

COMPARABLE = 2.0
"""Errors are comparable if ours is at most this many times the other's, or is one rounding."""


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set() if cpu.is_available() else None,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "unilogit_kernels": unilogit_kernels.__version__,
    }


def run(
    shapes: Iterable[Shape],
    *,
    rounds: int,
    memory: bool,
    console: Console,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure every shape, printing a table for each, and return everything that was measured."""
    console.print(machine())
    results = []
    for shape in shapes:
        measurements = measure(shape, rounds=rounds, memory=memory, only=only)
        console.print(table(shape, measurements))
        results.append(
            {
                "shape": asdict(shape),
                "title": shape.title,
                "measurements": [asdict(m) for m in measurements],
            }
        )
    return {"machine": machine(), "rounds": rounds, "results": results}


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON, and as a Markdown table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))


_COLUMNS = (
    "who",
    "loss",
    "median ms",
    "min - max",
    "ours is faster by",
    "error: loss",
    "error: gradients",
    "peak MiB",
)


def table(shape: Shape, measurements: list[Measurement]) -> Table:
    """One shape, for a terminal."""
    result = Table(title=shape.title, title_justify="left")
    for column in _COLUMNS:
        result.add_column(column, justify="left" if column in ("who", "loss") else "right")
    for row in rows(measurements):
        result.add_row(*row)
    return result


def markdown(report: dict[str, Any]) -> str:
    """All shapes as Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        "# Measured",
        "",
        f"{facts}; {report['rounds']} alternating rounds of forward and backward.",
        "",
        "Errors are relative to float64. Peak is resident memory beyond inputs and gradients, in a",
        "fresh process. A ratio in brackets is not a speed-up: it compares with a floor, or with a",
        "loss that is lighter or of another accuracy.",
    ]
    for result in report["results"]:
        lines += ["", f"## {result['title']}", "", f"| {' | '.join(_COLUMNS)} |"]
        lines.append("|" + "---|" * len(_COLUMNS))
        measurements = [Measurement(**m) for m in result["measurements"]]
        lines += [f"| {' | '.join(row)} |" for row in rows(measurements)]
    return "\n".join(lines) + "\n"


def rows(measurements: list[Measurement]) -> list[list[str]]:
    """The cells of a table; a ratio that is no speed-up stands in brackets."""
    ours = measurements[0]
    return [_row(ours, m) for m in measurements]


def _row(ours: Measurement, m: Measurement) -> list[str]:
    if m.missing is not None:
        return [m.provider, m.loss, "did not run", m.missing, "", "", "", ""]

    def scientific(x: float | None) -> str:
        return "" if x is None else f"{x:.1e}"

    ratio = "" if m is ours or m.relative_to_ours is None else f"{m.relative_to_ours:.2f}x"
    if ratio and not _comparable(ours, m):
        ratio = f"({ratio})"
    return [
        m.provider,
        m.loss,
        f"{m.median:.1f}",
        f"{min(m.milliseconds):.1f} - {max(m.milliseconds):.1f}",
        ratio,
        scientific(m.loss_error),
        scientific(m.gradient_error),
        "" if m.peak_mib is None else f"{m.peak_mib:.0f}",
    ]


def _comparable(ours: Measurement, other: Measurement) -> bool:
    """Whether the ratio is a speed-up: another implementation, and we are not less accurate."""
    if other.loss == "floor" or ours.gradient_error is None or other.gradient_error is None:
        return False
    return ours.gradient_error <= max(COMPARABLE * other.gradient_error, 1e-6)
