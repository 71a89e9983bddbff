"""Pictures say what they show by themselves: few series, one look each, axes of plain numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.shapes import LINEAR, LOGITS, MINE, ROW
from unilogit_kernels.bench import series
from unilogit_kernels.bench.look import decades, look, spaced
from unilogit_kernels.bench.measure import Measurement
from unilogit_kernels.bench.plots import draw_dots, draw_lines, swept_axis, write_plots
from unilogit_kernels.bench.problems import Shape
from unilogit_kernels.bench.provider import OURS
from unilogit_kernels.bench.providers import providers
from unilogit_kernels.bench.report import Report, Result

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PLAIN = re.compile(r"[\d,]+(\.\d+)?(e-\d+)?")
TOKENS = [replace(LINEAR, n=n) for n in (256, 1024, 4096)]


def _results(shapes: Sequence[Shape]) -> list[Result]:
    """Every provider there is, the later the slower; one does not fit, one is too slow at last."""
    found = []
    for index, shape in enumerate(shapes):
        measurements = []
        for rank, each in enumerate(providers(shape.entry), 1):
            m = replace(ROW, provider=each.name, loss=each.loss, relative_to_ours=1.0 + rank / 7)
            m = replace(m, peak_mib=None if each.loss == "floor" else 3.0 * rank * shape.n)
            if index == len(shapes) - 1 > 0 and each.name in ("eager Unilogit", "F.cross_entropy"):
                why = "does not fit: about 28 GiB" if "eager" in each.name else "too slow"
                m = Measurement(each.name, each.loss, missing=why)
            measurements.append(m)
        found.append(Result(shape, "both", 1.0, measurements))
    return found


def _draw(results: Sequence[Result]) -> Any:
    axis = swept_axis([result.shape for result in results])
    with look():
        figure = draw_dots(results) if axis is None else draw_lines(results, axis, limit_gib=22.0)
        figure.canvas.draw()
    return figure


@pytest.mark.parametrize("shapes", [TOKENS, [LINEAR, replace(LINEAR, n=9)], [LOGITS]], ids=len)
def test_a_picture_has_few_series_and_plain_numbers(shapes: list[Shape]) -> None:
    results = _results(shapes)
    assert len(providers(shapes[0].entry)) > 2 * series.MOST
    figure = _draw(results)
    labels = {line.get_label() for panel in figure.axes for line in panel.lines}
    named = {label for label in labels if not label.startswith("_")} - {"did not run"}
    assert len(named) <= 5
    assert {"unilogit_kernels", "F.cross_entropy (does not unlearn)"} <= named
    for panel in figure.axes:
        axes = (panel.xaxis,) if swept_axis(shapes) is None else (panel.xaxis, panel.yaxis)
        for axis in axes:
            ticks = [tick.get_text() for tick in axis.get_ticklabels()]
            assert len(ticks) >= 2
            assert all(PLAIN.fullmatch(tick) for tick in ticks), ticks
            assert not any(tick.get_text() for tick in axis.get_ticklabels(minor=True))


def test_what_did_not_run_is_crossed_where_it_is_missed() -> None:
    memory, time = _draw(_results(TOKENS)).axes
    crosses = [
        {line.get_color(): list(line.get_xdata()) for line in _crosses(panel)}
        for panel in (memory, time)
    ]
    eager, cross_entropy = (series.series_of(n, "") for n in ("eager Unilogit", "F.cross_entropy"))
    assert crosses == [{eager.colour: [4096]}, {cross_entropy.colour: [4096]}]
    (dots, _) = _draw(_results([LINEAR, replace(LINEAR, n=9)])).axes
    assert len(_crosses(dots)) == 2


def _crosses(panel: Any) -> list[Any]:
    return [line for line in panel.lines if line.get_marker() == "x" and len(line.get_xdata())]


@pytest.mark.parametrize("shapes", [TOKENS, [LINEAR]], ids=["lines", "dots"])
def test_a_loss_that_fits_nowhere_is_seen_to(shapes: list[Shape]) -> None:
    gone = Measurement("eager Unilogit", "unilogit", missing="does not fit: about 90 GiB more")
    panel = _draw([Result(shape, "both", 1.0, [MINE, gone]) for shape in shapes]).axes[0]
    (cross,) = _crosses(panel)
    assert len(cross.get_xdata()) == len(shapes)
    (legend,) = panel.figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert {"unilogit_kernels", "Unilogit, plain torch"} <= set(names)


def test_every_provider_has_a_look_and_no_two_families_share_one() -> None:
    looks = list(series._FAMILIES.values())
    assert (
        len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    )
    for entry in ("logits", "linear"):
        for each in providers(entry):
            found = series.series_of(each.name, each.loss)
            assert (found.colour, found.marker) in [*looks, series._BOUND], each.name
            assert found.is_bound == (each.loss == "floor")
            assert each.loss == "floor" or (found.colour, found.marker) != series._BOUND, each.name


def test_ours_and_the_fastest_are_chosen_and_the_wrong_are_not() -> None:
    names = {"slow": 3.0, "Liger": 1.2, "Liger, through nll": 1.1, "wrong": 0.1, "copy": 0.5}
    found = [MINE, replace(ROW, provider=OURS["cross_entropy"])]
    for name, ratio in names.items():
        loss = "floor" if name == "copy" else "unilogit"
        error = 2.0 if name == "wrong" else 1e-3
        found.append(
            replace(ROW, provider=name, loss=loss, relative_to_ours=ratio, gradient_error=error)
        )
    chosen = [each.name for each in series.choose([Result(LOGITS, "both", 1.0, found)])]
    assert chosen == [OURS["unilogit"], "Liger, through nll", "slow", "copy"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.9, 4.0, [0.5, 1, 2, 5]),
        (1.0, 100.0, [1, 2, 5, 10, 20, 50, 100]),
        (0.2, 300.0, [0.1, 1, 10, 100, 1000]),
        (3e-8, 2e-3, [1e-8, 1e-6, 1e-4, 1e-2]),
        (0.01, 0.01, [0.01, 0.02]),
        (7.0, 7.0, [5, 10]),
    ],
)
def test_ticks_are_round_and_hold_all(low: float, high: float, ticks: list[float]) -> None:
    assert decades(low, high) == pytest.approx(ticks)


def test_sizes_keep_their_distance() -> None:
    assert spaced([256, 512, 1024, 2048, 4096]) == [1024, 2048, 4096]
    assert spaced([7]) == [7]


@pytest.mark.parametrize(
    ("shapes", "axis"),
    [
        ([replace(LINEAR, n=n) for n in (1, 2, 4)], "n"),
        ([replace(LINEAR, vocab_size=v) for v in (100, 200, 300)], "vocab_size"),
        ([replace(LINEAR, h=h, n=h) for h in (16, 32, 64)], None),
        ([replace(LINEAR, n=n) for n in (1, 2)], None),
    ],
)
def test_one_size_becomes_an_axis(shapes: list[Shape], axis: str | None, tmp_path: Path) -> None:
    assert swept_axis(shapes) == axis
    (path,) = write_plots(Report({}, "", _results(shapes)), tmp_path / "plot")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_entries_are_not_drawn_into_one_plot(tmp_path: Path) -> None:
    report = Report({}, "", _results([LOGITS]) + _results([LINEAR]))
    written = write_plots(report, tmp_path / "plot")
    assert [path.name for path in written] == ["plot-logits-both.png", "plot-linear-both.png"]


def test_a_committed_picture_is_shown_on_a_page() -> None:
    pages = "".join(
        path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    )
    pictures = sorted(RESULTS.glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.name in pages, f"no page shows {picture.name}: delete it, or show it"
        stem = re.sub("-(linear|logits)-both$", "", picture.stem)
        assert picture.with_name(f"{stem}.json").exists()
