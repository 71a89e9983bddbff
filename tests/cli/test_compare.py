"""`unilogit compare` and `report`: from a plan to a page, also in two goes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.support.tiny_models import one_thread
from tests.unlearning.tiny_comparison import plan_content, quick_collection, write_inputs
from unilogit_kernels.cli.app import app
from unilogit_kernels.unlearning.comparison import cell, run, training
from unilogit_kernels.unlearning.comparison.cost import Peak
from unilogit_kernels.unlearning.comparison.report import page as page_module

pytestmark = pytest.mark.usefixtures(one_thread.__name__, quick_collection.__name__)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model, rows and a plan; what is measured of time and memory is always the same."""

    @contextmanager
    def same_peak() -> Iterator[Peak]:
        yield Peak(2**30)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(training, "seconds", lambda: 0.0)
    monkeypatch.setattr(cell, "peak_of", same_peak)
    Path("plan.yaml").write_text(yaml.safe_dump(plan_content(write_inputs(tmp_path))))
    return tmp_path


def command(line: str) -> Result:
    return CliRunner().invoke(app, line.split())


def written(folder: str) -> dict[str, int]:
    """When each cell was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(folder, "cells").glob("*.json")}


def test_what_is_finished_is_not_repeated_and_the_report_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command("compare plan.yaml --output whole")
    assert whole.exit_code == 0, whole.output
    assert "6 of 6: npo-lr0.003-w1-seed1" in whole.output

    calls = 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return cell.run_cell(*given)

    with monkeypatch.context() as patched:
        patched.setattr(run, "run_cell", interrupted)
        stopped = command("compare plan.yaml --output halves")
    assert stopped.exit_code == 130
    assert "goes on with the next cell" in stopped.output
    before = written("halves")
    assert len(before) == 2
    half = command("report halves")
    assert half.exit_code == 0, half.output
    assert "4 to be run" in Path("halves/report.html").read_text()

    rest = command("compare plan.yaml --output halves")
    assert rest.exit_code == 0, rest.output
    assert "2 of 6 cells are finished already" in rest.output
    after = written("halves")
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    page = Path("whole/report.html").read_bytes()
    assert Path("halves/report.html").read_bytes() == page


def test_a_cell_that_fails_is_a_row_with_its_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(settings: Any, *rest: Any) -> Any:
        if settings["method"] == "npo":
            raise ValueError("no luck <today>")
        return cell.run_cell(settings, *rest)

    plan = plan_content(write_inputs(folder), seeds=[0], forget_weights=[1.0])
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.setattr(run, "run_cell", failing)
    done = command("compare plan.yaml --output out")
    assert done.exit_code == 0, done.output
    assert "npo-lr0.003-w1-seed0 failed: ValueError: no luck <today>" in " ".join(
        done.output.split()
    )
    page = Path("out/report.html").read_text()
    assert "no luck &lt;today&gt;" in page
    assert "1 finished, 1 failed" in page
    monkeypatch.setattr(run, "run_cell", cell.run_cell)
    monkeypatch.setattr(page_module, "write_report", lambda folder: Path("drawn"))
    again = command("compare plan.yaml --output out")
    assert "2 of 2 cells are finished already" in again.output
    assert "error" in json.loads(Path("out/cells/npo-lr0.003-w1-seed0.json").read_text())
    retried = command("compare plan.yaml --output out --retry")
    assert retried.exit_code == 0, retried.output
    assert "error" not in json.loads(Path("out/cells/npo-lr0.003-w1-seed0.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": []}, "methods must hold at least one"),
        ({"methods": ["anger"]}, "method must be one of"),
        ({"methods": ["task_vector"]}, "no step of matched forgetting"),
        ({"methods": ["dpo"]}, "needs refusals"),
        ({"methods": ["npo", "npo"]}, "two are called 'npo'"),
        ({"learning_rates": [0.0]}, "learning_rates must be positive, got 0.0"),
        ({"seeds": "none"}, "seeds must be a list, got str 'none'"),
        ({"steps": 3}, "the plan has no 'steps'"),
        ({"data": {}}, "exactly one of made_up, benchmark and files, got none"),
        ({"data": {"files": {"forget": "forget.jsonl"}}}, "must name a file of the set 'retain'"),
        ({"data": {"made_up": {"sellers": 3}}}, "data.made_up: "),
        ({"model": {}}, "model.base is what"),
        ({"model": {"base": "base", "cached": True}}, "model.cached needs train_layers"),
        ({"model": {"base": "nowhere"}}, "loaded from 'nowhere'"),
        ({"checks": {"every": 0}}, "checks.every must be at least 1, got 0"),
        ({"choose": {"by": ["retain.rouge"]}}, "choose.by must name sets"),
        ({"choose": {"by": ["friends.exact"]}}, "choose.by: there is no set 'friends'"),
        ({"robustness": {"bits": 1}}, "robustness.bits must be 0 or at least 2, got 1"),
    ],
)
def test_wrong_plans(folder: Path, change: dict[str, Any], message: str) -> None:
    plan = plan_content({"forget": "forget.jsonl", "retain": "retain.jsonl"}, **change)
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    done = command("compare plan.yaml --output out")
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert not Path("out/cells").exists()


def test_other_inputs_that_are_no_use(folder: Path) -> None:
    for line, message in (
        ("compare nothing.yaml --output out", "the plan nothing.yaml"),
        ("compare plan.yaml --output out --processes 0", "processes must be at least 1"),
        ("compare plan.yaml --output plan.yaml", "is not a directory"),
        ("report base", "base: holds no comparison"),
    ):
        done = command(line)
        assert done.exit_code == 2, done.output
        assert message in " ".join(done.output.split())
