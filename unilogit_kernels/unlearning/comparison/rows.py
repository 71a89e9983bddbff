"""The rows of a comparison: what models learn, what runs see, what is measured and how split."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unilogit_kernels.unlearning.benchmarks import load_benchmark
from unilogit_kernels.unlearning.benchmarks.sets import EvaluationSet, Generation
from unilogit_kernels.unlearning.comparison.parts import AnswersPlan, DataPlan
from unilogit_kernels.unlearning.data import Row, read_rows
from unilogit_kernels.unlearning.demo.tofu_shape import make_tofu_shaped, write_tofu_shaped
from unilogit_kernels.unlearning.errors import RunError, reading
from unilogit_kernels.unlearning.measuring.sets import measures_of, role_of, sets_of_rows
from unilogit_kernels.unlearning.measuring.variants import row_id

MADE_UP = "data"
"""The folder of made-up rows, in that of the comparison."""

NEIGHBOURS = "neighbours"


@dataclass(frozen=True)
class Data:
    """All rows.

    Attributes:
        forget: to forget.
        retain: that unlearning batches contain.
        known: that the starting and the golden model learn and no unlearning batch contains.
        sets: what is measured; the first one is `forget`.
        validation: of each set, the positions of the rows that settings are chosen on.
        looked_at: of each set, the positions of the rows that every check looks at.
    """

    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    known: tuple[Row, ...]
    sets: tuple[EvaluationSet, ...]
    validation: Mapping[str, frozenset[int]]
    looked_at: Mapping[str, tuple[int, ...]]


def read_data(
    plan: DataPlan,
    answers: AnswersPlan,
    folder: Path,
    *,
    validation: float,
    seed: int,
    checked: int,
) -> Data:
    """Read the rows, or make them up on the first call.

    Args:
        plan: where they come from.
        answers: how answers to them are made.
        folder: of the comparison; made-up rows are kept there.
        validation: share of each set's rows that settings are chosen on.
        seed: of that split, of what is set aside, and of the rows that checks look at.
        checked: how many of a set they look at, at most.

    Raises:
        DataError: a file cannot be read.
        RunError: the rows do not allow what the plan says.
    """
    training, sets = _from_files(plan) if plan.files else _from_benchmark(plan, folder)
    retain, aside = _set_aside(training["retain"], plan.set_aside, seed)
    sets = _chosen(_with_neighbours(sets, retain, aside), plan.sets)
    how = Generation(answers.max_new_tokens)
    sets = [dataclasses.replace(each, generation=how) for each in sets]
    sets.sort(key=lambda each: each.role != "forget")
    if not sets or sets[0].role != "forget":
        raise RunError("data: there is no set of rows to forget to measure")
    order = {each.name: _order(each, seed) for each in sets}
    return Data(
        forget=tuple(training["forget"]),
        retain=tuple(retain),
        known=(*training.get("known", ()), *aside),
        sets=tuple(sets),
        validation={
            name: frozenset(rows[: round(validation * len(rows))]) for name, rows in order.items()
        },
        # From both ends, so that both parts of the split are looked at alike.
        looked_at={name: _both_ends(rows, checked) for name, rows in order.items()},
    )


def _chosen(sets: list[EvaluationSet], names: Sequence[str]) -> list[EvaluationSet]:
    """The sets that a plan names; all where it names none."""
    known = [each.name for each in sets]
    for name in names:
        if name not in known:
            raise RunError(f"data.sets: there is no set {name!r}; there are {', '.join(known)}")
    return [each for each in sets if not names or each.name in names]


def _from_files(plan: DataPlan) -> tuple[dict[str, Sequence[Row]], list[EvaluationSet]]:
    rows: dict[str, list[Row]] = {}
    for name, path in (plan.files or {}).items():
        with reading(f"data.files.{name}"):
            rows[name] = read_rows(path)
    known = [
        row for name, each in rows.items() if role_of(name) in ("neighbours", "general")
        for row in each
    ]  # fmt: skip
    sets = list(sets_of_rows(rows))
    return {"forget": rows["forget"], "retain": rows["retain"], "known": known}, sets


def _from_benchmark(
    plan: DataPlan, folder: Path
) -> tuple[dict[str, Sequence[Row]], list[EvaluationSet]]:
    name, data_dir = plan.benchmark, Path(plan.data_dir or "")
    if plan.made_up is not None:
        data_dir = folder / MADE_UP
        with reading("data.made_up"):
            tables = make_tofu_shaped(**plan.made_up)
        if not (data_dir / "idk.jsonl").exists():  # The last one that is written.
            write_tofu_shaped(tables, data_dir)
        name = f"tofu:{max(t for t in tables if re.fullmatch('forget[0-9]+', t))}"
    with reading(f"data.benchmark {name}"):
        found = load_benchmark(str(name), data_dir)
    for part in ("forget", "retain"):
        if not found.training.get(part):
            raise RunError(f"data.benchmark {name}: has no {part} rows here")
    return dict(found.training), list(found.sets)


def _subject(row: Row, position: int) -> str:
    """What a row is about, as its id tells it; or the row itself."""
    name = row_id(row, position)
    return name.rpartition("/")[0] or name


def _set_aside(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The retain rows that batches contain, and those that are set aside."""
    named = [(_subject(row, n), row) for n, row in enumerate(rows)]
    subjects = sorted({subject for subject, _ in named})
    random.Random(f"aside/{seed}").shuffle(subjects)
    aside = set(subjects[: round(share * len(subjects))])
    if share and not 0 < len(aside) < len(subjects):
        raise RunError(
            f"data.set_aside {share} of {len(subjects)} retained subjects leaves none on one side"
        )
    kept = [row for subject, row in named if subject not in aside]
    return kept, [row for subject, row in named if subject in aside]


def _with_neighbours(
    sets: Sequence[EvaluationSet], retain: Sequence[Row], aside: Sequence[Row]
) -> list[EvaluationSet]:
    """The sets with what is set aside as one of its own, and out of the retain set."""
    if not aside:
        return list(sets)
    if any(each.name == NEIGHBOURS for each in sets):
        raise RunError("data.set_aside: there is a set of neighbours already; leave one out")
    gone = {(row.prompt, row.completion) for row in aside}
    found: list[EvaluationSet] = []
    for each in sets:
        if each.role == "retain":
            left = [row for row in each.rows if (row.prompt, row.completion) not in gone]
            rows = tuple(left or retain)
            each = dataclasses.replace(
                each, rows=rows, measures=each.measures & measures_of(rows, "retain")
            )
        found.append(each)
    named = tuple(dataclasses.replace(row, id=row_id(row, n)) for n, row in enumerate(aside))
    measures = measures_of(named, "neighbours")
    found.append(EvaluationSet(NEIGHBOURS, named, "neighbours", measures))
    return found


def _order(each: EvaluationSet, seed: int) -> list[int]:
    positions = list(range(len(each.rows)))
    random.Random(f"validation/{seed}/{each.name}").shuffle(positions)
    return positions


def _both_ends(positions: Sequence[int], most: int) -> tuple[int, ...]:
    if len(positions) <= most:
        return tuple(sorted(positions))
    first = most // 2
    return tuple(sorted([*positions[:first], *positions[len(positions) - (most - first) :]]))
