"""One run of a comparison, from a dict of settings to a dict of results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.comparison.cost import peak_of
from unilogit_kernels.unlearning.comparison.fields import build
from unilogit_kernels.unlearning.comparison.measure import Looker, measure_all
from unilogit_kernels.unlearning.comparison.parts import (
    AnswersPlan,
    ChecksPlan,
    DataPlan,
    LearnPlan,
    ModelPlan,
    RobustnessPlan,
    UnlearnPlan,
)
from unilogit_kernels.unlearning.comparison.robustness import robustness_of
from unilogit_kernels.unlearning.comparison.rows import read_data
from unilogit_kernels.unlearning.comparison.subject import Bench, Subject
from unilogit_kernels.unlearning.comparison.training import Watch, learn, unlearn
from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.processes import size
from unilogit_kernels.unlearning.record import digests

STARTING, GOLDEN = "starting", "golden"
_SCRATCH = "scratch"
_LEARNED = {
    STARTING: ("retain", "learn_known", "learn_forget"),
    GOLDEN: ("retain", "learn_known"),
}
"""What each model is taught."""


def run_cell(
    settings: Mapping[str, Any], folder: Path, models: Mapping[str, Any]
) -> dict[str, Any]:
    """Unlearn by one method with one choice of settings, and measure what comes out.

    Args:
        settings: one of `Plan.cells`, with `shared` as `Plan.shared` has it.
        folder: of the comparison, in which the data lies.
        models: results of `run_model` for the starting and the golden model.

    Returns:
        For JSON: `checks`, what each look saw, and at which step; `losses`, of each step;
        `matched`, the step of the first look at or below the target, or None; `final`, everything
        of the model at that step, or at the last one; `robustness`; `cost`; `inputs`.

    Raises:
        Exception: whatever goes wrong.
    """
    shared = _Shared(settings["shared"])
    bench = _bench(json.dumps(settings["shared"], sort_keys=True), str(folder))
    subject = bench.open(
        models[STARTING]["source"], method=settings["method"], **settings["parameters"]
    )
    looker = Looker(bench, shared.answers.batch_size)
    looker.feed(subject)
    goal = target_of(models, shared.checks)

    watch = Watch(
        lambda: looker.look(subject.trained), models[STARTING]["look"], goal, shared.checks
    )
    scratch = folder / _SCRATCH / settings["name"]
    with peak_of() as peak:
        unlearn(subject, settings, shared.unlearn, bench, watch, scratch)
    inputs = digests(subject.whole, bench.encoding, bench.training, size())
    final = measure_all(bench, subject, shared.answers, models[GOLDEN]["logs"])
    tried = _robustness(bench, subject, shared, looker, scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    steps = watch.checks[-1]["step"]
    return {
        "checks": watch.checks,
        "losses": watch.losses,
        "matched": watch.kept_at,
        "final": final,
        "robustness": tried,
        "cost": {
            "seconds": watch.seconds,
            "steps": steps,
            "peak_bytes": peak.bytes,
        },
        "inputs": inputs,
    }


def run_model(role: str, settings: Mapping[str, Any], folder: Path, golden: Any) -> dict[str, Any]:
    """Make the starting or the golden model where there is none, and measure it.

    Args:
        role: `STARTING` or `GOLDEN`.
        settings: with `shared` as `Plan.shared` has it.
        folder: of the comparison; a model that is made lies in its folder of that name.
        golden: the golden model's results in OpenUnlearning's shape, or None for that model.

    Returns:
        For JSON: `source`, where it lies; `look`; and as far as they apply what `run_cell` returns.
    """
    shared = _Shared(settings["shared"])
    bench = _bench(json.dumps(settings["shared"], sort_keys=True), str(folder))
    source = getattr(shared.model, role)
    scratch = folder / _SCRATCH / role
    if source is None:
        source = str(folder / role)
        if not (folder / role / "config.json").exists():
            subject = bench.open(bench.base)
            rows = [
                row
                for name in _LEARNED[role]
                for row in bench.fed(subject, name, bench.training[name])
            ]
            learn(subject, rows, shared.learn, bench, scratch)
            unfinished = folder / f"{role}.part"
            subject.whole.save_pretrained(unfinished)
            bench.encoding.tokenizer.save_pretrained(unfinished)
            unfinished.replace(folder / role)
    subject = bench.open(source)
    looker = Looker(bench, shared.answers.batch_size)
    looker.feed(subject)
    inputs = digests(subject.whole, bench.encoding, bench.training, size())
    found = {
        "source": source,
        "look": looker.look(subject.trained),
        "final": measure_all(bench, subject, shared.answers, golden),
        "inputs": inputs,
    }
    found["logs"] = found["final"].pop("logs")
    found["robustness"] = _robustness(bench, subject, shared, looker, scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    return found


def check_measures(by: Sequence[str], shared: Mapping[str, Any], folder: Path) -> None:
    """See that the rows have what settings are chosen by.

    Args:
        by: measures, `set.measure`.
        shared: as `Plan.shared` has it.
        folder: of the comparison.

    Raises:
        RunError: there is no such set.
        DataError: the rows cannot be read.
    """
    bench = _bench(json.dumps(shared, sort_keys=True), str(folder))
    known = [each.name for each in bench.data.sets]
    for measure in by:
        name = measure.partition(".")[0]
        if name not in known:
            raise RunError(f"choose.by: there is no set {name!r}; there are {', '.join(known)}")


def target_of(models: Mapping[str, Any], checks: ChecksPlan) -> float:
    """The forget probability at which methods are compared."""
    if checks.target is not None:
        return checks.target
    return float(models[GOLDEN]["look"]["forget"]["all"]["probability"])


class _Shared:
    """The parts of a plan that cells are a function of.

    Args:
        content: as `Plan.shared` has them.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.data: DataPlan = build(DataPlan, content["data"], "data")
        self.model: ModelPlan = build(ModelPlan, content["model"], "model")
        self.learn: LearnPlan = build(LearnPlan, content["learn"], "learn")
        self.unlearn: UnlearnPlan = build(UnlearnPlan, content["unlearn"], "unlearn")
        self.checks: ChecksPlan = build(ChecksPlan, content["checks"], "checks")
        self.answers: AnswersPlan = build(AnswersPlan, content["answers"], "answers")
        self.robustness: RobustnessPlan = build(RobustnessPlan, content["robustness"], "robustness")
        self.validation: float = content["split"]["validation"]
        self.split_seed: int = content["split"]["seed"]


@lru_cache(maxsize=1)
def _bench(shared: str, folder: str) -> Bench:
    """The rows, which all cells of a process share."""
    parts = _Shared(json.loads(shared))
    data = read_data(
        parts.data,
        parts.answers,
        Path(folder),
        validation=parts.validation,
        seed=parts.split_seed,
        checked=parts.checks.rows,
    )
    return Bench(parts.model, data, Path(folder))


def _robustness(
    bench: Bench, subject: Subject, shared: _Shared, looker: Looker, scratch: Path
) -> dict[str, Any]:
    return robustness_of(
        bench, subject, shared.robustness, looker, shared.learn, shared.split_seed, scratch
    )
