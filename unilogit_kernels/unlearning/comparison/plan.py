"""What is compared on what, as a plan file says it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unilogit_kernels.unlearning.comparison.fields import build
from unilogit_kernels.unlearning.comparison.parts import (
    POSITIVE,
    SEED,
    AnswersPlan,
    ChecksPlan,
    ChoosePlan,
    DataPlan,
    LearnPlan,
    MethodPlan,
    ModelPlan,
    RobustnessPlan,
    UnlearnPlan,
)
from unilogit_kernels.unlearning.errors import RunError, reading
from unilogit_kernels.unlearning.loading import DTYPES
from unilogit_kernels.unlearning.methods import (
    Method,
    check_goes_together,
    default_retain_loss,
)

Setting = tuple[float, float]
"""Learning rate and forget weight."""


@dataclass(frozen=True)
class Plan:
    """A comparison. `docs/compare.md` shows a file of one.

    Attributes:
        title: of the report.
        note: what a reader of the report has to know besides; a paragraph below its title.
        data: where the rows come from.
        model: which models.
        methods: at least one.
        learning_rates: each method's, unless it has its own.
        forget_weights: each method's, unless it has its own.
        seeds: of training, each of which runs every setting of every method; but see `ChoosePlan`.
        learn: how the starting and the golden model learn.
        unlearn: what all methods share.
        checks: when a run is looked at.
        choose: how settings are chosen.
        answers: of the model at matched forgetting.
        robustness: what is tried on it.
    """

    title: str
    data: DataPlan
    model: ModelPlan
    methods: tuple[MethodPlan, ...]
    learning_rates: tuple[float, ...] = field(metadata={"range": POSITIVE})
    forget_weights: tuple[float, ...] = field(metadata={"range": POSITIVE})
    seeds: tuple[int, ...] = field(metadata={"range": SEED})
    learn: LearnPlan = field(default_factory=LearnPlan)
    unlearn: UnlearnPlan = field(default_factory=UnlearnPlan)
    checks: ChecksPlan = field(default_factory=ChecksPlan)
    choose: ChoosePlan = field(default_factory=ChoosePlan)
    answers: AnswersPlan = field(default_factory=AnswersPlan)
    robustness: RobustnessPlan = field(default_factory=RobustnessPlan)
    note: str = ""

    def check(self) -> None:
        """See that all of it goes together.

        Raises:
            RunError: it does not; the message names the field.
        """
        _check_data(self.data)
        _check_model(self.model)
        for name in ("methods", "seeds"):
            if not getattr(self, name):
                raise RunError(f"{name} must hold at least one, got none")
        if (self.choose.training_seeds or 0) > len(self.seeds):
            raise RunError(
                f"choose.training_seeds must be at most {len(self.seeds)}, the number of seeds, "
                f"got {self.choose.training_seeds}"
            )
        titles = [method.title for method in self.methods]
        slugs = [slug(title) for title in titles]
        for title, each in zip(titles, slugs, strict=True):
            if slugs.count(each) > 1:
                raise RunError(f"methods: two are called {title!r}; give one another label")
        for method in self.methods:
            _check_method(method)
            for name in ("learning_rates", "forget_weights"):
                if not (getattr(method, name) or getattr(self, name)):
                    raise RunError(f"{name} must hold at least one, got none")
        for measure in self.choose.by:
            if re.fullmatch(r"[\w-]+\.(probability|exact)", measure) is None:
                raise RunError(
                    "choose.by must name sets and what is looked at in every check, as in "
                    f"'neighbours.probability' or 'retain.exact', got {measure!r}"
                )

    def shared(self) -> dict[str, Any]:
        """What every cell is a function of, for JSON; not what decides which cells there are."""
        parts = ("data", "model", "learn", "unlearn", "checks", "answers", "robustness")
        found = {name: dataclasses.asdict(getattr(self, name)) for name in parts}
        split = {"validation": self.choose.validation, "seed": self.choose.seed}
        return {**found, "split": split}

    @property
    def choosing_seeds(self) -> tuple[int, ...]:
        """Those that run every setting."""
        return self.seeds[: self.choose.training_seeds]

    def count(self) -> int:
        """How many cells there are once settings are chosen."""
        others = len(self.seeds) - len(self.choosing_seeds)
        return len(self.cells()) + others * len(self.methods)

    def cells(self, chosen: Mapping[str, Setting] | None = None) -> list[dict[str, Any]]:
        """The settings of each cell that are its own, for JSON, with a `name` that no other has.

        Args:
            chosen: by the method's title; of seeds that do not choose, the cells with these
                settings. None for the cells that the choice is made on.
        """
        found: list[dict[str, Any]] = []
        for seed, method in itertools.product(self.seeds, self.methods):
            rates = method.learning_rates or self.learning_rates
            weights = method.forget_weights or self.forget_weights
            for rate, weight in itertools.product(rates, weights):
                if seed not in self.choosing_seeds and (rate, weight) != (chosen or {}).get(
                    method.title
                ):
                    continue
                found.append(
                    {
                        "name": f"{slug(method.title)}-lr{rate:g}-w{weight:g}-seed{seed}",
                        "method": method.name,
                        "title": method.title,
                        "parameters": dict(method.parameters),
                        "retain_loss": method.retain_loss,
                        "retain_weight": method.retain_weight,
                        "learning_rate": rate,
                        "forget_weight": weight,
                        "seed": seed,
                    }
                )
        names: list[str] = [cell["name"] for cell in found]
        for name in names:
            if names.count(name) > 1:
                raise RunError(f"two cells of the plan are alike: {name}")
        return found


def slug(title: str) -> str:
    """A title as part of a file's name.

    Example:
        >>> slug("Unilogit (forward KL)")
        'unilogit-forward-kl'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "method"


