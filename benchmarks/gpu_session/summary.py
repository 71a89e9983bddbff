"""What a session has found, for people: Markdown, JSON, and plots where matplotlib is there."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.cases import family_of
from benchmarks.gpu_session.ledger import (
    ENDS,
    FAILED,
    LISTED,
    LOST,
    MISSING,
    OK,
    Ledger,
    Record,
    write_whole,
)

MARKDOWN, JSON = "summary.md", "summary.json"
_MOST_FAILURES = 60
_LEAST_SECONDS_TO_DRAW = 5.0


def write(ledger: Ledger, out: Path, *, minutes: float, rehearsal: bool) -> None:
    """Write both, of what is known now."""
    stages = list(dict.fromkeys(record["stage"] for record in ledger.records))
    known = {stage: ledger.last(stage) for stage in stages}
    counts = {stage: _count(ledger, stage, known[stage]) for stage in stages}
    lines = [
        "# A session on a GPU",
        "",
        *(["A rehearsal on a CPU: no time here means anything.", ""] if rehearsal else []),
        f"Of {minutes:g} minutes.",
        "",
        *_machine(known.get("machine", {})),
        *_counts(counts),
        *_failures(known),
        *_kernels(known),
        *_speed(known.get("speed", {})),
        *_tuning(known.get("tuning", {})),
        *_profile(known.get("profile", {})),
    ]
    write_whole(out / MARKDOWN, "\n".join(lines) + "\n")
    figures = {"minutes": minutes, "rehearsal": rehearsal, "counts": counts, "stages": known}
    write_whole(out / JSON, json.dumps(figures, indent=1, default=str) + "\n")


def draw(out: Path, seconds: float) -> None:
    """Plots, by a process that has so many seconds for them."""
    if seconds < _LEAST_SECONDS_TO_DRAW:
        return
    command = [sys.executable, "-m", "benchmarks.gpu_session.plots", str(out)]
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        subprocess.run(command, timeout=seconds - 1, check=False)


# ---- counts and failures -----------------------------------------------------------------------


def _count(ledger: Ledger, stage: str, known: dict[str, Record]) -> dict[str, int]:
    listed = [
        record["count"]
        for record in ledger.records
        if record["stage"] == stage and record["status"] == LISTED
    ]
    counts = Counter(record["status"] for record in known.values())
    found = {status: counts[status] for status in ENDS}
    # A case may have been stopped, or not begun.
    return {**found, "left": max(0, max(listed, default=0) - sum(found.values()))}


def _counts(counts: dict[str, dict[str, int]]) -> list[str]:
    columns = (*ENDS, "left")
    rows = [[stage, *(str(found[name]) for name in columns)] for stage, found in counts.items()]
    return ["## Cases", "", *table(("stage", *columns), rows), ""]


def _failures(known: dict[str, dict[str, Record]]) -> list[str]:
    lines = []
    for status, title in (
        (FAILED, "Failures"),
        (LOST, "Killed or dead"),
        (MISSING, "What is missing"),
    ):
        found = [
            (stage, case, record.get("why", ""))
            for stage, records in known.items()
            for case, record in records.items()
            if record["status"] == status
        ]
        if not found:
            continue
        lines += [f"## {title}", ""]
        if status == MISSING:
            lines += _by_reason(found)
        else:
            shown = found[:_MOST_FAILURES]
            lines += [f"- {stage}: `{case}`: {why[:300]}" for stage, case, why in shown]
            if len(found) > len(shown):
                lines.append(f"- and {len(found) - len(shown)} more, in `{JSON}`")
        lines.append("")
    return lines


def _by_reason(found: Sequence[tuple[str, str, str]]) -> list[str]:
    cases: dict[str, list[str]] = defaultdict(list)
    for _, case, why in found:
        cases[why].append(case)
    return [
        f"- {why}: {len(names)} cases, as `{names[0]}`"
        if len(names) > 1
        else f"- {why}: {names[0]}"
        for why, names in cases.items()
    ]


def _machine(records: dict[str, Record]) -> list[str]:
    facts = records.get("what it is", {}).get("data")
    if not facts:
        return []
    return ["## Machine", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]


def _kernels(known: dict[str, dict[str, Record]]) -> list[str]:
    """Of each backend and kernel, or function: how many cases were right, and how nearly not."""
    found: dict[str, list[Record]] = defaultdict(list)
    for stage in ("machine", "right"):
        for case, record in known.get(stage, {}).items():
            if record["status"] in (OK, FAILED, LOST) and "=" in case:
                found[family_of(case)].append(record)
    rows = []
    for name, records in sorted(found.items()):
        counts = Counter(record["status"] for record in records)
        worst = max((record.get("data", {}).get("worst", 0.0) for record in records), default=0.0)
        rows.append([name, counts[OK], counts[FAILED], counts[LOST], f"{worst:.2f}"])
    if not rows:
        return []
    columns = ("what", "right", "failed", "lost", "largest error, of what is allowed")
    return ["## Right", "", *table(columns, rows), ""]


# ---- times -------------------------------------------------------------------------------------


def _speed(records: dict[str, Record]) -> list[str]:
    lines = []
    rates = records.get("rates", {}).get("data")
    if rates:
        lines += ["## Rates", "", *(f"- {name}: {value}" for name, value in rates.items()), ""]
    for case, record in records.items():
        data = record.get("data", {})
        if "cells" in data:
            clocks = ", ".join(f"{name} {value}" for name, value in data["clocks"].items())
            lines += [f"## {case}", "", *([f"{clocks}.", ""] if clocks else [])]
            lines += [*table(data["columns"], data["cells"]), ""]
        elif record.get("rows"):
            lines += [f"## {case}, cut short", "", *_cut_short(record["rows"]), ""]
    return lines


def _cut_short(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Medians of those that were timed until then."""
    columns = ("who", "loss", "median ms", "rounds", "error: loss", "error: gradients")
    cells = []
    for row in rows:
        times = sorted(row["milliseconds"])
        median = f"{times[len(times) // 2]:.3g}" if times else row["missing"] or "not timed yet"
        errors = (_error(row[name]) for name in ("loss_error", "gradient_error"))
        cells.append([row["provider"], row["loss"], median, len(times), *errors])
    return table(columns, cells)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _tuning(records: dict[str, Record]) -> list[str]:
    lines = []
    for case, record in records.items():
        data = record.get("data", {})
        rows = data.get("rows") or record.get("rows") or []
        if not rows:
            continue
        lines += [f"## {case}", ""]
        if data:
            gain = data["today"] / data["best"] if data["best"] else 1.0
            lines += [
                f"Today {data['today']:.3f} ms, best {data['best']:.3f} ms ({gain:.2f}x) with "
                f"{_settings(data['settings'])}.",
                "",
            ]
        cells = [
            [_settings(row["settings"]), f"{row['ms']:.3f}" if "ms" in row else row["error"]]
            for row in rows
        ]
        lines += [*table(("settings", "ms"), cells), ""]
    return lines


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "today's settings"


def _profile(records: dict[str, Record]) -> list[str]:
    lines = []
    for case, record in records.items():
        data = dict(record.get("data") or (record.get("rows") or [{}])[0])
        if not data:
            continue
        kernels = data.pop("kernels", [])
        said = ", ".join(f"{name} {value}" for name, value in data.items())
        lines += [f"## {case}", "", *([f"{said}.", ""] if said else [])]
        if kernels:
            columns = list(dict.fromkeys(name for kernel in kernels for name in kernel))
            cells = [[_short(kernel.get(name, "")) for name in columns] for kernel in kernels]
            lines += [*table(columns, cells), ""]
    return lines


def _short(value: Any) -> str:
    return f"`{value[:80]}`" if isinstance(value, str) and value else str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table."""
    return list(_table(columns, rows))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"
