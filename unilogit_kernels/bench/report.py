"""Runs a set of shapes and writes what was measured: JSON, CSV, Markdown, plots, tables."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unilogit_kernels.bench.compare import fastest_peer, find_ours, speed_up, verdict
from unilogit_kernels.bench.devices import Device
from unilogit_kernels.bench.measure import Measurement, Options, measure
from unilogit_kernels.bench.problems import Shape

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class Result(NamedTuple):
    """What was measured on one shape.

    Attributes:
        shape: The problem.
        mode: What was timed.
        seconds: How long measuring took.
        measurements: Ours first.
    """

    shape: Shape
    mode: str
    seconds: float
    measurements: list[Measurement]

    @property
    def title(self) -> str:
        """Shape and mode, for headings."""
        return f"{self.shape.title}, {_MODE_NAMES[self.mode]}"


_MODE_NAMES = {
    "forward": "forward without gradients",
    "backward": "backward",
    "both": "forward and backward",
}


class Report(NamedTuple):
    """Everything that a run measured.

    Attributes:
        machine: On what.
        command: By what.
        results: One for each shape and mode.
    """

    machine: dict[str, Any]
    command: str
    results: list[Result]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "machine": self.machine,
            "command": self.command,
            "results": [
                {
                    "title": result.title,
                    **result._asdict(),
                    "shape": asdict(result.shape),
                    "measurements": [asdict(m) for m in result.measurements],
                }
                for result in self.results
            ],
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Report:
        """The inverse of `as_dict`."""
        results = [
            Result(
                Shape(**result["shape"]),
                result["mode"],
                result["seconds"],
                [Measurement(**m) for m in result["measurements"]],
            )
            for result in values["results"]
        ]
        return Report(values["machine"], values["command"], results)


def read(path: Path) -> Report:
    """A report from its JSON."""
    return Report.from_dict(json.loads(path.read_text()))


def run(
    shapes: Sequence[Shape],
    device: Device,
    options: Sequence[Options],
    *,
    console: Console,
    command: str = "",
    path: Path | None = None,
    resume: bool = False,
    brief: bool = False,
) -> Report:
    """Measure every shape under every option, printing a table for each.

    Args:
        shapes: The problems.
        device: Where.
        options: How, usually one for each mode.
        console: Where the tables go.
        command: What was called, for the report.
        path: JSON file that is written after each shape, or None.
        resume: Keep what the file holds already, and skip it.
        brief: Whether the tables leave out spreads, peaks and who did not run.
    """
    report = Report(device.facts(), command, [])
    if resume and path is not None and path.exists():
        report = read(path)
    done = {(result.shape, result.mode) for result in report.results}
    console.print(report.machine)
    todo = [(s, o) for s in shapes for o in options if (s, o.mode) not in done]
    for index, (shape, chosen) in enumerate(todo, 1):
        start = time.perf_counter()
        console.print(f"{shape.title}, {_MODE_NAMES[chosen.mode]}:", highlight=False)

        def progress(line: str, start: float = start) -> None:
            seconds = time.perf_counter() - start
            console.print(f"  {seconds:4.0f} s  {line}", style="dim", highlight=False, markup=False)

        measurements = measure(shape, device, chosen, progress)
        result = Result(shape, chosen.mode, time.perf_counter() - start, measurements)
        report.results.append(result)
        console.print(table(result, brief=brief))
        console.print(f"{index} of {len(todo)}; measured in {result.seconds:.0f} s\n")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    return report


# ---- for people --------------------------------------------------------------------------------

COLUMNS = (
    "who",
    "loss",
    "median ms",
    "min - max",
    "rounds",
    "ours is",
    "error: loss",
    "error: gradients",
    "peak MiB",
)
_LEFT = ("who", "loss", "ours is")
_BRIEF = ("who", "loss", "median ms", "ours is", "error: gradients")
"""Columns that fit a narrow terminal."""


def rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    """The cells of a table."""
    return [_row(find_ours(measurements, m.loss), m) for m in measurements]


def _row(ours: Measurement | None, m: Measurement) -> list[str]:
    if m.missing is not None:
        return [m.provider, m.loss, "did not run", "", "", m.missing, "", "", ""]
    return [
        m.provider,
        m.loss,
        _short(m.median),
        f"{_short(min(m.milliseconds))} - {_short(max(m.milliseconds))}",
        str(len(m.milliseconds)),
        "" if ours is None else verdict(ours, m),
        _scientific(m.loss_error),
        _scientific(m.gradient_error) if m.mode != "forward" else "",
        m.memory_missing or _mib(m),
    ]


def _mib(m: Measurement) -> str:
    # Below 0 is noise: pages that were given back during the step.
    return "" if m.peak_mib is None else f"{max(m.peak_mib, 0):,.0f}"


def _short(milliseconds: float) -> str:
    """Three digits are as many as a time on a shared machine deserves."""
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _scientific(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def table(result: Result, *, brief: bool = False) -> Table:
    """One shape, for a terminal.

    Args:
        result: What was measured.
        brief: Whether to leave out spreads, peaks and who did not run.
    """
    from rich.table import Table

    shown = [m for m in result.measurements if not brief or m.missing is None]
    drawn = Table(title=result.title, title_justify="left")
    columns = _BRIEF if brief else COLUMNS
    for column in columns:
        drawn.add_column(column, justify="left" if column in _LEFT else "right")
    for row in rows(shown):
        drawn.add_row(*(row[COLUMNS.index(column)] for column in columns))
    return drawn


# ---- files -------------------------------------------------------------------------------------


def write(report: Report, path: Path) -> list[Path]:
    """Write CSV, Markdown and, with matplotlib, plots beside the JSON; returns what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    _write_csv(report, path.with_suffix(".csv"))
    path.with_suffix(".md").write_text(markdown(report))
    return [path, path.with_suffix(".csv"), path.with_suffix(".md")]


