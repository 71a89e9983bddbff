"""What figures draw of runs: lines over steps and over forgetting, and spreads over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unilogit_kernels.unlearning.comparison.matching import at_target, spread
from unilogit_kernels.unlearning.comparison.measure import ALL
from unilogit_kernels.unlearning.comparison.summary import Run, Summary, Swept, seen

_POINTS = 60
"""Of a line between start and target."""

Floats = NDArray[np.float64]


class Line(NamedTuple):
    """A mean over seeds, and the least and the most of them, at each place.

    Attributes:
        x: places.
        mean: at each.
        low: at each.
        high: at each.
    """

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


class Dot(NamedTuple):
    """A mean over seeds with its whisker.

    Attributes:
        x: where it is.
        mean: of the seeds.
        half: half the width of its interval; 0 where it is not known.
    """

    x: float
    mean: float
    half: float


def over_steps(runs: Sequence[Run], measure: str) -> Line | None:
    """A measure over the steps that all runs took."""
    curves = []
    for run in runs:
        points = [(c["step"], seen(c["sets"], measure)) for c in run.found["checks"]]
        known = [(float(step), value) for step, value in points if value is not None]
        if len(known) > 1:
            curves.append(known)
    if not curves:
        return None
    last = min(curve[-1][0] for curve in curves)
    steps = sorted({step for curve in curves for step, _ in curve if step <= last})
    return _line(np.array(steps), [np.interp(steps, *np.array(curve).T) for curve in curves])


def over_forgetting(runs: Sequence[Run], measure: str, target: float) -> Line | None:
    """A measure over the forget probability, from the start down to the target.

    Where a run does not come so low, down to where all of them came.
    """
    lows, starts = [], []
    for run in runs:
        forgotten = [float(c["sets"]["forget"][ALL]["probability"]) for c in run.found["checks"]]
        lows.append(max(min(forgotten), target))
        starts.append(forgotten[0])
    if not runs or max(lows) >= min(starts):
        return None
    places = np.linspace(min(starts), max(lows), _POINTS)
    curves = []
    for run in runs:
        matches = [at_target(run.found["checks"], float(place) + 1e-12) for place in places]
        values = [None if match is None else seen(match.sets, measure) for match in matches]
        if None in values:
            return None
        curves.append(np.array(values, dtype=np.float64))
    return _line(places, curves)


def _line(x: Floats, curves: Sequence[Floats]) -> Line:
    stacked = np.stack(curves)
    return Line(x, stacked.mean(0), stacked.min(0), stacked.max(0))


def dot(x: float, values: Sequence[float]) -> Dot | None:
    """The spread of some seeds' values, or None where there are none."""
    if not values:
        return None
    found = spread(values)
    return Dot(x, found.mean, found.half or 0.0)


def over(swept: Swept, measure: str, setting_in: int) -> list[Dot]:
    """A measure at the target over one setting, each value at what is chosen of the other for it.

    Args:
        swept: the method.
        measure: `set.measure`.
        setting_in: position of the setting in `Setting`.
    """
    dots = (
        dot(value, values_of(swept.at(setting), lambda run: run.seen(measure)))
        for value, (_, setting) in swept.best_over(setting_in).items()
    )
    return [each for each in dots if each is not None]


def values_of(runs: Sequence[Run], value: Callable[[Run], float | None]) -> list[float]:
    """What runs have of something, as far as they have it."""
    found = (value(run) for run in runs)
    return [each for each in found if each is not None]


def swept_points(summary: Summary, measure: str) -> list[tuple[int, float]]:
    """Of each setting that was not chosen, its method's position and its mean at the target."""
    found = []
    for position, swept in enumerate(summary.methods):
        for setting in swept.settings:
            values = values_of(swept.at(setting), lambda run: run.seen(measure))
            if setting != swept.chosen and values:
                found.append((position, sum(values) / len(values)))
    return found
