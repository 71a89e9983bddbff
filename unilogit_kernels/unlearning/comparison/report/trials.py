"""Figures of what is tried on forgotten rows, and of what forgetting costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from unilogit_kernels.unlearning.comparison.cell import GOLDEN
from unilogit_kernels.unlearning.comparison.report.figures import (
    Draw,
    named_rows,
    nothing_there,
    rows_high,
    whiskers,
)
from unilogit_kernels.unlearning.comparison.report.series import dot, values_of
from unilogit_kernels.unlearning.comparison.report.style import Theme, panel
from unilogit_kernels.unlearning.comparison.summary import Run, Summary, seen

Value = Callable[[Mapping[str, Any]], float | None]
"""From what `run_cell` returned."""


def relearned(when: str) -> Value:
    """The probability of the forget rows that were not learned again, `"before"` or `"after"`."""

    def value(found: Mapping[str, Any]) -> float | None:
        tried = found["robustness"].get("relearned")
        return None if tried is None else tried[when]["others"]

    return value


def rounded(measure: str, after: bool) -> Value:
    """A measure before or after the weights were rounded."""

    def value(found: Mapping[str, Any]) -> float | None:
        tried = found["robustness"].get("rounded")
        if tried is None:
            return None
        if after:
            return seen(tried, measure)
        checks = found.get("checks")
        if checks is None:
            return seen(found["look"], measure)
        matched = [c for c in checks if c["step"] == found["matched"]]
        return seen((matched or checks)[-1]["sets"], measure)

    return value


def before_and_after(before: Value, after: Value, label: str) -> Draw:
    """What a trial does to each method, and to the golden model.

    Args:
        before: it.
        after: it.
        label: of the axis.
    """

    def draw(summary: Summary, theme: Theme) -> Figure:
        figure, axes = panel(rows_high(summary) + 0.1)
        for position, swept in enumerate(summary.methods):
            look = theme.of(position)
            ends = [
                dot(position, values_of(swept.best, lambda run, v=value: v(run.found)))  # type: ignore[misc]
                for value in (before, after)
            ]
            first, last = ends
            if first is None or last is None:
                nothing_there(axes, position, theme, "not tried")
                continue
            axes.annotate(
                "",
                (last.mean, position),
                (first.mean, position),
                arrowprops={"arrowstyle": "-", "color": look["color"], "linewidth": 1.6},
            )
            axes.plot(
                [first.mean],
                [position],
                look["marker"],
                color=theme.surface,
                markeredgecolor=look["color"],
                markeredgewidth=1.4,
                zorder=3,
            )
            axes.errorbar(
                [last.mean],
                [position],
                xerr=whiskers([last]),
                capsize=3,
                color=look["color"],
                marker=look["marker"],
                markersize=7.5,
                markeredgecolor=theme.surface,
                zorder=4,
            )
        golden = summary.models[GOLDEN]
        for value, words in ((before, "golden before"), (after, "golden after")):
            at = value(golden)
            if at is None:
                continue
            later = value is after
            dashes = "-" if later else (0, (4, 2))
            axes.axvline(at, color=theme.ink, linewidth=1.1, linestyle=dashes, zorder=1)
            axes.annotate(
                words,
                (at, 1.0),
                (0, 3 if later else 13),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontweight="bold",
            )
        named_rows(axes, summary)
        axes.margins(x=0.12)
        axes.set_xlabel(label)
        return figure

    return draw


def cost(value: Callable[[Run], float | None], label: str) -> Draw:
    """Bars of what the chosen runs of each method cost.

    Args:
        value: of a run.
        label: of the axis.
    """

    def draw(summary: Summary, theme: Theme) -> Figure:
        figure, axes = panel(rows_high(summary) - 0.3)
        most = 0.0
        for position, swept in enumerate(summary.methods):
            values, look = values_of(swept.best, value), theme.of(position)
            if not values:
                nothing_there(axes, position, theme, "not known")
                continue
            mean = sum(values) / len(values)
            axes.barh(position, mean, height=0.62, color=look["color"])
            if len(values) > 1:
                ends = [[mean - min(values)], [max(values) - mean]]
                axes.errorbar(mean, position, xerr=ends, color=theme.ink, linewidth=1, capsize=2)
            axes.annotate(
                f"{mean:.3g}",
                (max(values), position),
                (5, 0),
                textcoords="offset points",
                va="center",
            )
            most = max(most, *values)
        named_rows(axes, summary)
        axes.set_xlim(0, 1.18 * most or 1)
        axes.set_xlabel(label)
        return figure

    return draw