def _write_csv(report: Report, path: Path) -> None:
    """One line for each provider, shape and mode."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        shape_fields = list(Shape.__dataclass_fields__)
        fields = (
            "provider,loss,mode,median_ms,min_ms,max_ms,rounds,first_call_s,time_over_ours,"
            "speed_up,loss_error,gradient_error,peak_mib,missing"
        )
        writer.writerow(["entry", *shape_fields, *fields.split(",")])
        for result in report.results:
            for m in result.measurements:
                ours = find_ours(result.measurements, m.loss)
                times = m.milliseconds
                spread = [m.median, min(times), max(times)] if times else [None] * 3
                writer.writerow(
                    [
                        result.shape.entry,
                        *asdict(result.shape).values(),
                        m.provider,
                        m.loss,
                        m.mode,
                        *spread,
                        len(times),
                        m.first_call_s,
                        m.relative_to_ours,
                        None if ours is None else speed_up(ours, m),
                        m.loss_error,
                        m.gradient_error,
                        m.peak_mib,
                        m.missing,
                    ]
                )


def markdown(report: Report) -> str:
    """A summary, then all shapes."""
    facts = ", ".join(f"{key} {value}" for key, value in report.machine.items())
    lines = [
        "# Measured",
        "",
        f"{facts}.",
        "",
        *([f"By `{report.command}`.", ""] if report.command else []),
        "Times are medians of rounds in which everybody takes turns; a step of more than 5 s gets",
        "fewer of them. Errors are relative to float64; peaks are memory beyond inputs and",
        "gradients. A speed-up is the median of the ratios within a round, over ours for the same",
        "loss. None is stated where ours would be less accurate or the other's result is wrong.",
        "Bounds are compared with ours for Unilogit.",
        "",
        "## Summary",
        "",
        *summary(report),
    ]
    for result in report.results:
        lines += ["", f"## {result.title}", "", f"| {' | '.join(COLUMNS)} |"]
        lines.append("|" + "".join("---|" if c in _LEFT else "---:|" for c in COLUMNS))
        lines += [f"| {' | '.join(row)} |" for row in rows(result.measurements)]
    return "\n".join(lines) + "\n"


_EAGER, _CROSS_ENTROPY = "eager Unilogit", "F.cross_entropy"
_SUMMARY = (
    "problem",
    "ours, ms",
    "over the lowest bound",
    f"faster than {_EAGER}",
    f"faster than {_CROSS_ENTROPY}",
    "fastest peer",
    "faster than it",
    "peak MiB, ours",
    f"{_EAGER}'s",
    "gradient error, ours",
    f"{_EAGER}'s",
)


def summary(report: Report) -> list[str]:
    """Lines of a Markdown table with one row for each problem, fit for a README."""
    lines = [f"| {' | '.join(_SUMMARY)} |", "|---|" + "---:|" * (len(_SUMMARY) - 1)]
    for result in report.results:
        ours = find_ours(result.measurements)
        if ours is None:
            reasons = {m.missing for m in result.measurements if m.missing}
            cells = [result.title, f"did not run: {'; '.join(sorted(reasons))}"]
            cells += [""] * (len(_SUMMARY) - 2)
        else:
            cells = _summary_cells(result, ours)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _summary_cells(result: Result, ours: Measurement) -> list[str]:
    by_name = {m.provider: m for m in result.measurements if m.milliseconds}
    eager, cross = by_name.get(_EAGER), by_name.get(_CROSS_ENTROPY)
    fastest = fastest_peer(result.measurements)
    bounds = [
        1 / m.relative_to_ours
        for m in by_name.values()
        if m.loss == "floor" and m.relative_to_ours is not None
    ]

    def faster(other: Measurement | None) -> str:
        if other is None:
            return ""
        same_job = find_ours(result.measurements, other.loss)
        ratio = None if same_job is None else speed_up(same_job, other)
        return "not comparable" if ratio is None else f"{ratio:.2f}x"

    return [
        result.title,
        _short(ours.median),
        f"{max(bounds):.2f}x" if bounds else "",
        faster(eager),
        faster(cross),
        "" if fastest is None else f"{fastest.provider} ({fastest.loss})",
        faster(fastest),
        _mib(ours),
        "" if eager is None else _mib(eager),
        _scientific(ours.gradient_error),
        "" if eager is None else _scientific(eager.gradient_error),
    ]
