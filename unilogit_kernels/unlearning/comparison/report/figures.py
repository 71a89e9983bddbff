"""The figures of a report, each drawn by a function of the summary and of a theme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform
from numpy.typing import NDArray

from unilogit_kernels.unlearning.comparison.cell import GOLDEN, STARTING
from unilogit_kernels.unlearning.comparison.report.series import (
    Dot,
    dot,
    over,
    over_forgetting,
    over_steps,
    swept_points,
    values_of,
)
from unilogit_kernels.unlearning.comparison.report.style import HEIGHT, WIDTH, Theme, panel
from unilogit_kernels.unlearning.comparison.summary import Run, Summary

Draw = Callable[[Summary, Theme], Figure]

_MOST_TICKS = 8

_STEP = 5.5
"""Points from one method's mark to the next, beside the target."""
_FIRST_DIGITS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
    tuple(digits / 20 for digits in range(20, 200)),
)
"""Of ticks on a logarithmic axis: as few as make four of them."""


SETTINGS = ("learning rate", "forget weight")
"""The parts of a `Setting`."""
RATE, WEIGHT = range(2)
"""Their positions."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the report.

    Attributes:
        name: of its file.
        title: above it.
        alt: what it shows, for those who do not see it.
        draw: it.
        legend: whether its colours stand for the methods.
    """

    name: str
    title: str
    alt: str
    draw: Draw
    legend: bool = True


def spoken(name: str) -> str:
    """A set's or a measure's name in a sentence.

    Example:
        >>> spoken("forget_paraphrase.probability"), spoken("world_facts")
        ('forget paraphrase probability', 'world facts')
    """
    return name.replace("_", " ").replace(".", " ")


