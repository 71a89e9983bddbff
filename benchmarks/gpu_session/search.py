"""A search over settings: each knob by itself, then the best of each together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.gpu_session.cases import Report

Settings = dict[str, Any]
"""Values of knobs by name; what is not named is as it is today."""
WORTH_TRYING = 0.995
"""A time of more than this share of today's is no gain."""


def singles(knobs: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Each value of each knob, alone."""
    return [{name: value} for name, values in knobs.items() for value in values]


def search(
    knobs: Mapping[str, Sequence[Any]],
    milliseconds: Callable[[Settings], float],
    report: Report = lambda rows: None,
) -> dict[str, Any]:
    """Time today's settings, each change alone, and gains added to each other as long as they help.

    Args:
        knobs: Values to try, by name.
        milliseconds: Of some settings. What it raises is noted, and the settings are passed over.
        report: Given every row so far.

    Returns:
        `today` and `best` in milliseconds, the `settings` of the best, and all `rows`.
    """
    rows: list[dict[str, Any]] = []

    def time(settings: Settings) -> float:
        row: dict[str, Any] = {"settings": dict(settings)}
        try:
            row["ms"] = milliseconds(settings)
        except Exception as error:  # as when there are not registers enough
            row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        rows.append(row)
        report(rows)
        return float(row.get("ms", math.inf))

    today = time({})
    alone = {name: [(time({name: value}), value) for value in knobs[name]] for name in knobs}
    gains = [(*min(tried, key=lambda each: each[0]), name) for name, tried in alone.items()]
    best, chosen = today, Settings()
    for alone_ms, value, name in sorted(gains, key=lambda gain: gain[0]):
        if alone_ms > WORTH_TRYING * today:
            break
        together = {**chosen, name: value}
        found = alone_ms if not chosen else time(together)
        if found < best:
            best, chosen = found, together
    # Again, since clocks may have moved meanwhile.
    return {
        "today": min(today, time({})),
        "best": min(best, time(chosen)) if chosen else today,
        "settings": chosen,
        "rows": rows,
    }
