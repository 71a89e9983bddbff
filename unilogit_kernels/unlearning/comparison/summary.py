"""What a comparison says: each method at its chosen settings, and the sweep around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.comparison.cell import GOLDEN, STARTING, target_of
from unilogit_kernels.unlearning.comparison.fields import build
from unilogit_kernels.unlearning.comparison.folder import AUDIT, PLAN, read_cell, read_models
from unilogit_kernels.unlearning.comparison.matching import Match, at_target
from unilogit_kernels.unlearning.comparison.measure import ALL, TEST, VALIDATION
from unilogit_kernels.unlearning.comparison.parts import ChecksPlan
from unilogit_kernels.unlearning.comparison.plan import Setting
from unilogit_kernels.unlearning.errors import reading
from unilogit_kernels.unlearning.measuring.sets import role_of


@dataclass(frozen=True)
class Run:
    """A cell that came to an end.

    Attributes:
        settings: of the cell.
        found: what `run_cell` returned.
        match: it at the target, or None where it never came there.
    """

    settings: Mapping[str, Any]
    found: Mapping[str, Any]
    match: Match | None

    @property
    def setting(self) -> Setting:
        """Of the sweep."""
        return self.settings["learning_rate"], self.settings["forget_weight"]

    @property
    def seed(self) -> int:
        """Of its training."""
        return int(self.settings["seed"])

    def seen(self, measure: str, part: str = TEST) -> float | None:
        """A measure at the target, `set.measure`; None where there is none."""
        return None if self.match is None else seen(self.match.sets, measure, part)

    def mean(self, measures: Iterable[str], part: str = TEST) -> float | None:
        """The mean of several measures at the target."""
        return mean_of(self.seen(measure, part) for measure in measures)

    def final(self, measure: str, part: str = TEST) -> float | None:
        """A measure of everything that was measured at the end, `set.measure` or a joint one."""
        return final(self.found["final"], measure, part)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Their mean; None where there are none, or one is missing."""
    given = list(values)
    known = [value for value in given if value is not None]
    return sum(known) / len(known) if known and len(known) == len(given) else None


def seen(look: Mapping[str, Any], measure: str, part: str = TEST) -> float | None:
    """A measure of a look; of all rows where the set has none in that part.

    Rows to forget are not split: each run sees all of them.
    """
    name, _, what = measure.partition(".")
    parts = look.get(name, {})
    if role_of(name) == "forget" or not parts.get(part):
        part = ALL
    value = parts.get(part, {}).get(what)
    return None if value is None else float(value)


def final(found: Mapping[str, Any], measure: str, part: str = TEST) -> float | None:
    """A measure of `measure_all`."""
    name, _, what = measure.partition(".")
    if not what:
        value = found["joint"].get(name, {}).get("value")
        return None if value is None else float(value)
    of_measure = found["sets"].get(name, {}).get(what, {})
    if role_of(name) == "forget" or part not in of_measure:
        part = ALL
    value = of_measure.get(part)
    return None if value is None else float(value)


@dataclass(frozen=True)
class Swept:
    """A method with all of its runs.

    Attributes:
        title: of the method.
        runs: that came to an end.
        by: what its settings are chosen by.
        choosing_seeds: whose runs they are chosen by; None for all.
    """

    title: str
    by: Sequence[str]
    choosing_seeds: Collection[int] | None = None
    runs: list[Run] = field(default_factory=list)

    @property
    def settings(self) -> list[Setting]:
        """Those that were tried, in order."""
        return sorted({run.setting for run in self.runs if self._choosing(run.setting)})

    def at(self, setting: Setting) -> list[Run]:
        """The runs of one choice of settings."""
        return [run for run in self.runs if run.setting == setting]

    def score(self, setting: Setting) -> float | None:
        """What the choice is made by; None where no run came to the target."""
        return mean_of(run.mean(self.by, VALIDATION) for run in self._choosing(setting))

    def best_over(self, setting_in: int) -> dict[float, tuple[float, Setting]]:
        """For each value of one part of a `Setting`, the best score and the setting that has it."""
        best: dict[float, tuple[float, Setting]] = {}
        for setting in self.settings:
            score, value = self.score(setting), setting[setting_in]
            if score is not None and (value not in best or score > best[value][0]):
                best[value] = score, setting
        return dict(sorted(best.items()))

    @cached_property
    def chosen(self) -> Setting | None:
        """The settings of the largest score; where none has one, those that came closest."""
        scores = {setting: self.score(setting) for setting in self.settings}
        known = {setting: score for setting, score in scores.items() if score is not None}
        if known:
            return max(known, key=lambda setting: (known[setting], setting))
        return max(self.settings, key=lambda s: (self._came(s), -self._lowest(s), s), default=None)

    @property
    def best(self) -> list[Run]:
        """The runs of the chosen settings, by seed."""
        runs = [] if self.chosen is None else self.at(self.chosen)
        return sorted(runs, key=lambda run: run.seed)

    def _choosing(self, setting: Setting) -> list[Run]:
        seeds = self.choosing_seeds
        return [run for run in self.at(setting) if seeds is None or run.seed in seeds]

    def _came(self, setting: Setting) -> int:
        return sum(run.match is not None for run in self._choosing(setting))

    def _lowest(self, setting: Setting) -> float:
        lowest = [
            min(float(c["sets"]["forget"][ALL]["probability"]) for c in run.found["checks"])
            for run in self._choosing(setting)
        ]
        return sum(lowest) / len(lowest)


