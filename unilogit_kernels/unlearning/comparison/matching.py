"""Runs at the same forgetting, and what that says of their settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from unilogit_kernels.unlearning.comparison.measure import ALL, Look
from unilogit_kernels.unlearning.metrics.intervals import CONFIDENCE

Checks = Sequence[Mapping[str, Any]]
"""What each look of a run saw: `step`, and `sets`, a `Look`."""


class Match(NamedTuple):
    """A run at the target.

    Attributes:
        step: at which it came there, between two looks.
        sets: what was seen there.
    """

    step: float
    sets: Look


class Spread(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of them.
        half: half the width of its 95 % interval, by Student's t; None for one seed.
        seeds: how many there are.
    """

    mean: float
    half: float | None
    seeds: int


def at_target(checks: Checks, target: float) -> Match | None:
    """A run where its forget probability first falls to a target, linear between two looks.

    Args:
        checks: in the order of their steps.
        target: forget probability.

    Returns:
        None where it never falls so low.

    Example:
        >>> def check(step, p, kept):
        ...     sets = {"forget": {"all": {"probability": p}}, "retain": {"all": {"exact": kept}}}
        ...     return {"step": step, "sets": sets}
        >>> found = at_target([check(0, 0.9, 1.0), check(5, 0.5, 0.9), check(10, 0.1, 0.5)], 0.4)
        >>> found.step, round(found.sets["retain"]["all"]["exact"], 6)
        (6.25, 0.8)
    """
    before: Mapping[str, Any] | None = None
    for check in checks:
        now = _forgotten(check)
        if now <= target:
            if before is None:
                return Match(float(check["step"]), check["sets"])
            high = _forgotten(before)
            share = (high - target) / (high - now)
            step = before["step"] + share * (check["step"] - before["step"])
            return Match(step, _between(before["sets"], check["sets"], share))
        before = check
    return None


def _forgotten(check: Mapping[str, Any]) -> float:
    return float(check["sets"]["forget"][ALL]["probability"])


def _between(first: Any, second: Any, share: float) -> Any:
    if isinstance(first, Mapping):
        return {name: _between(first[name], second[name], share) for name in first}
    if first is None or second is None:  # It was not finite.
        return None
    return (1 - share) * first + share * second


def spread(values: Sequence[float]) -> Spread:
    """A mean over seeds and its interval.

    Args:
        values: one for each seed, at least one.

    Example:
        >>> found = spread([0.8, 0.9, 1.0])
        >>> round(found.mean, 3), round(found.half, 3), found.seeds
        (0.9, 0.248, 3)
    """
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Spread(mean, None, count)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Spread(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error, count)


def is_within_noise(values: Mapping[int, float], best: Mapping[int, float]) -> bool:
    """Whether a method's difference from the best one may be that of the seeds.

    Of the seeds that both have the 95 % interval of the mean difference, seed by seed, holds 0.

    Args:
        values: by seed.
        best: of the best one, by seed.

    Returns:
        False where fewer than two seeds are common: nothing is known of the noise then.

    Example:
        >>> is_within_noise({0: 0.8, 1: 0.9}, {0: 0.85, 1: 0.87})
        True
        >>> is_within_noise({0: 0.5, 1: 0.51, 2: 0.49}, {0: 0.9, 1: 0.91, 2: 0.9})
        False
    """
    common = [seed for seed in values if seed in best]
    if len(common) < 2:
        return False
    found = spread([values[seed] - best[seed] for seed in common])
    return found.half is not None and abs(found.mean) <= found.half
