"""The report of a comparison: one HTML file that needs no other, and its figures as PNGs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unilogit_kernels.unlearning.comparison.cell import GOLDEN, STARTING
from unilogit_kernels.unlearning.comparison.report import figures, tables, trials
from unilogit_kernels.unlearning.comparison.report.figures import Drawing, spoken
from unilogit_kernels.unlearning.comparison.report.style import (
    PAPER,
    SIZE,
    Theme,
    as_svg,
    drawing,
    save_png,
    variables,
)
from unilogit_kernels.unlearning.comparison.report.words import Words, differing
from unilogit_kernels.unlearning.comparison.summary import Run, Summary, read_summary
from unilogit_kernels.unlearning.measuring.store import write_whole

REPORT = "report.html"


@dataclass(frozen=True)
class Shown:
    """A figure as the template takes it.

    Attributes:
        name: of its PNG.
        title: above it.
        alt: what it shows.
        svg: it.
    """

    name: str
    title: str
    alt: str
    svg: Markup


@dataclass(frozen=True)
class Answer:
    """What one model says to a question.

    Attributes:
        who: the model or the method.
        position: of the method; None for a model.
        words: of the answer; those that the starting model does not say are marked.
        recalled: whether it holds the fact; None where that is not known.
    """

    who: str
    position: int | None
    words: list[Words]
    recalled: bool | None


def write_report(folder: Path) -> Path:
    """Draw the report of a comparison, also of one that is not finished, into its folder.

    The same results give the same bytes.

    Args:
        folder: that `compare` has written.

    Returns:
        The HTML file; the PNGs lie beside it in `figures`.

    Raises:
        RunError: the folder holds no comparison.
    """
    summary = read_summary(folder)
    drawings = _drawings(summary)
    with mpl.rc_context():
        mpl.use("agg")
        shown = {
            section: [_shown(each, summary, folder) for each in each_section]
            for section, each_section in drawings.items()
        }
        legend = [_swatch(summary, position) for position in range(len(summary.methods))]
    environment = Environment(
        loader=PackageLoader("unilogit_kernels.unlearning.comparison", "report"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measure = summary.by[0]
    head = tables.columns(summary)
    text = environment.get_template("template.html").render(
        summary=summary,
        lead=tables.lead(summary),
        facts=_facts(summary),
        figures=shown,
        legend=legend,
        columns=head,
        rows=tables.rows(summary, head),
        interpolated=[column.title for column in head if column.at_target],
        best_is=_best_is(head),
        measure=spoken(measure),
        samples=_samples(summary),
        cell_heads=tables.CELL_HEADS,
        cells=tables.every_cell(summary, measure),
        audit=_audit(summary),
        light=variables(dark=False),
        dark=variables(dark=True),
    )
    path = folder / REPORT
    write_whole(path, lambda unfinished: _write(unfinished, text))
    return path


def _best_is(shown: list[tables.Column]) -> str:
    """What is best in the columns in which it is not the most."""
    golden = [column.title for column in shown if column.good == tables.AS_GOLDEN]
    low = [column.title for column in shown if column.good == tables.LOW]
    parts = [f"the nearest to the golden model in {', '.join(golden)}"] if golden else []
    parts += [f"the least in {', '.join(low)}"] if low else []
    return f"Best is the most, but {' and '.join(parts)}."


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _drawings(summary: Summary) -> dict[str, list[Drawing]]:
    """By section of the page, which leaves out a section without any."""
    kept = [f"{name}.probability" for name in summary.kept]
    apart = summary.of_roles("paraphrase", "neighbours", "holdout")
    with_ratios = summary.models[GOLDEN]["final"]["truth_ratios"]
    # Of methods that are compared at one rate each there is nothing to see.
    rates = max(len({rate for rate, _ in swept.settings}) for swept in summary.methods)
    of_looks = ["forget.probability", *(f"{n}.probability" for n in summary.of_roles("paraphrase"))]
    return {
        "tradeoff": [
            Drawing(
                f"tradeoff-{measure.partition('.')[0]}",
                f"What is kept: {spoken(measure)}",
                f"Line for each method from the starting model to the target: {spoken(measure)} "
                "against the probability of the answers to forget. A star marks the golden model.",
                figures.tradeoff(measure),
            )
            for measure in kept[:2]
        ],
        "weights": _over_setting("weights", figures.WEIGHT, kept[:2]),
        "rates": _over_setting("rates", figures.RATE, kept[:2] if rates > 1 else ()),
        "curves": [
            Drawing(
                f"steps-{measure.partition('.')[0]}",
                spoken(measure),
                f"{spoken(measure)} over the steps, a line for each method.",
                figures.curves(measure),
            )
            for measure in [*of_looks, *kept]
        ],
        "apart": [
            Drawing(
                f"apart-{name}",
                spoken(name),
                f"Probability of the answers of {spoken(name)} at matched forgetting, a row for "
                "each method; the golden and the starting model are upright lines.",
                figures.beside(f"{name}.probability"),
            )
            for name in apart
        ],
        "truth": [
            Drawing(
                f"truth-{name}",
                f"Truth ratios: {spoken(name)}",
                f"Cumulative distribution of the truth ratios of {spoken(name)}: the golden model "
                "as a thick line, the starting model as a thick dashed one, the methods in colour.",
                figures.truth_ratios(name),
            )
            for name in with_ratios
            if name in ("forget", *summary.kept)
        ],
        "trials": _trials(summary),
        "cost": [
            Drawing(
                "cost-seconds",
                "Time of a step",
                "Bars: seconds of a training step of each method.",
                trials.cost(_seconds, "seconds a step"),
            ),
            Drawing(
                "cost-memory",
                "Peak memory",
                "Bars: peak memory of the run of each method.",
                trials.cost(_gibibytes, "GiB at the peak"),
            ),
        ],
    }


def _over_setting(name: str, setting_in: int, kept: Sequence[str]) -> list[Drawing]:
    setting = figures.SETTINGS[setting_in]
    return [
        Drawing(
            f"{name}-{measure.partition('.')[0]}",
            f"Kept over the {setting}: {spoken(measure)}",
            f"{spoken(measure)} at matched forgetting over the {setting}, a line for each "
            "method; the golden and the starting model are lines across.",
            figures.over_setting(measure, setting_in),
        )
        for measure in kept
    ]


def _trials(summary: Summary) -> list[Drawing]:
    tried = summary.models[GOLDEN]["robustness"]
    shared, found = summary.shared["robustness"], []
    if "relearned" in tried:
        steps = shared["relearn_steps"]
        found.append(
            Drawing(
                "trial-relearned",
                f"After relearning the other half for {steps} steps",
                "Probability of the forget rows that were not learned again, before (hollow) and "
                "after (filled), a row for each method; upright lines: the golden model.",
                trials.before_and_after(
                    trials.relearned("before"), trials.relearned("after"), "forget probability"
                ),
            )
        )
    if "rounded" in tried:
        for name in ("forget", *summary.of_roles("neighbours", "retain")[:1]):
            measure = f"{name}.probability"
            found.append(
                Drawing(
                    f"trial-rounded-{name}",
                    f"After rounding weights to {shared['bits']} bits: {spoken(name)}",
                    f"{spoken(measure)} before (hollow) and after (filled) rounding, a row for "
                    "each method; upright lines: the golden model.",
                    trials.before_and_after(
                        trials.rounded(measure, after=False),
                        trials.rounded(measure, after=True),
                        spoken(measure),
                    ),
                )
            )
    return found


def _seconds(run: Run) -> float | None:
    cost = run.found["cost"]
    return float(cost["seconds"] / cost["steps"]) if cost["steps"] else None


def _gibibytes(run: Run) -> float | None:
    peak = run.found["cost"]["peak_bytes"]
    return None if peak is None else float(peak) / 2**30


def _shown(each: Drawing, summary: Summary, folder: Path) -> Shown:
    with drawing(PAPER):
        figure = each.draw(summary, PAPER)
        svg = as_svg(figure, each.name)
        # What the page says in its own words.
        figure.suptitle(each.title, x=0.01, ha="left", fontweight="bold", fontsize=SIZE)
        if each.legend:
            _add_legend(figure, summary, PAPER)
        path = folder / "figures" / f"{each.name}.png"
        write_whole(path, lambda unfinished: save_png(figure, unfinished))
    return Shown(each.name, each.title, each.alt, Markup(svg))


def _handles(summary: Summary, theme: Theme) -> list[Line2D]:
    edge = theme.surface
    return [
        Line2D([], [], label=swept.title, markeredgecolor=edge, **theme.of(position))
        for position, swept in enumerate(summary.methods)
    ]


def _add_legend(figure: Figure, summary: Summary, theme: Theme) -> None:
    """A legend in as many columns as there is room for."""
    handles = _handles(summary, theme)
    for columns in (3, 2, 1):
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.2
        )
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _swatch(summary: Summary, position: int) -> dict[str, Any]:
    """A method's line and mark, for the legend of the page."""
    with drawing(PAPER):
        figure = Figure(figsize=(0.42, 0.18))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        look = PAPER.of(position)
        axes.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], markeredgecolor=PAPER.surface, **look)
        svg = as_svg(figure, f"swatch-{position}")
    return {"title": summary.methods[position].title, "svg": Markup(svg)}


