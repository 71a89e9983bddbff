"""Plots of a session: `python -m benchmarks.gpu_session.plots DIR`, where matplotlib is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_session.summary import JSON

_MOST_BARS = 14


def main(out: Path) -> None:
    """One picture of all speeds, one of the kernels of a step."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    matplotlib.use("Agg")
    stages = json.loads((out / JSON).read_text())["stages"]
    _bars(out / "speed.png", _times(stages.get("speed", {})), "ms")
    _bars(out / "kernels.png", _kernels(stages.get("profile", {})), "µs a step")


def _times(records: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    for case, record in records.items():
        measured = record.get("data", {}).get("measurements") or record.get("rows") or []
        times = {
            row["provider"]: median(row["milliseconds"])
            for row in measured
            if row.get("milliseconds")
        }
        if times:
            found[case] = times
    return found


def _kernels(records: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        case: {kernel["name"][:50]: kernel["us"] for kernel in record["data"]["kernels"]}
        for case, record in records.items()
        if case.startswith("step") and record.get("data", {}).get("kernels")
    }


def _bars(path: Path, groups: dict[str, dict[str, float]], unit: str) -> None:
    """A row of bars for each group, the shortest first."""
    import matplotlib.pyplot as plt

    if not groups:
        return
    figure, axes = plt.subplots(len(groups), 1, figsize=(9, 3.2 * len(groups)), squeeze=False)
    for axis, (title, values) in zip(axes[:, 0], groups.items(), strict=True):
        shown = sorted(values.items(), key=lambda item: item[1])[:_MOST_BARS]
        axis.barh([name for name, _ in shown], [value for _, value in shown])
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(unit, fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
