"""The one look of all pictures of measurements: type, colours of axes, and plain numbers on them.

A picture is 7 inches wide, so that its type can be read at 400 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH = 7.0
SIZE = 11.0
"""Of all type, in points."""
MUTED = "#5C6169"
SMALL = 1e-3
"""Numbers below are written 1e-6."""
_RULE = "#D9D9D4"
_DIGIT = 0.036
"""Share of a panel's width that a digit of its ticks takes."""


@contextmanager
def look() -> Iterator[None]:
    """Have matplotlib draw in the one look of all pictures of measurements."""
    import matplotlib as mpl

    settings: Any = {
        "font.size": SIZE,
        "axes.titlesize": SIZE,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "grid.color": _RULE,
        "figure.titlesize": SIZE,
        "figure.titleweight": "bold",
        "figure.facecolor": "white",
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "legend.fontsize": SIZE,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": "black",
        "ytick.labelcolor": "black",
    }
    with mpl.rc_context(settings):
        yield


def save(figure: Any, path: Path) -> None:
    """A picture as PNG, with the same bytes each time."""
    figure.savefig(path, dpi=160, metadata={"Software": None})


def spaced(sizes: Sequence[int]) -> list[int]:
    """Of increasing sizes those whose numbers have room on a linear axis from 0."""
    kept: list[int] = []
    room = _DIGIT * (len(f"{max(sizes):,}") + 1) * max(sizes)
    for size in reversed(sizes):
        if not kept or kept[-1] - size >= room:
            kept.append(size)
    return kept[::-1]


def decades(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`: 1, 2, 5, 10, or powers of ten alone.

    Args:
        low: The least that is drawn, above 0.
        high: The most.
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first <= 2:
        every = [d * 10.0**p for p in range(first, last + 2) for d in (1, 2, 5)]
        below = max(x for x in every if x <= low * 1.001)
        above = min(x for x in every if x >= high / 1.001 and x > below)
        return [x for x in every if below <= x <= above]
    step = math.ceil((last - first) / 5)
    return [10.0**p for p in range(first, last + 1, step)]


def number(value: float, *, small: bool = False) -> str:
    """A number as people write it: 16,384, 2.5, and where an axis goes below a thousandth 1e-6."""
    if value and (small or abs(value) < SMALL):
        digits, exponent = f"{value:e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:,.10g}"


def plain(axis: Any) -> None:
    """Few ticks at round numbers on a linear axis of matplotlib's."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
