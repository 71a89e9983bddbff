"""Whatever the inputs are, a command ends well or says in one line what is wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.cli.mutations import Case, make_case
from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    TEMPLATE,
    make_model,
    make_tokenizer,
    one_thread,
    write_rows,
)
from unilogit_kernels.cli import progress
from unilogit_kernels.cli.app import app

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

CASES, PROVED, AT_ONCE = 500, 200, 20
"""Of the cases, how many `make prove` takes; `pytest -m ""` takes all."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs as they should be, and an unfinished run of them."""
    folder = tmp_path_factory.mktemp("base")
    make_model(num_hidden_layers=1, hidden_size=16).save_pretrained(folder / "model")
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(folder / "model")
    write_rows(folder / "forget.jsonl", FORGET)
    write_rows(folder / "retain.jsonl", RETAIN)
    (folder / "refusals.txt").write_text("I do not know.\nNo idea.\n")
    return folder


def invoke(case: Case, monkeypatch: pytest.MonkeyPatch) -> Result:
    with monkeypatch.context() as patch:
        patch.chdir(case.folder)
        patch.setenv("COLUMNS", "400")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return CliRunner().invoke(app, case.line)


@pytest.fixture(scope="module")
def started(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a run that was interrupted after its second checkpoint."""
    seen: list[int] = []

    def interrupted(
        self: object, args: object, state: object, *rest: object, **more: object
    ) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Bar, "on_step_end", interrupted)
        folder = tmp_path_factory.mktemp("started") / "inputs"
        case = make_case(base, folder, 0)
        shutil.rmtree(folder)
        shutil.copytree(base, folder)
        case.options.update({"--output": "started", "--checkpoint-steps": "1", "--epochs": "3"})
        assert invoke(case, patch).exit_code == 130
    return folder


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_size for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(
            first,
            marks=[pytest.mark.prove][: first > 0] + [pytest.mark.every][: first >= PROVED],
        )
        for first in range(0, CASES, AT_ONCE)
    ],
)
def test_broken_inputs(
    started: Path, tmp_path: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(first, first + AT_ONCE):
        case = make_case(started, tmp_path / "case", number)
        before = files_of(case.folder)
        result = invoke(case, monkeypatch)
        told = f"case {number}, {case.broken}: {case.line}\n{result.output}"
        assert result.exit_code in (0, 2), told
        assert "Traceback" not in result.output, told
        if result.exit_code == 2:
            assert files_of(case.folder) == before, told
            assert any(about in result.stderr for about in case.about), told
            errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 or "Usage: " in result.stderr, told
        shutil.rmtree(case.folder)
