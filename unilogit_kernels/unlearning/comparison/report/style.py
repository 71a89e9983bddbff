"""One look for all figures: type, colours and marks, on paper and in a page of two schemes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7a00")
"""Okabe and Ito's colours, which people with colour blindness tell apart, without black and with
the yellow as dark as it must be on white."""
_SERIES_DARK = ("#5db4ec", "#ff8a4c", "#3ecfa3", "#e79cc6", "#f0b53a", "#9bd6f5", "#d9cb3f")
MARKERS = "osD^vP<>X"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

_INK = {"ink": "#1c1e21", "muted": "#5c6169", "rule": "#d9d9d4", "surface": "#ffffff"}
_INK_DARK = {"ink": "#ebe9e4", "muted": "#a8adb5", "rule": "#3a3f46", "surface": "#17191c"}

WIDTH, HEIGHT = 4.4, 3.1
"""Of a panel, in inches: at 400 pixels its type is some 11 pixels high, and it is never shown
larger than 1.5 times that."""
SIZE = 9.0
"""Of all type in figures, in points; titles are told by weight, not by size."""


@dataclass(frozen=True)
class Theme:
    """The colours of figures.

    Attributes:
        ink: of text, and of what is known: the starting and the golden model.
        muted: of axes.
        rule: of grids.
        surface: behind everything.
        series: of the methods, in turn.
    """

    ink: str
    muted: str
    rule: str
    surface: str
    series: tuple[str, ...]

    def of(self, position: int) -> dict[str, Any]:
        """Colour, marker and dashes of a method: no two of 63 are alike in all three."""
        count = len(self.series)
        return {
            "color": self.series[position % count],
            "marker": MARKERS[position % len(MARKERS)],
            "linestyle": _DASHES[position // count % len(_DASHES)],
        }


PAPER = Theme(**_INK, series=_SERIES)


def variables(dark: bool) -> Mapping[str, str]:
    """The page's colours by the names of its CSS variables."""
    series = _SERIES_DARK if dark else _SERIES
    return {**(_INK_DARK if dark else _INK), **{f"s{n}": c for n, c in enumerate(series)}}


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Have matplotlib draw in the one look, and the same bytes each time."""
    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": SIZE,
        "axes.titlesize": SIZE,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.labelsize": SIZE,
        "xtick.labelsize": SIZE,
        "ytick.labelsize": SIZE,
        "legend.fontsize": SIZE,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "axes.grid": True,
        "grid.color": theme.rule,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "lines.linewidth": 1.6,
        "lines.markersize": 6,
        "lines.markeredgewidth": 0.8,
        "svg.fonttype": "none",
        "svg.hashsalt": "unilogit",
    }
    with mpl.rc_context(settings):
        yield


def panel(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty one."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def as_svg(figure: Figure, name: str) -> str:
    """A figure for the page: in its colours and its typeface, whatever scheme it is seen in.

    Args:
        figure: drawn with `PAPER`.
        name: that no other figure of the page has.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # In points, which a page would take for pixels of its own: the style sheet says how large.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\w ]*?[\d.]+px) [^;\"]*", r"font: \1 var(--face)", text)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    for attribute in ('id="', "url(#", 'href="#'):
        text = text.replace(attribute, f"{attribute}{name}-")
    for variable, colour in variables(dark=False).items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def save_png(figure: Figure, path: Path) -> None:
    """A figure on white.

    Args:
        figure: drawn with `PAPER`.
        path: of the file.
    """
    figure.savefig(path, format="png", dpi=150, facecolor="#ffffff", metadata={"Software": None})