def _facts(summary: Summary) -> list[tuple[str, str]]:
    cells = [run for swept in summary.methods for run in swept.runs]
    seeds = len({run.seed for run in cells})
    starting = summary.seen_of_model(STARTING, "forget.probability")
    golden = summary.seen_of_model(GOLDEN, "forget.probability")
    states = [f"{len(cells)} finished"]
    states += [f"{len(summary.failed)} failed"] if summary.failed else []
    states += [f"{len(summary.waiting)} to be run"] if summary.waiting else []
    return [
        ("Methods", str(len(summary.methods))),
        ("Cells", ", ".join(states)),
        ("Seeds", str(seeds)),
        ("Forget probability, starting", _number(starting)),
        ("Forget probability, golden", _number(golden)),
        ("Compared at", f"{summary.target:.3f}"),
        ("Settings chosen by", ", ".join(spoken(each) for each in summary.by)),
        ("On validation rows", f"{100 * summary.shared['split']['validation']:.0f} %"),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"  # noqa: RUF001


def _samples(summary: Summary) -> list[dict[str, Any]]:
    """Questions about rows to forget, evenly spaced, with what each model says."""
    before = summary.models[STARTING]["final"]["answers"].get("forget", {})
    names = list(before)
    if not names or not summary.samples:
        return []
    found = []
    for name in names[:: -(-len(names) // summary.samples)]:
        first = before[name]
        said: list[tuple[str, int | None, Any]]
        said = [(STARTING, None, first), (GOLDEN, None, _said(summary.models[GOLDEN], name))]
        for position, swept in enumerate(summary.methods):
            if swept.best:
                said.append((swept.title, position, _said(swept.best[0].found, name)))
        answers = [
            Answer(who, n, differing(one["said"], first["said"]), one["recalled"])
            for who, n, one in said
            if one is not None
        ]
        found.append(
            {"question": _question(first["prompt"]), "expected": first["expected"], "said": answers}
        )
    return found


def _said(found: Mapping[str, Any], name: str) -> Any:
    return found["final"]["answers"].get("forget", {}).get(name)


def _question(prompt: str) -> str:
    return prompt.removeprefix("Question: ").removesuffix("\nAnswer:").strip()


def _audit(summary: Summary) -> dict[str, Any]:
    """The record without what the page says elsewhere."""
    record = {name: value for name, value in summary.audit.items() if name != "statement"}
    settings = json.dumps(record.pop("settings"), indent=2, sort_keys=True)
    return {"statement": summary.audit["statement"], "settings": settings, "record": record}