@dataclass(frozen=True)
class Summary:
    """All that a report draws.

    Attributes:
        title: of the comparison.
        note: what its plan says besides.
        methods: in the order of the plan.
        failed: settings and error of each cell that failed.
        waiting: names of cells that have not been run.
        models: results of the starting and the golden model.
        target: forget probability at which methods are compared.
        by: what settings are chosen by.
        samples: how many answers to show.
        shared: what all cells share.
        audit: what was compared of what.
    """

    title: str
    note: str
    methods: list[Swept]
    failed: list[tuple[Mapping[str, Any], str]]
    waiting: list[str]
    models: Mapping[str, Any]
    target: float
    by: Sequence[str]
    samples: int
    shared: Mapping[str, Any]
    audit: Mapping[str, Any]

    @property
    def sets(self) -> list[str]:
        """Names of those that are measured, in order."""
        return list(self.models[STARTING]["look"])

    def of_roles(self, *roles: str) -> list[str]:
        """Sets of these roles."""
        return [name for name in self.sets if role_of(name) in roles]

    @property
    def kept(self) -> list[str]:
        """Sets that are to be known still, what no unlearning batch contains first."""
        return self.of_roles("neighbours") + self.of_roles("retain") + self.of_roles("general")

    def of_model(self, role: str, measure: str) -> float | None:
        """A measure of the starting or golden model, from everything that was measured of it."""
        return final(self.models[role]["final"], measure)

    def seen_of_model(self, role: str, measure: str) -> float | None:
        """The same as looks see it."""
        return seen(self.models[role]["look"], measure)


def by_seed(runs: Iterable[Run], value: Callable[[Run], float | None]) -> dict[int, float]:
    """What each run has, by its seed; runs without are left out."""
    found = {run.seed: value(run) for run in runs}
    return {seed: each for seed, each in found.items() if each is not None}


def read_summary(folder: Path) -> Summary:
    """Read what `compare` has written.

    Args:
        folder: of the comparison.

    Raises:
        RunError: it holds none.
    """
    with reading(f"{folder}: holds no comparison"):
        recorded = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        audit = json.loads((folder / AUDIT).read_text(encoding="utf-8"))
    plan, shared = recorded["plan"], recorded["shared"]
    models = read_models(folder)
    target = target_of(models, build(ChecksPlan, shared["checks"], "checks"))
    methods: dict[str, Swept] = {}
    failed: list[tuple[Mapping[str, Any], str]] = []
    waiting: list[str] = []
    for cell in plan["cells"]:
        swept = methods.setdefault(
            cell["title"], Swept(cell["title"], plan["by"], plan["choosing_seeds"])
        )
        found = read_cell(folder, cell)
        if found is None:
            waiting.append(cell["name"])
        elif "error" in found:
            failed.append((cell, found["error"]))
        else:
            swept.runs.append(Run(cell, found, at_target(found["checks"], target)))
    return Summary(
        title=plan["title"],
        note=plan["note"],
        methods=list(methods.values()),
        failed=failed,
        waiting=waiting,
        models={role: models[role] for role in (STARTING, GOLDEN)},
        target=target,
        by=plan["by"],
        samples=plan["samples"],
        shared=shared,
        audit=audit,
    )
