"""OpenUnlearning's files of results, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.errors import RunError, reading
from unilogit_kernels.unlearning.measuring.set_metrics import Metric
from unilogit_kernels.unlearning.measuring.store import write_json

_EVAL, _SUMMARY = "_EVAL.json", "_SUMMARY.json"


def title_of(benchmark: str) -> str:
    """What the names of the files begin with.

    Example:
        >>> title_of("tofu:forget10"), title_of("muse-news"), title_of("")
        ('TOFU', 'MUSE', 'ROWS')
    """
    return benchmark.partition(":")[0].partition("-")[0].upper() or "ROWS"


def as_logs(found: Mapping[str, Metric]) -> dict[str, Any]:
    """Metrics in the shape of `*_EVAL.json`: aggregates, and values by the position of the row."""
    return {name: _entry(metric) for name, metric in found.items()}


def _entry(metric: Metric) -> dict[str, Any]:
    entry: dict[str, Any] = {"agg_value": metric.estimate.value, **metric.others}
    if metric.values:
        entry["value_by_index"] = metric.values
    return entry


def write_logs(folder: Path, benchmark: str, logs: Mapping[str, Any]) -> None:
    """Write `*_EVAL.json` and `*_SUMMARY.json`.

    Args:
        folder: for both.
        benchmark: its name, see `title_of`.
        logs: see `as_logs`.
    """
    title = title_of(benchmark)
    summary = {name: entry["agg_value"] for name, entry in logs.items()}
    write_json(folder / f"{title}{_EVAL}", logs, indent=4, sort_keys=True)
    write_json(folder / f"{title}{_SUMMARY}", summary, indent=4, sort_keys=True)


def logs_in(path: Path) -> Path | None:
    """Where results lie: the file itself, or the one `*_EVAL.json` of a folder; None without.

    Raises:
        RunError: a folder holds several.
    """
    if path.is_file():
        return path
    found = sorted(path.glob(f"*{_EVAL}"))
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise RunError(f"{path} holds several files of results ({names}): name one of them")
    return found[0] if found else None


def read_logs(path: Path) -> dict[str, Any]:
    """Read a `*_EVAL.json`, ours or OpenUnlearning's.

    Args:
        path: of the file.

    Returns:
        By the name of the metric, what is known of it; at least its `agg_value`. Entries without
        one are left out.

    Raises:
        RunError: it cannot be read, or holds no results.
    """
    with reading(f"{path}: no results of an evaluation"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise RunError(f"{path}: no results of an evaluation, but {type(content).__name__}")
        logs = {
            name: entry
            for name, entry in content.items()
            if isinstance(entry, dict) and isinstance(entry.get("agg_value"), (int, float))
        }
    if not logs:
        raise RunError(f"{path}: holds no metric with an agg_value")
    return logs
