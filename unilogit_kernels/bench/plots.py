"""Pictures of a report that can be read without its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unilogit_kernels.bench.look import (
    MUTED,
    SIZE,
    SMALL,
    WIDTH,
    decades,
    look,
    number,
    plain,
    save,
    spaced,
)
from unilogit_kernels.bench.measure import Measurement
from unilogit_kernels.bench.problems import Shape
from unilogit_kernels.bench.provider import OURS
from unilogit_kernels.bench.report import Report, Result
from unilogit_kernels.bench.series import Series, choose, does_not_fit

_AXES = {"n": "tokens", "h": "hidden size", "vocab_size": "vocabulary"}
_MODES = {
    "forward": "Forward without gradients",
    "backward": "Backward",
    "both": "Forward and backward",
}
_COPY = "one float32 copy of the logits (computed)"


class _Unit(NamedTuple):
    name: str
    per: float


class Quantity(NamedTuple):
    """What a panel of lines shows.

    Attributes:
        title: Before the unit.
        value: Of a measurement, in the smallest unit; None where it was not measured.
        units: From small to large; the largest is taken of which some value is two or more.
        missing: Whether a measurement that did not run is marked here.
    """

    title: str
    value: Callable[[Measurement], float | None]
    units: tuple[_Unit, ...]
    missing: Callable[[str], bool]

    def unit(self, largest: float) -> _Unit:
        """That of an axis that goes to `largest`."""
        fitting = [unit for unit in self.units if largest >= 2 * unit.per]
        return fitting[-1] if fitting else self.units[0]


MEMORY = Quantity(
    "Peak memory beyond inputs\nand gradients",
    # What is within the noise of a resident set may be below nothing.
    lambda m: None if m.peak_mib is None else max(m.peak_mib, 0.0),
    (_Unit("MiB", 1), _Unit("GiB", 1024)),
    does_not_fit,
)
TIME = Quantity(
    "Time",
    lambda m: m.median if m.milliseconds else None,
    (_Unit("milliseconds", 1), _Unit("seconds", 1000)),
    lambda why: not does_not_fit(why),
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
        with look():
            save(draw_dots(results) if axis is None else draw_lines(results, axis), path)
        written.append(path)
    return written


def swept_axis(shapes: Sequence[Shape]) -> str | None:
    """The one size that varies over at least three values, if the others stay, else None."""
    sizes = {axis: {getattr(shape, axis) for shape in shapes} for axis in _AXES}
    varying = [axis for axis, values in sizes.items() if len(values) > 1]
    return varying[0] if len(varying) == 1 and len(sizes[varying[0]]) >= 3 else None


def draw_lines(results: Sequence[Result], axis: str, limit_gib: float | None = None) -> Any:
    """Memory and time over one size, on linear axes; a row of panels for each dtype and head.

    What did not run is marked with a cross: at the machine's limit where it did not fit.

    Args:
        results: In which `axis` alone varies, beside dtype and head.
        axis: Name of the size, an attribute of the shapes.
        limit_gib: The machine's memory, or None to leave it out.
    """
    from matplotlib.figure import Figure

    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(_kind(result.shape), []).append(result)
    series = choose(results)
    figure = Figure(figsize=(WIDTH, 3.1 * len(rows) + 1.4))
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for line, (kind, members) in zip(panels, rows.items(), strict=True):
        members.sort(key=lambda result: getattr(result.shape, axis))
        sizes = [getattr(result.shape, axis) for result in members]
        for panel, quantity in zip(line, (MEMORY, TIME), strict=True):
            limit = limit_gib if quantity is MEMORY else None
            unit = _draw_panel(panel, quantity, sizes, members, series, limit)
            over = f"{kind}: " if len(rows) > 1 else ""
            title = f"{over}{quantity.title}, {unit.name}"
            panel.set_title(title if "\n" in title else f"\n{title}")
            panel.set_xlim(0, max(sizes) * 1.04)
            panel.set_xticks(spaced(sizes), [f"{size:,}" for size in spaced(sizes)])
            panel.set_xlabel(_AXES[axis])
    first = results[0].shape
    fixed = [
        f"{name} {getattr(first, other):,}"
        for other, name in _AXES.items()
        if other != axis and getattr(first, other) is not None
    ]
    of = f" of a {next(iter(rows))}" if len(rows) == 1 else ""
    _finish(figure, f"{_MODES[results[0].mode]}{of}\n{', '.join(fixed)}")
    return figure


def _draw_panel(
    panel: Any,
    quantity: Quantity,
    sizes: Sequence[int],
    results: Sequence[Result],
    series: Sequence[Series],
    limit_gib: float | None,
) -> _Unit:
    """Lines, the crosses of what did not run, and the unit that was chosen."""
    found = {each: _of(each.name, results) for each in series}
    lines = {
        each: [
            (size, y)
            for size, m in zip(sizes, row, strict=True)
            if m is not None and (y := quantity.value(m)) is not None
        ]
        for each, row in found.items()
    }
    reference = None
    if quantity is MEMORY and all(not points for each, points in lines.items() if not _ours(each)):
        # Nobody else's peak is known: what nearly everybody holds at least.
        reference = [4 * r.shape.n * r.shape.vocab_size / 2**20 for r in results]
    heights = [y for points in lines.values() for _, y in points] + (reference or [])
    unit = quantity.unit(max([*heights, 1024 * (limit_gib or 0)], default=0))
    for each, points in lines.items():
        if points:
            panel.plot([x for x, _ in points], [y / unit.per for _, y in points], **each.style)
    if reference is not None:
        scaled = [y / unit.per for y in reference]
        panel.plot(sizes, scaled, ":", color=MUTED, linewidth=1.6, label=_COPY)
    panel.set_ylim(bottom=0)
    top = panel.get_ylim()[1]
    if limit_gib is not None:
        top = limit_gib * 1024 / unit.per
        panel.axhline(top, color=MUTED, linestyle="--", linewidth=1.2)
    crossed = _cross(panel, quantity, sizes, found, lines, unit, top)
    panel.set_ylim(0, top * 1.14 if limit_gib is not None or crossed else top)
    if limit_gib is not None:
        fit = " (x: does not fit)" if crossed else ""
        _note(panel, f"the machine's {limit_gib:.0f} GiB{fit}", top)
    elif crossed:
        _note(panel, "x: did not run", top)
    plain(panel.yaxis)
    return unit


def _cross(
    panel: Any,
    quantity: Quantity,
    sizes: Sequence[int],
    found: dict[Series, list[Measurement | None]],
    lines: dict[Series, list[tuple[int, float]]],
    unit: _Unit,
    top: float,
) -> bool:
    """Mark where a series that runs elsewhere did not; dotted from the last point that ran."""
    crossed = False
    for each, row in found.items():
        points = lines[each]
        failed = [
            size
            for size, m in zip(sizes, row, strict=True)
            if m is not None and m.missing and quantity.missing(m.missing)
        ]
        if not failed:
            continue
        crossed = True
        style: dict[str, Any] = {"color": each.colour, "zorder": 6, "clip_on": False}
        if not points:
            style["label"] = each.label
        elif failed[0] > points[-1][0]:
            last = (points[-1][0], points[-1][1] / unit.per)
            panel.plot([last[0], failed[0]], [last[1], top], ":", linewidth=1.2, **style)
        panel.plot(failed, [top] * len(failed), "x", markersize=9, markeredgewidth=2.2, **style)
    return crossed


def draw_dots(results: Sequence[Result]) -> Any:
    """A row for each shape: time as a multiple of ours, and the error of what was computed."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import blended_transform_factory

    series = choose(results)
    errors = sum(any(m and _error(m) for m in _of(s.name, results)) for s in series) > 1
    figure = Figure(figsize=(WIDTH, 0.52 * len(results) + 2.1))
    panels = figure.subplots(1, 1 + errors, sharey=True, squeeze=False)[0]
    columns = [("Time, multiples of ours", _ratio), ("Relative error against float64", _error)]
    for panel, (title, value) in zip(panels, columns[: 1 + errors], strict=True):
        drawn = []
        for each in series:
            points = [
                (value(m), row)
                for row, m in enumerate(_of(each.name, results))
                if m is not None and m.milliseconds
            ]
            kept = [(x, row) for x, row in points if x]
            drawn += [x for x, _ in kept]
            # Ours, which is at 1, hides nobody who is as fast.
            style = {**each.style, "linestyle": "", "zorder": 2 if _ours(each) else 3}
            panel.plot([x for x, _ in kept], [row for _, row in kept], **style)
        panel.set_xscale("log")
        ticks = decades(min(drawn), max(drawn)) if drawn else [1.0]
        panel.set_xlim(min([*drawn, ticks[0]]) / 1.25, max([*drawn, ticks[-1]]) * 1.25)
        small = min(ticks) < SMALL
        panel.set_xticks(ticks, [number(tick, small=small) for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.set_title(title)
        panel.tick_params(axis="y", length=0)
    edge = blended_transform_factory(panels[0].transAxes, panels[0].transData)
    for each in series:
        failed = [row for row, m in enumerate(_of(each.name, results)) if m and m.missing]
        style = {"color": each.colour, "transform": edge, "clip_on": False, "zorder": 6}
        if failed:
            xs = [1.0] * len(failed)
            panels[0].plot(xs, failed, "x", markersize=8, markeredgewidth=2.2, **style)
    if any(m and m.missing for each in series for m in _of(each.name, results)):
        panels[0].plot([], [], "x", color=MUTED, markeredgewidth=2.2, label="did not run")
    for row, result in enumerate(results):
        ours = next((m for m in result.measurements if m.provider == OURS["unilogit"]), None)
        time = f": ours {_time(ours.median)}" if ours and ours.milliseconds else ""
        text = result.shape.title.replace(f"{result.shape.entry} ", "") + time
        style = {"va": "center", "fontsize": SIZE - 1, "in_layout": False, "zorder": 6}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        # In the last panel, to lie above the grids of all.
        panels[-1].text(0.01, row - 0.29, text, transform=edge, **style)
    panels[0].set_yticks(range(len(results)), [""] * len(results))
    panels[0].set_ylim(len(results) - 0.5, -0.75)
    sizes = " x ".join(name for axis, name in _AXES.items() if axis != "h" or results[0].shape.h)
    _finish(figure, f"{_MODES[results[0].mode]}, {sizes}")
    return figure


def _note(panel: Any, text: str, y: float) -> None:
    """Above a height, at the right edge."""
    panel.annotate(
        *(text, (1, y)),
        **{"xycoords": panel.get_yaxis_transform(), "textcoords": "offset points"},
        **{"xytext": (-12, 5), "ha": "right", "color": MUTED, "fontsize": SIZE - 1},
    )


def _of(provider: str, results: Sequence[Result]) -> list[Measurement | None]:
    return [next((m for m in r.measurements if m.provider == provider), None) for r in results]


def _ours(series: Series) -> bool:
    return series.name in OURS.values()


def _ratio(m: Measurement) -> float | None:
    return 1.0 if m.provider in OURS.values() else m.relative_to_ours


def _error(m: Measurement) -> float | None:
    """Of the gradients; of the loss where that is all there is."""
    return m.loss_error if m.mode == "forward" else m.gradient_error


def _time(milliseconds: float) -> str:
    return f"{milliseconds:,.0f} ms" if milliseconds >= 20 else f"{milliseconds:.1f} ms"


def _kind(shape: Shape) -> str:
    head = "" if shape.h is None else "frozen " if shape.frozen_head else "trained "
    return f"{head}{shape.dtype} {'lm_head' if shape.h else 'loss on logits'}"


def _finish(figure: Any, title: str) -> None:
    """One legend for all panels, below them; a series that is missing in one is in another."""
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=2)
    figure.suptitle(title, x=0.01, ha="left")
