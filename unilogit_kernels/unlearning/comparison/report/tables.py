"""The tables of a report: methods with means and intervals, and every cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unilogit_kernels.unlearning.comparison.cell import GOLDEN, STARTING
from unilogit_kernels.unlearning.comparison.matching import Spread, is_within_noise, spread
from unilogit_kernels.unlearning.comparison.measure import ALL
from unilogit_kernels.unlearning.comparison.report.figures import spoken
from unilogit_kernels.unlearning.comparison.summary import Run, Summary, Swept, by_seed, mean_of

HIGH, LOW, AS_GOLDEN = "high", "low", "golden"
"""What is good in a column: much, little, or what the golden model has."""

_JOINT = (("forget_quality", "forget quality"), ("model_utility", "model utility"))


@dataclass(frozen=True)
class Column:
    """A column of the table of methods.

    Attributes:
        title: its head.
        good: `HIGH`, `LOW` or `AS_GOLDEN`.
        value: of a run.
        at_target: whether it is interpolated at the target, and so of nothing where a run did not
            come there.
        models: of the starting and of the golden model.
        digits: after the point.
    """

    title: str
    good: str
    value: Callable[[Run], float | None]
    at_target: bool
    models: tuple[float | None, float | None]
    digits: int = 3


@dataclass(frozen=True)
class Cell:
    """A cell of it.

    Attributes:
        text: the mean, or a dash.
        half: half the interval's width as text, or empty.
        mark: `"best"`, `"noise"` where it may be as good as the best, or empty.
    """

    text: str
    half: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """A row of it.

    Attributes:
        title: the method or the model.
        position: of the method; None for a model.
        note: its settings, and whether it came to the target.
        cells: one for each column.
    """

    title: str
    position: int | None
    note: str
    cells: list[Cell]


def columns(summary: Summary) -> list[Column]:
    """Those that something is known of."""
    found = []
    for name in summary.kept:
        found.append(_looked(summary, f"{name}.probability", HIGH))
    for name in summary.of_roles("paraphrase"):
        found.append(_looked(summary, f"{name}.probability", AS_GOLDEN))
    for name in ("forget", *summary.of_roles("neighbours")):
        good = AS_GOLDEN if name == "forget" else HIGH
        found.append(_of_end(summary, f"{name}.key_recall", f"{spoken(name)} key recall", good))
    for joint, title in _JOINT:
        found.append(_of_end(summary, joint, title, HIGH))
    steps = Column(
        "steps", LOW, lambda run: run.match and run.match.step, True, (None, None), digits=1
    )
    return [*(each for each in found if each.models != (None, None)), steps]


def _looked(summary: Summary, measure: str, good: str) -> Column:
    models = tuple(summary.seen_of_model(role, measure) for role in (STARTING, GOLDEN))
    title = spoken(measure)
    return Column(title, good, lambda run: run.seen(measure), True, (models[0], models[1]))


def _mean_of(summary: Summary, measures: Sequence[str]) -> Column:
    """What settings are chosen by, as a column."""
    title = " and ".join(map(spoken, measures))
    if len(measures) > 1:
        title = f"mean of {title}"
    models = [
        mean_of(summary.seen_of_model(role, measure) for measure in measures)
        for role in (STARTING, GOLDEN)
    ]
    return Column(title, HIGH, lambda run: run.mean(measures), True, (models[0], models[1]))


def _of_end(summary: Summary, measure: str, title: str, good: str) -> Column:
    models = tuple(summary.of_model(role, measure) for role in (STARTING, GOLDEN))
    return Column(title, good, lambda run: run.final(measure), False, (models[0], models[1]))


def rows(summary: Summary, shown: list[Column]) -> list[Row]:
    """The starting and the golden model, then each method at its chosen settings."""
    found = [
        Row(role, None, "", [_plain(column.models[n], column.digits) for column in shown])
        for n, role in enumerate((STARTING, GOLDEN))
    ]
    by_column = [_column(summary, column) for column in shown]
    for position, swept in enumerate(summary.methods):
        cells = [column[position] for column in by_column]
        found.append(Row(swept.title, position, note(swept, summary.target), cells))
    return found


def note(swept: Swept, target: float) -> str:
    """A method's settings, and how many of its runs came to the target."""
    if swept.chosen is None:
        return "no run came to its end"
    rate, weight = swept.chosen
    text = f"learning rate {rate:g}, weight {weight:g}"
    came = sum(run.match is not None for run in swept.best)
    if came < len(swept.best):
        text += f"; {came} of {len(swept.best)} runs came to {target:.2f}"
    return text