def read_plan(path: Path) -> Plan:
    """Read a plan from a YAML or JSON file and check it.

    Paths in it are relative to the working directory, as on the command line.

    Args:
        path: of the file.

    Raises:
        RunError: it cannot be read, or something in it is wrong; the message names the field.
    """
    with reading(f"the plan {path}"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return plan_of(content)


def plan_of(content: Any) -> Plan:
    """A plan from what a file of it holds.

    Args:
        content: a mapping of the fields of `Plan`; a method may be its name alone.

    Raises:
        RunError: see `read_plan`.
    """
    if isinstance(content, Mapping) and isinstance(content.get("methods"), list):
        methods = [{"name": m} if isinstance(m, str) else m for m in content["methods"]]
        content = {**content, "methods": methods}
    plan: Plan = build(Plan, content, "the plan")
    plan.check()
    plan.cells()
    return plan


def _check_data(data: DataPlan) -> None:
    given = [n for n in ("made_up", "benchmark", "files") if getattr(data, n) is not None]
    if len(given) != 1:
        raise RunError(
            "data must name its rows by exactly one of made_up, benchmark and files, got "
            f"{' and '.join(given) or 'none'}"
        )
    if (data.benchmark is None) != (data.data_dir is None):
        raise RunError("data.benchmark and data.data_dir go together: what, and where")
    for name in ("forget", "retain"):
        if data.files is not None and name not in data.files:
            raise RunError(f"data.files must name a file of the set {name!r}")


def _check_model(model: ModelPlan) -> None:
    if model.dtype not in DTYPES:
        raise RunError(f"model.dtype must be one of {', '.join(DTYPES)}, got {model.dtype!r}")
    if model.base is None and (model.starting is None or model.golden is None):
        raise RunError("model.base is what the starting or the golden model is made of: name one")
    if model.cached and (model.starting or model.golden or model.train_layers is None):
        raise RunError(
            "model.cached needs train_layers and a base of which both models are made, so that the "
            "layers below are the same in all: leave starting and golden out"
        )


def _check_method(method: MethodPlan) -> None:
    where = f"method {method.title!r}"
    with reading(where):
        resolved = Method(method.name, method.parameters)
        if resolved.is_negated:
            raise RunError(
                f"{where}: learns the rows while it runs and forgets at its end, so there is no "
                "step of matched forgetting: run it by unilogit unlearn"
            )
        if resolved.needs_refusals:
            raise RunError(f"{where}: needs refusals, which a plan has no place for")
        retain_loss = method.retain_loss or default_retain_loss(method.name)
        check_goes_together(method.name, retain_loss, 0.0, None)
