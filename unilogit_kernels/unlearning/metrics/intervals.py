"""Aggregates over rows, and how far other rows of the same kind would have moved them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 1000
"""Of a bootstrap: the ends of a 95 % interval are the 25th and the 975th of them."""
_SEED = 0
_CHUNK = 2**21
"""Numbers drawn at once, so that memory does not grow with the rows."""

Statistic = Callable[..., Any]
"""From arrays `[..., rows]` to numbers `[...]`."""


class Estimate(NamedTuple):
    """An aggregate, and its 95 % interval over rows.

    Attributes:
        value: of the rows given.
        low: lower end of the interval, or None where one row tells nothing of it.
        high: upper end, or None.
        rows: how many rows it is of.
    """

    value: float
    low: float | None
    high: float | None
    rows: int


def bootstrap(statistic: Statistic, *groups: Sequence[ArrayLike]) -> Estimate:
    """A statistic and its percentile bootstrap interval.

    Rows are drawn with replacement, `RESAMPLES` times, with a fixed seed: the same rows give the
    same interval. The rows of different groups are drawn apart, the arrays of one group together.

    Args:
        statistic: of all arrays of all groups in their order, `[..., rows]` each.
        groups: arrays `[rows]` about the same rows.

    Example:
        >>> import numpy as np
        >>> gap = lambda first, second: first.mean(-1) - second.mean(-1)
        >>> found = bootstrap(gap, [np.array([3.0, 5.0])], [np.array([1.0, 1.0, 1.0])])
        >>> found.value, found.low, found.high, found.rows
        (3.0, 2.0, 4.0, 5)
    """
    arrays = [[np.asarray(array) for array in group] for group in groups]
    sizes = [len(group[0]) for group in arrays]
    value = float(statistic(*(array for group in arrays for array in group)))
    if max(sizes) < 2:
        return Estimate(value, None, None, sum(sizes))
    draw = np.random.default_rng(_SEED)
    chunk = max(1, _CHUNK // sum(sizes))
    found: list[NDArray[np.float64]] = []
    for start in range(0, RESAMPLES, chunk):
        times = min(chunk, RESAMPLES - start)
        drawn = []
        for group, size in zip(arrays, sizes, strict=True):
            positions = draw.integers(size, size=(times, size))
            drawn += [array[positions] for array in group]
        found.append(np.asarray(statistic(*drawn), dtype=np.float64))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Estimate(value, float(low), float(high), sum(sizes))


def mean_estimate(values: ArrayLike) -> Estimate:
    """The mean over rows, by bootstrap.

    Args:
        values: `[rows]`, at least one.

    Example:
        >>> mean_estimate([1.0, 1.0, 1.0])
        Estimate(value=1.0, low=1.0, high=1.0, rows=3)
    """
    return bootstrap(lambda drawn: np.mean(drawn, axis=-1, dtype=np.float64), [values])


def share_estimate(hits: Sequence[bool]) -> Estimate:
    """The share of rows of which something is so, with Clopper and Pearson's exact interval.

    Unlike a bootstrap's it has a width where all rows agree: of 20 rows of which none was recalled,
    as much as 17 % may be recallable.

    Args:
        hits: `[rows]`, at least one.

    Example:
        >>> found = share_estimate([False] * 20)
        >>> found.value, found.low, round(found.high, 3)
        (0.0, 0.0, 0.168)
    """
    rows = len(hits)
    tested = stats.binomtest(int(sum(hits)), rows).proportion_ci(CONFIDENCE, method="exact")
    return Estimate(sum(hits) / rows, float(tested.low), float(tested.high), rows)
