"""Plots of a report: times, memory and errors on logarithmic axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unilogit_kernels.bench.measure import Measurement
from unilogit_kernels.bench.problems import Shape
from unilogit_kernels.bench.provider import OURS
from unilogit_kernels.bench.report import Report, Result

_AXES = {"n": "tokens n", "vocab_size": "vocabulary V", "h": "hidden size h"}
_MARKERS = "osD^vP*X<>hp"
_SMALLEST_MIB = 0.1
"""A peak below this, which is within the noise of a resident set, is drawn here."""


class _Quantity(NamedTuple):
    """What a panel shows."""

    label: str
    value: Callable[[Measurement], float | None]


def _peak(m: Measurement) -> float | None:
    return None if m.peak_mib is None else max(m.peak_mib, _SMALLEST_MIB)


_QUANTITIES = (
    _Quantity("time, ms", lambda m: m.median if m.milliseconds else None),
    _Quantity("peak memory beyond inputs and gradients, MiB", _peak),
    # Of the gradients; of the loss where that is all there is.
    _Quantity(
        "relative error against float64",
        lambda m: m.loss_error if m.mode == "forward" else m.gradient_error,
    ),
)


def write_plots(report: Report, stem: Path) -> list[Path]:
    """Draw a report into `<stem>.png`, or several files where it mixes entries or modes.

    A set of shapes in which one size varies becomes lines over that size; any other set becomes
    dots, one row for each shape.

    Args:
        report: What was measured.
        stem: Path without suffix.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in report.results:
        if any(m.milliseconds for m in result.measurements):
            groups.setdefault((result.shape.entry, result.mode), []).append(result)
    written = []
    for (entry, mode), results in groups.items():
        suffix = f"-{entry}-{mode}" if len(groups) > 1 else ""
        path = stem.with_name(f"{stem.name}{suffix}.png")
        axis = swept_axis([result.shape for result in results])
        figure = _draw_dots(results) if axis is None else _draw_lines(results, axis)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        written.append(path)
    return written


def swept_axis(shapes: Sequence[Shape]) -> str | None:
    """The one size that varies over at least three values, if the others stay, else None."""
    sizes = {axis: {getattr(shape, axis) for shape in shapes} for axis in _AXES}
    varying = [axis for axis, values in sizes.items() if len(values) > 1]
    return varying[0] if len(varying) == 1 and len(sizes[varying[0]]) >= 3 else None


def _styles(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Colour and marker by provider, ours in black; those that never ran are left out."""
    from matplotlib import colormaps

    names = dict.fromkeys(
        m.provider for result in results for m in result.measurements if m.milliseconds
    )
    bounds = {m.provider for result in results for m in result.measurements if m.loss == "floor"}
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    # Strong colours before their pale twins; greys are ours.
    ordered = [*colours[0:14:2], *colours[16::2], *colours[1:14:2], *colours[17::2]]
    styles: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        styles[name] = {
            "color": ordered[index % len(ordered)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": "--" if name in bounds else "-",
            "linewidth": 1.5,
            "markersize": 5,
        }
    for name, grey in zip(OURS.values(), ("black", "dimgrey"), strict=True):
        if name in styles:
            styles[name].update(color=grey, linewidth=3, markersize=8, zorder=5)
    return styles


def _draw_lines(results: Sequence[Result], axis: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    rows: dict[str, list[Result]] = {}
    for result in results:
        head = "" if result.shape.h is None else "frozen" if result.shape.frozen_head else "trained"
        rows.setdefault(f"{result.shape.dtype} {head}".strip(), []).append(result)
    styles = _styles(results)
    figure = Figure(figsize=(18, 4.6 * len(rows) + 1.2), layout="constrained")
    panels = figure.subplots(len(rows), len(_QUANTITIES), squeeze=False, sharex=True)
    for line, (title, members) in zip(panels, rows.items(), strict=True):
        members.sort(key=lambda result: getattr(result.shape, axis))
        ticks = [getattr(result.shape, axis) for result in members]
        for panel, quantity in zip(line, _QUANTITIES, strict=True):
            for name, style in styles.items():
                points = [
                    (size, quantity.value(m))
                    for size, result in zip(ticks, members, strict=True)
                    for m in result.measurements
                    if m.provider == name and m.milliseconds
                ]
                points = [(x, y) for x, y in points if y]
                if points:
                    panel.plot(*zip(*points, strict=True), label=name, **style)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(ticks)
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{int(x):,}"))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.tick_params(labelbottom=True)
            panel.set_xlabel(_AXES[axis])
            panel.set_ylabel(quantity.label, wrap=True)
            panel.set_title(f"{title} head" if members[0].shape.h else title)
            panel.grid(visible=True, which="both", alpha=0.25)
    first = results[0]
    fixed = ", ".join(
        f"{label} = {getattr(first.shape, other):,}"
        for other, label in _AXES.items()
        if other != axis and getattr(first.shape, other) is not None
    )
    _finish(figure, styles, f"{first.shape.entry}, {_name(first)}: {fixed}")
    return figure


def _draw_dots(results: Sequence[Result]) -> Any:
    from matplotlib.figure import Figure

    styles = _styles(results)
    figure = Figure(figsize=(20, 0.6 * len(results) + 3.2), layout="constrained")
    panels = figure.subplots(1, len(_QUANTITIES), sharey=True)
    for panel, quantity in zip(panels, _QUANTITIES, strict=True):
        for name, style in styles.items():
            points = [
                (quantity.value(m), row)
                for row, result in enumerate(results)
                for m in result.measurements
                if m.provider == name and m.milliseconds
            ]
            points = [(x, y) for x, y in points if x]
            if points:
                dots = {**style, "linestyle": "", "alpha": 0.85}
                panel.plot(*zip(*points, strict=True), label=name, **dots)
        panel.set_xscale("log")
        panel.set_xlabel(quantity.label)
        panel.grid(visible=True, axis="both", which="both", alpha=0.25)
    panels[0].set_yticks(range(len(results)), [result.shape.title for result in results])
    panels[0].invert_yaxis()
    _finish(figure, styles, f"{results[0].shape.entry}, {_name(results[0])}")
    return figure


def _name(result: Result) -> str:
    return result.title.rpartition(", ")[2]


def _finish(figure: Any, styles: dict[str, dict[str, Any]], title: str) -> None:
    """One legend for all panels; a series that is missing in one is in another."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