def tradeoff(measure: str) -> Draw:
    """A measure of what is kept over the forget probability, from the start to the target."""

    def draw(summary: Summary, theme: Theme) -> Figure:
        figure, axes = panel(HEIGHT + 0.5)
        for position, value in swept_points(summary, measure):
            look = theme.of(position)
            axes.plot(
                [summary.target],
                [value],
                color=look["color"],
                marker=look["marker"],
                markersize=4,
                alpha=0.4,
                linestyle="none",
                transform=_left_of(axes, figure, position),
            )
        for position, swept in enumerate(summary.methods):
            look = theme.of(position)
            line = over_forgetting(swept.best, measure, summary.target)
            if line is None:
                continue
            axes.plot(line.x, line.mean, color=look["color"], linestyle=look["linestyle"])
            at_end = dot(summary.target, values_of(swept.best, lambda run: run.seen(measure)))
            if at_end is None:
                axes.plot(
                    line.x[-1:],
                    line.mean[-1:],
                    look["marker"],
                    markersize=7.5,
                    zorder=4,
                    color=theme.surface,
                    markeredgecolor=look["color"],
                    markeredgewidth=1.4,
                )
                continue
            ends = whiskers([at_end])
            # What is drawn beside its place does not count for the limits of the axes.
            axes.update_datalim([(at_end.x, at_end.mean - ends[0, 0])])
            axes.update_datalim([(at_end.x, at_end.mean + ends[1, 0])])
            axes.errorbar(
                [at_end.x],
                [at_end.mean],
                yerr=ends,
                capsize=2,
                zorder=4,
                color=look["color"],
                marker=look["marker"],
                markersize=7,
                markeredgecolor=theme.surface,
                transform=_left_of(axes, figure, position),
            )
        for role, mark, side in ((STARTING, "D", 0), (GOLDEN, "*", 4)):
            x = summary.seen_of_model(role, "forget.probability")
            y = summary.seen_of_model(role, measure)
            if x is None or y is None:
                continue
            size = 12 if mark == "*" else 7
            axes.plot(x, y, mark, color=theme.ink, markersize=size, zorder=5, clip_on=False)
            axes.annotate(
                role,
                (x, y),
                (side, 7),
                textcoords="offset points",
                ha="right" if role == STARTING else "left",
                fontweight="bold",
                zorder=6,
            )
        axes.axvline(summary.target, color=theme.muted, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.set_xlabel("probability of the answers to forget  (less is forgotten more)")
        axes.set_ylabel(spoken(measure))
        axes.margins(x=0.06, y=0.12)
        # Room for the marks to the left of the target.
        right, share = axes.get_xlim()[1], (_STEP * len(summary.methods) + 8) / (72 * WIDTH * 0.8)
        axes.set_xlim(summary.target - share / (1 - share) * (right - summary.target), right)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return figure

    return draw


def _left_of(axes: Axes, figure: Figure, position: int) -> Transform:
    """Of a method's mark at the target, beside it, where it does not cover the others'."""
    shift = -(_STEP * position + 7) / 72
    return axes.transData + ScaledTranslation(shift, 0, figure.dpi_scale_trans)


def whiskers(dots: Sequence[Dot]) -> NDArray[np.float64]:
    """Lower and upper ends, `[2, dots]`, as far as a share can go."""
    low = [min(each.half, max(each.mean, 0.0)) for each in dots]
    high = [min(each.half, max(1.0 - each.mean, 0.0)) for each in dots]
    return np.array([low, high])


def over_setting(measure: str, setting_in: int) -> Draw:
    """A measure of what is kept at the target, over one of the `SETTINGS`."""

    def draw(summary: Summary, theme: Theme) -> Figure:
        figure, axes = panel()
        every: set[float] = set()
        for position, swept in enumerate(summary.methods):
            dots, look = over(swept, measure, setting_in), theme.of(position)
            if not dots:
                continue
            every |= {each.x for each in dots}
            axes.errorbar(
                [each.x for each in dots],
                [each.mean for each in dots],
                yerr=whiskers(dots),
                capsize=2.5,
                elinewidth=1,
                markeredgecolor=theme.surface,
                **look,
            )
        axes.set_xscale("log")
        ticks = sorted(every)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        _levels(axes, summary, theme, measure)
        axes.set_xlabel(SETTINGS[setting_in])
        axes.set_ylabel(spoken(measure))
        return figure

    return draw


def curves(measure: str) -> Draw:
    """A measure over the steps of each method's chosen runs."""

    def draw(summary: Summary, theme: Theme) -> Figure:
        figure, axes = panel(HEIGHT - 0.3)
        for position, swept in enumerate(summary.methods):
            line, look = over_steps(swept.best, measure), theme.of(position)
            if line is None:
                continue
            axes.fill_between(
                line.x, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0
            )
            axes.plot(line.x, line.mean, color=look["color"], linestyle=look["linestyle"])
            axes.plot(
                line.x[-1:],
                line.mean[-1:],
                look["marker"],
                color=look["color"],
                markeredgecolor=theme.surface,
            )
        _levels(axes, summary, theme, measure)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(spoken(measure))
        return figure

    return draw


def truth_ratios(name: str) -> Draw:
    """Distributions of a set's truth ratios: of the golden model, the starting one, the methods."""

    def draw(summary: Summary, theme: Theme) -> Figure:
        figure, axes = panel(HEIGHT + 0.2)

        def step(values: Sequence[float], **style: Any) -> None:
            ordered = np.sort(np.clip(np.asarray(values, dtype=np.float64), 1e-3, 1e3))
            share = np.arange(len(ordered) + 1) / len(ordered)
            axes.step([ordered[0], *ordered], share, where="post", **style)

        for position, swept in enumerate(summary.methods):
            look = theme.of(position)
            values = [
                value
                for run in swept.best
                for value in run.found["final"]["truth_ratios"].get(name, ())
            ]
            if values:
                step(values, color=look["color"], linestyle=look["linestyle"])
        for role, dashes in ((STARTING, (0, (4, 2))), (GOLDEN, "-")):
            values = summary.models[role]["final"]["truth_ratios"].get(name, ())
            if values:
                step(values, color=theme.ink, linewidth=2.4, linestyle=dashes)
        axes.set_xscale("log")
        ticks = _log_ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("truth ratio  (below 1: the truth is preferred)")
        axes.set_ylabel("share of rows at or below")
        return figure

    return draw


def _log_ticks(low: float, high: float) -> list[float]:
    found: list[float] = []
    for digits in _FIRST_DIGITS:
        every = (digit * 10.0**power for power in range(-4, 4) for digit in digits)
        found = [round(tick, 6) for tick in every if low <= tick <= high]
        if len(found) >= 4:
            break
    return found[:: -(-len(found) // _MOST_TICKS)] if found else []


def beside(measure: str, of_end: bool = False) -> Draw:
    """A measure of each method at the target, between the golden and the starting model.

    Args:
        measure: `set.measure`.
        of_end: take it from what was measured at the end, not from the looks.
    """

    def value(run: Run) -> float | None:
        return run.final(measure) if of_end else run.seen(measure)

    def draw(summary: Summary, theme: Theme) -> Figure:
        figure, axes = panel(rows_high(summary))
        for position, swept in enumerate(summary.methods):
            found, look = dot(position, values_of(swept.best, value)), theme.of(position)
            if found is None:
                nothing_there(axes, position, theme, "not reached")
                continue
            axes.errorbar(
                [found.mean],
                [position],
                xerr=whiskers([found]),
                capsize=3,
                color=look["color"],
                marker=look["marker"],
                markersize=7.5,
                markeredgecolor=theme.surface,
                linestyle="none",
            )
        named_rows(axes, summary)
        _uprights(axes, summary, theme, measure)
        axes.set_xlabel(spoken(measure))
        return figure

    return draw


def rows_high(summary: Summary) -> float:
    """How high a panel is that has a row for each method, in inches."""
    return 1.2 + 0.27 * len(summary.methods)


def named_rows(axes: Axes, summary: Summary) -> None:
    """Give each method its row, the first one on top."""
    axes.set_yticks(range(len(summary.methods)), [swept.title for swept in summary.methods])
    axes.set_ylim(len(summary.methods) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def nothing_there(axes: Axes, position: int, theme: Theme, why: str) -> None:
    """Say why a method's row is empty."""
    axes.text(
        0.02, position, why, color=theme.muted, va="center", transform=axes.get_yaxis_transform()
    )


def _levels(axes: Axes, summary: Summary, theme: Theme, measure: str) -> None:
    """Where the golden and the starting model are, as lines across."""
    found = [(role, summary.seen_of_model(role, measure)) for role in (STARTING, GOLDEN)]
    known = [(role, value) for role, value in found if value is not None]
    for role, value in known:
        dashes = "-" if role == GOLDEN else (0, (4, 2))
        axes.axhline(value, color=theme.ink, linewidth=1.1, linestyle=dashes, zorder=1)
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    near = len(known) == 2 and abs(known[0][1] - known[1][1]) < 0.06 * (high - low)
    upper = max(known, key=lambda one: one[1])[0] if known else ""
    for role, value in known:
        shift = 0 if not near else 5 if role == upper else -5
        axes.annotate(
            role,
            (1.0, value),
            (4, shift),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontweight="bold",
        )


def _uprights(axes: Axes, summary: Summary, theme: Theme, measure: str) -> None:
    """The same as lines upwards, named above the axes."""
    for role in (STARTING, GOLDEN):
        value = summary.seen_of_model(role, measure)
        if value is None:
            value = summary.of_model(role, measure)
        if value is None:
            continue
        dashes = "-" if role == GOLDEN else (0, (4, 2))
        axes.axvline(value, color=theme.ink, linewidth=1.1, linestyle=dashes, zorder=1)
        axes.annotate(
            role,
            (value, 1.0),
            (0, 3 if role == GOLDEN else 13),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontweight="bold",
        )
    axes.margins(x=0.08)
