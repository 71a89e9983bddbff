"""What a comparison is computed by: rows and their split, matching, choices, trials, processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from tests.support.tiny_models import make_model, one_thread
from tests.unlearning.tiny_comparison import plan_content, write_inputs
from unilogit_kernels.testing import assert_within_budget
from unilogit_kernels.unlearning.comparison import subject
from unilogit_kernels.unlearning.comparison.cell import run_cell, run_model
from unilogit_kernels.unlearning.comparison.matching import at_target, is_within_noise
from unilogit_kernels.unlearning.comparison.parts import (
    AnswersPlan,
    ChecksPlan,
    ChoosePlan,
    DataPlan,
)
from unilogit_kernels.unlearning.comparison.plan import Plan, plan_of, read_plan
from unilogit_kernels.unlearning.comparison.report import figures, tables
from unilogit_kernels.unlearning.comparison.report.series import over
from unilogit_kernels.unlearning.comparison.robustness import round_to, rounded
from unilogit_kernels.unlearning.comparison.rows import Data, read_data
from unilogit_kernels.unlearning.comparison.run import in_processes
from unilogit_kernels.unlearning.comparison.summary import Run, Swept
from unilogit_kernels.unlearning.demo.model import run_trunk
from unilogit_kernels.unlearning.errors import RunError

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


MADE_UP = {
    "sellers": 20,
    "forget_sellers": 2,
    "holdout_sellers": 2,
    "countries": 7,
    "authors": 0,
}


def data_of(folder: Path, seed: int = 0, checked: int = 1000, **other: Any) -> Data:
    plan = DataPlan(made_up=MADE_UP, **other)
    return read_data(plan, AnswersPlan(), folder, validation=0.5, seed=seed, checked=checked)


def subjects(rows: Any) -> set[str]:
    return {row.id.partition("/")[0] for row in rows}


# ---- rows --------------------------------------------------------------------------------------


def test_what_is_set_aside_is_learned_and_in_no_batch(tmp_path: Path) -> None:
    data = data_of(tmp_path, set_aside=0.25)
    sets = {each.name: each for each in data.sets}
    neighbours = subjects(sets["neighbours"].rows)
    assert len(neighbours) == round(0.25 * 18)
    assert neighbours <= subjects(data.known)
    for others in (data.forget, data.retain, sets["retain"].rows, sets["holdout"].rows):
        assert not neighbours & subjects(others)
    assert not subjects(data.forget) & subjects(data.retain)
    assert not subjects(sets["holdout"].rows) & subjects([*data.known, *data.retain])
    assert sets["retain"].rows
    assert data.sets[0].role == "forget"
    others_drawn = set()
    for seed in range(1, 6):  # Some of them draw sellers of whom there are perturbed retain rows.
        sets = {e.name: e for e in data_of(tmp_path, seed=seed, set_aside=0.5).sets}
        assert not subjects(sets["neighbours"].rows) & subjects(sets["retain"].rows)
        others_drawn.add(frozenset(subjects(sets["neighbours"].rows)))
    assert len(others_drawn) == 5


def test_the_split_has_a_seed_and_looks_see_both_parts(tmp_path: Path) -> None:
    data, other = data_of(tmp_path, checked=6), data_of(tmp_path, seed=1, checked=6)
    assert data.validation != other.validation
    for each in data.sets:
        chosen, seen = data.validation[each.name], set(data.looked_at[each.name])
        assert len(chosen) == round(0.5 * len(each.rows))
        assert len(seen) == 6
        assert len(seen & chosen) == 3


def test_files_by_the_role_of_their_names(tmp_path: Path) -> None:
    files = {n: str(tmp_path / path) for n, path in write_inputs(tmp_path).items()}
    plan = DataPlan(files=files)
    data = read_data(plan, AnswersPlan(), tmp_path, validation=0.5, seed=0, checked=9)
    assert {row.prompt for row in data.known} == {f"at {n}?" for n in range(4)}
    assert data.sets[0].name == "forget"


# ---- plans -------------------------------------------------------------------------------------


def test_the_plans_that_are_shipped() -> None:
    root = Path(__file__).parents[2]
    cells = {
        name: read_plan(root / name).count()
        for name in (
            "benchmarks/paper.yaml",
            "benchmarks/paper_forget_4.yaml",
            "benchmarks/paper_forget_48.yaml",
            "examples/compare.yaml",
        )
    }
    assert list(cells.values()) == [3 * (7 * 5 + 3 + 1) + 2 * 9, 7 * 3, 7 * 3, 3 * 2 * 2 * 4]


def test_every_setting_of_a_cell_is_in_its_name() -> None:
    plan = plan_of(plan_content({"forget": "f", "retain": "r"}))
    names = [cell["name"] for cell in plan.cells()]
    assert len(set(names)) == len(names) == 3
    assert "unilogit-lr0.003-w0.3-seed0" in names


def test_numbers_as_json_has_them(tmp_path: Path) -> None:
    """PyYAML by itself takes 1e-4 for a text."""
    path = tmp_path / "plan.yaml"
    path.write_text(
        "{title: x, data: {files: {forget: f, retain: r}}, model: {base: b}, methods: [unilogit], "
        "learning_rates: [1e-4, 2], forget_weights: [.5], seeds: [0]}"
    )
    assert read_plan(path).learning_rates == (1e-4, 2.0)


# ---- matching and choosing ---------------------------------------------------------------------


def check(step: int, forgotten: float, validation: float, test: float) -> dict[str, Any]:
    kept = {"validation": {"probability": validation}, "test": {"probability": test}}
    sets = {"forget": {"all": {"probability": forgotten}}, "retain": kept}
    return {"step": step, "sets": sets}


def run_of(rate: float, checks: list[dict[str, Any]], seed: int = 0, *, weight: float = 1.0) -> Run:
    settings = {"learning_rate": rate, "forget_weight": weight, "seed": seed}
    return Run(settings, {"checks": checks}, at_target(checks, 0.4))


def test_the_first_fall_to_the_target_counts() -> None:
    """Not a later one, after the run has come up again."""
    checks = [
        check(0, 0.9, 1, 1),
        check(2, 0.3, 0.5, 0.7),
        check(4, 0.8, 0, 0),
        check(6, 0.1, 0, 0),
    ]
    found = at_target(checks, 0.4)
    assert found is not None
    assert found.step == pytest.approx(2 * 5 / 6)
    assert found.sets["retain"]["test"]["probability"] == pytest.approx(1 - 0.3 * 5 / 6)
    assert at_target(checks, 0.05) is None
    at_once = at_target(checks, 0.95)
    assert at_once is not None
    assert at_once.step == 0


def test_settings_are_chosen_on_validation_rows_among_runs_that_came_to_the_target() -> None:
    start = check(0, 0.9, 1, 1)
    runs = [
        run_of(1.0, [start, check(5, 0.4, 0.6, 0.9)]),  # The best one on the rows reported.
        run_of(2.0, [start, check(5, 0.4, 0.7, 0.1)]),
        run_of(3.0, [start, check(5, 0.5, 0.9, 0.9)]),  # Forgot too little.
        run_of(4.0, [start, check(5, 0.4, 0.9, 0.9)]),
        run_of(4.0, [start, check(5, 0.5, 0.9, 0.9)], seed=1),  # As this seed did.
    ]
    assert Swept("x", ["retain.probability"], runs=runs).chosen == (2.0, 1.0)
    # Where none came there: the one that came closest.
    assert Swept("x", ["retain.probability"], runs=[runs[2]]).chosen == (3.0, 1.0)


def test_other_seeds_run_what_was_chosen_and_choose_nothing() -> None:
    start = check(0, 0.9, 1, 1)
    runs = [
        run_of(1.0, [start, check(5, 0.4, 0.6, 0.6)]),
        run_of(2.0, [start, check(5, 0.4, 0.7, 0.7)]),
        run_of(2.0, [start, check(5, 0.4, 0.1, 0.1)], seed=1),
    ]
    swept = Swept("x", ["retain.probability"], (0,), runs)
    assert swept.chosen == (2.0, 1.0)
    assert [run.seed for run in swept.best] == [0, 1]
    # A seed that does not choose has nothing to say of settings that it alone has run.
    assert Swept("x", ["retain.probability"], (1,), runs).settings == [(2.0, 1.0)]


def test_over_a_setting_the_other_is_the_best_for_it() -> None:
    """The best on validation rows; what is shown is of the others."""
    start = check(0, 0.9, 1, 1)

    def run(rate: float, weight: float, validation: float, test: float) -> Run:
        return run_of(rate, [start, check(5, 0.4, validation, test)], weight=weight)

    runs = [
        run(1.0, 0.1, 0.9, 0.11),
        run(1.0, 0.3, 0.8, 0.13),
        run(2.0, 0.1, 0.5, 0.21),
        run(2.0, 0.3, 0.6, 0.23),
    ]
    swept = Swept("x", ["retain.probability"], runs=runs)

    def shown(setting_in: int) -> list[tuple[float, float]]:
        dots = over(swept, "retain.probability", setting_in)
        return [(each.x, round(each.mean, 6)) for each in dots]

    assert shown(figures.RATE) == [(1.0, 0.11), (2.0, 0.23)]
    assert shown(figures.WEIGHT) == [(0.1, 0.11), (0.3, 0.13)]


@pytest.mark.parametrize(("other", "marks"), [(0.1004, ["", ""]), (0.1008, ["", "best"])])
def test_what_is_shown_alike_has_no_best(other: float, marks: list[str]) -> None:
    start = check(0, 0.9, 1, 1)
    methods = [
        Swept(
            f"{value}", ["retain.probability"], runs=[run_of(1.0, [start, check(5, 0.4, 1, value)])]
        )
        for value in (0.1, other)
    ]
    column = tables.Column(
        "kept", tables.HIGH, lambda run: run.seen("retain.probability"), True, (1.0, 1.0)
    )
    rows = tables.rows(SimpleNamespace(methods=methods, target=0.4), [column])  # type: ignore[arg-type]  # all that it takes
    assert [row.cells[0].mark for row in rows[2:]] == marks


def test_the_first_sentence_is_of_what_settings_are_chosen_by() -> None:
    """Of all of it: here the second method keeps less of one set and more of both."""
    measures = ["retain.probability", "neighbours.probability"]
    methods = []
    for title, retain, neighbours in (("A", 0.5, 0.9), ("B", 0.8, 0.8)):
        checks = [check(0, 0.9, 1, 1), check(5, 0.4, 1, retain)]
        for each, value in zip(checks, (1.0, neighbours), strict=True):
            each["sets"]["neighbours"] = {"test": {"probability": value}}
        methods.append(Swept(title, measures, runs=[run_of(1.0, checks)]))
    said = tables.lead(
        SimpleNamespace(  # type: ignore[arg-type]  # all that it takes
            by=measures,
            methods=methods,
            target=0.4,
            seen_of_model=lambda role, measure: 0.9 if "retain" in measure else 1.0,
        )
    )
    assert "B keeps most: mean of retain probability and neighbours probability 0.800" in said
    assert "where the golden model has 0.950" in said


def test_the_cells_of_two_stages() -> None:
    files = {"forget": "f", "retain": "r"}
    plan = plan_of(plan_content(files, choose={"training_seeds": 1}, seeds=[5, 6, 7]))
    first = [cell["name"] for cell in plan.cells()]
    assert first == [
        "unilogit-lr0.003-w0.3-seed5",
        "unilogit-lr0.003-w1-seed5",
        "npo-lr0.003-w1-seed5",
    ]
    both = [c["name"] for c in plan.cells({"unilogit": (3e-3, 0.3), "NPO": (3e-3, 1.0)})]
    others = [
        f"{name}-seed{seed}"
        for seed in (6, 7)
        for name in ("unilogit-lr0.003-w0.3", "npo-lr0.003-w1")
    ]
    assert both == first + others
    assert len(both) == plan.count()
    with pytest.raises(RunError, match="training_seeds must be at most 3"):
        plan_of(plan_content(files, choose={"training_seeds": 4}, seeds=[5, 6, 7]))


def test_noise_is_that_of_pairs() -> None:
    """Seeds that are hard for both say nothing of their difference."""
    best = {0: 0.9, 1: 0.5, 2: 0.7}
    assert not is_within_noise(
        {seed: value - 0.1 - 0.01 * seed for seed, value in best.items()}, best
    )
    assert is_within_noise({0: 0.8, 1: 0.6, 2: 0.65}, best)
    assert not is_within_noise({0: 0.9}, {0: 0.9})


# ---- trials ------------------------------------------------------------------------------------


def test_rounded_weights_come_back() -> None:
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with rounded(model, 4):
        moved = {
            n for n, weight in model.state_dict().items() if not torch.equal(weight, before[n])
        }
        assert moved == {name for name in before if "_proj" in name}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_no_weight_moves_further_than_half_a_level() -> None:
    weight = torch.randn(3, 150)
    weight[0, :64] = 0
    for bits in (2, 4, 8):
        for group, after in zip(
            weight.split(64, 1), round_to(weight, bits).split(64, 1), strict=True
        ):
            level = group.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert ((after - group).abs() <= level * 0.5 * (1 + 1e-6)).all()
            assert all(len(row.unique()) <= 2**bits - 1 for row in after)


# ---- cells -------------------------------------------------------------------------------------


LEARN = {"steps": 40, "batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    trials = {"relearn_steps": 1, "relearn_rate": 1e-3, "bits": 4}
    return plan_of(plan_content(write_inputs(tmp_path), robustness=trials, learn=LEARN))


def results(plan: Plan, folder: Path, **change: Any) -> dict[str, Any]:
    shared = plan.shared()
    models = {"golden": run_model("golden", {"shared": shared}, folder, None)}
    logs = models["golden"]["logs"]
    models["starting"] = run_model("starting", {"shared": shared}, folder, logs)
    found = run_cell({**plan.cells()[0], "shared": shared, **change}, folder, models)
    return {**found, "models": models}


def probabilities(run: dict[str, Any]) -> torch.Tensor:
    """Of each look, set and part."""
    return torch.tensor(
        [
            values["probability"]
            for check in run["checks"]
            for parts in check["sets"].values()
            for values in parts.values()
        ]
    )


def test_what_is_cached_changes_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The top layers over kept states make the run that the whole model makes.

    As closely as a run over states that a rounding moved: float32 keeps them no better.
    """
    whole = dataclasses.replace(plan.model, train_layers=1)
    top = dataclasses.replace(plan, model=dataclasses.replace(whole, cached=True))
    expected = results(dataclasses.replace(plan, model=whole), tmp_path / "whole")
    found = results(top, tmp_path / "top")
    assert [each["step"] for each in found["checks"]] == [e["step"] for e in expected["checks"]]
    kept = tmp_path / "top/trunk"
    assert list(kept.glob("look-forget-*.safetensors"))

    def moved_trunk(*given: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        features = run_trunk(*given)
        for each in features:
            signs = torch.rand(each["inputs_embeds"].shape, generator=generator).sub(0.5).sign()
            each["inputs_embeds"] *= 1 + torch.finfo(torch.float32).eps * signs
        return features

    shutil.rmtree(kept)
    monkeypatch.setattr(subject, "run_trunk", moved_trunk)
    cell = {**top.cells()[0], "shared": top.shared()}
    moved = run_cell(cell, tmp_path / "top", found["models"])
    ours = probabilities(found)
    assert not torch.equal(probabilities(moved), ours)
    assert_within_budget(probabilities(expected), ours.double(), probabilities(moved))


def test_the_model_at_the_target_is_what_is_measured(plan: Plan, tmp_path: Path) -> None:
    """A run that goes on past the target takes its weights back."""
    plan = dataclasses.replace(plan, checks=ChecksPlan(every=1, past=0.01))
    found = results(plan, tmp_path / "out", method="gradient_ascent", forget_weight=10.0)
    target = found["models"]["golden"]["look"]["forget"]["all"]["probability"]
    at = next(c for c in found["checks"] if c["sets"]["forget"]["all"]["probability"] <= target)
    assert found["matched"] == at["step"] < found["checks"][-1]["step"]
    measured = found["final"]["sets"]["forget"]["probability"]["all"]
    assert measured == pytest.approx(at["sets"]["forget"]["all"]["probability"], rel=1e-5)
    assert found["final"]["joint"]["forget_quality"]["value"] <= 1
    assert found["robustness"]["relearned"]["after"] != found["robustness"]["relearned"]["before"]


def test_rmu_trains_its_layer_and_those_below(plan: Plan, tmp_path: Path) -> None:
    given = {"method": "rmu", "parameters": {"layer": 0, "steering": 5.0}, "retain_weight": 10.0}
    found = results(plan, tmp_path / "out", **given)
    assert found["checks"][-1]["sets"] != found["checks"][0]["sets"]


# ---- processes ---------------------------------------------------------------------------------


def _work(number: int) -> dict[str, Any]:
    if number == 1:
        os._exit(9)
    return {"number": number, "process": os.getpid()}


@pytest.mark.prove
def test_a_process_that_ends_is_its_own_cell_s_error() -> None:
    found = dict(in_processes(_work, range(5), 2))
    assert "process of this cell ended" in found.pop(1)["error"]
    assert [found[n]["number"] for n in (0, 2, 3, 4)] == [0, 2, 3, 4]
    assert os.getpid() not in {each["process"] for each in found.values()}


def _sleep(path: str) -> dict[str, Any]:
    Path(path).write_text(str(os.getpid()))
    time.sleep(300)
    return {}


def _run_two(paths: list[str]) -> None:
    list(in_processes(_sleep, paths, 2))


@pytest.mark.prove
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    starting = multiprocessing.get_context("spawn").Process(target=_run_two, args=(paths,))
    starting.start()
    _wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
    starting.kill()
    starting.join()
    _wait_until(lambda: not any(_is_running(int(path.read_text())) for path in paths))


def _is_running(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.prove
def test_several_processes_do_what_one_does(plan: Plan, tmp_path: Path) -> None:
    from unilogit_kernels.unlearning.comparison import compare
    from unilogit_kernels.unlearning.comparison.folder import read_cell

    plan = dataclasses.replace(
        plan, methods=plan.methods[:1], forget_weights=(1.0,), choose=ChoosePlan()
    )
    folders = [tmp_path / "one", tmp_path / "two"]
    for processes, folder in enumerate(folders, 1):
        assert not compare(plan, folder, processes=processes, note=lambda message: None).failed
    for cell in plan.cells():
        one, two = (read_cell(folder, cell) for folder in folders)
        assert one is not None
        assert two is not None
        assert [c["step"] for c in one["checks"]] == [c["step"] for c in two["checks"]]
        assert one["matched"] == two["matched"]