def _column(summary: Summary, column: Column) -> list[Cell]:
    """Of each method; the best one and those within noise of it are marked."""
    values = [by_seed(swept.best, column.value) for swept in summary.methods]
    # One that forgot less than the others has kept more for that reason alone.
    rival = [
        bool(of) and all(run.match is not None for run in swept.best)
        for swept, of in zip(summary.methods, values, strict=True)
    ]
    spreads = [spread(list(of.values())) if of else None for of in values]
    losses = [{seed: _loss(v, column) for seed, v in of.items()} for of in values]
    ranked = [
        (sum(of.values()) / len(of), n)
        for n, of in enumerate(losses)
        if rival[n] and len(of) == len(summary.methods[n].best)
    ]
    plain = [_cell(found, column.digits) for found in spreads]
    # Where all that is shown is alike there is no best one.
    differ = len({plain[n].text for _, n in ranked}) > 1
    best = min(ranked)[1] if differ else None
    marked = []
    for n, cell in enumerate(plain):
        mark = ""
        if n == best:
            mark = "best"
        elif best is not None and rival[n] and is_within_noise(losses[n], losses[best]):
            mark = "noise"
        marked.append(dataclasses.replace(cell, mark=mark))
    return marked


def _loss(value: float, column: Column) -> float:
    """What is the less the better."""
    if column.good == AS_GOLDEN:
        return abs(value - (column.models[1] or 0.0))
    return -value if column.good == HIGH else value


def _cell(found: Spread | None, digits: int) -> Cell:
    if found is None:
        return Cell("–")  # noqa: RUF001
    half = "" if found.half is None else f"{found.half:.{digits}f}"
    return Cell(f"{found.mean:.{digits}f}", half)


def _plain(value: float | None, digits: int) -> Cell:
    return Cell("–" if value is None else f"{value:.{digits}f}")  # noqa: RUF001


def lead(summary: Summary) -> str:
    """What came out of it, in a sentence or two: by what settings were chosen by."""
    column = _mean_of(summary, summary.by)
    name = column.title
    cells = _column(summary, column)
    best = [n for n, cell in enumerate(cells) if cell.mark == "best"]
    golden = column.models[1]
    start = f"At a forget probability of {summary.target:.2f}"
    if not best:
        return f"{start} no method has runs with every seed to compare."
    first = cells[best[0]]
    half = f" ± {first.half}" if first.half else ""
    text = f"{start}, {summary.methods[best[0]].title} keeps most: {name} {first.text}{half}"
    text += "" if golden is None else f", where the golden model has {golden:.3f}"
    equal = [summary.methods[n].title for n, cell in enumerate(cells) if cell.mark == "noise"]
    if equal:
        return f"{text}. Within the noise of the seeds: {', '.join(equal)}."
    if len(summary.methods[best[0]].best) < 2:
        return f"{text}. One seed, which decides nothing."
    return f"{text}."


@dataclass(frozen=True)
class CellRow:
    """A row of the table of all cells.

    Attributes:
        title: of the method.
        position: of the method.
        chosen: whether its settings are the chosen ones.
        texts: learning rate, weight, seed, steps, lowest forget probability, what is kept, seconds.
        error: of one that failed.
    """

    title: str
    position: int
    chosen: bool
    texts: list[str]
    error: str = ""


CELL_HEADS = (
    "learning rate", "weight", "seed", "steps to target", "lowest forget probability",
    "kept, validation", "kept, reported", "seconds",
)  # fmt: skip


def every_cell(summary: Summary, measure: str) -> list[CellRow]:
    """All cells that were run, failed ones too."""
    found = []
    positions = {swept.title: n for n, swept in enumerate(summary.methods)}
    for swept in summary.methods:
        for run in swept.runs:
            step = run.match and run.match.step
            numbers = (run.seen(measure, "validation"), run.seen(measure))
            texts = [
                *_named(run.settings),
                "not reached" if step is None else f"{step:.1f}",
                f"{min(c['sets']['forget'][ALL]['probability'] for c in run.found['checks']):.3f}",
                *(_plain(number, 3).text for number in numbers),
                f"{run.found['cost']['seconds']:.1f}",
            ]
            chosen = run.setting == swept.chosen
            found.append(CellRow(swept.title, positions[swept.title], chosen, texts))
    for cell, error in summary.failed:
        blank = [""] * (len(CELL_HEADS) - 3)
        texts = [*_named(cell), *blank]
        found.append(CellRow(cell["title"], positions[cell["title"]], False, texts, error))
    return sorted(found, key=lambda row: row.position)


def _named(cell: object) -> list[str]:
    values = [cell[name] for name in ("learning_rate", "forget_weight", "seed")]  # type: ignore[index]
    return [f"{value:g}" for value in values]
