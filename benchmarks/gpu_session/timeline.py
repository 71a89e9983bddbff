"""What a device did in a step, and when: shares of kernels, and gaps between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

GAP_MICROSECONDS = 3.0
"""A shorter gap is what the device takes from a kernel to the next one that waits already."""


class Event(NamedTuple):
    """Something that the device did, in microseconds.

    Attributes:
        name: Of the kernel, or of a copy or fill.
        start: When it began.
        end: When it ended.
    """

    name: str
    start: float
    end: float


def describe(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Of a step: microseconds busy and idle, and the kernels by their time.

    Args:
        events: Of all steps, in any order; they may overlap.
        steps: How many there were, one after the other.
    """
    if not events:
        return {"launches": 0, "kernels": []}
    ordered = sorted(events, key=lambda event: event.start)
    busy, reached, gaps = 0.0, ordered[0].start, []
    for event in ordered:
        if event.start > reached:
            gaps.append(event.start - reached)
        busy += max(0.0, event.end - max(event.start, reached))
        reached = max(reached, event.end)
    long = [gap for gap in gaps if gap >= GAP_MICROSECONDS]
    span = reached - ordered[0].start
    return {
        "launches": round(len(events) / steps, 1),
        "busy_us": round(busy / steps, 1),
        "span_us": round(span / steps, 1),
        "busy_share": round(busy / span, 4) if span else 1.0,
        "gaps": round(len(long) / steps, 1),
        "gaps_us": round(sum(long) / steps, 1),
        "longest_gap_us": round(max(gaps, default=0.0), 1),
        "kernels": _by_time(ordered, steps),
    }


def _by_time(events: Sequence[Event], steps: int) -> list[dict[str, Any]]:
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        durations[event.name].append(event.end - event.start)
    total = sum(map(sum, durations.values())) or 1.0
    return [
        {
            "name": name,
            "calls": round(len(each) / steps, 1),
            "us": round(sum(each) / steps, 1),
            "longest_us": round(max(each), 1),
            "share": round(sum(each) / total, 4),
        }
        for name, each in sorted(durations.items(), key=lambda item: -sum(item[1]))
    ]
