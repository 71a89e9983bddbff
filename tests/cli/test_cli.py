"""The commands from the outside: what they print, write and exit with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerState
from typer.testing import CliRunner, Result

from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    make_tokenizer,
    one_thread,
    save_model,
    write_rows,
)
from unilogit_kernels import available_backends
from unilogit_kernels.cli import progress, training
from unilogit_kernels.cli.app import app
from unilogit_kernels.unlearning.run import Settings

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder that holds a model and two data files."""
    save_model(tmp_path / "model")
    write_rows(tmp_path / "forget.jsonl", FORGET)
    write_rows(tmp_path / "retain.jsonl", RETAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(line: str) -> Result:
        return CliRunner().invoke(app, line.split())

    return invoke


UNLEARN = (
    "unlearn --model model --forget forget.jsonl --retain retain.jsonl --output out --stop-at none"
)


def test_unlearn_then_evaluate(run: Run) -> None:
    result = run(f"{UNLEARN} --epochs 40 --lr 3e-3 --forget-weight 1 --batch-size 3")
    assert result.exit_code == 0, result.output
    assert "3 rows to forget, 5 to keep; each prompt goes as it is" in result.output
    assert "40 steps; the model is in out" in result.output
    assert Path("out/model.safetensors").exists()
    assert Path("out/tokenizer.json").exists()
    before, after = evaluate(run, "model"), evaluate(run, "out")
    # Where Unilogit wants it: at 1/V.
    assert after["forget"] < 2 / 259
    assert after["retain"] > 10 * max(before["retain"], after["forget"])


def evaluate(run: Run, model: str) -> dict[str, float]:
    line = f"evaluate --model {model} --data forget=forget.jsonl --data retain=retain.jsonl"
    result = run(f"{line} --json figures.json")
    assert result.exit_code == 0, result.output
    figures = json.loads(Path("figures.json").read_text())
    assert figures["model"] == model
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        found = figures["sets"][name]
        assert found["rows"] == len(found["answers"]) == len(rows)
        assert f"{found['probability']:.3f}" in result.output
    return {name: found["probability"] for name, found in figures["sets"].items()}


def test_interrupt_and_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, *args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.Bar, "on_step_end", interrupted)
        result = run(f"{UNLEARN} --checkpoint-steps 1")
    assert result.exit_code == 130
    assert "--resume goes on" in result.output
    assert run(f"{UNLEARN} --checkpoint-steps 1").exit_code == 2
    assert run(f"{UNLEARN} --checkpoint-steps 1 --resume").exit_code == 0
    AutoModelForCausalLM.from_pretrained("out")


def test_a_primal_dual_run_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it was started with, to the weights of one that was not interrupted."""

    def interrupted(
        self: object, args: object, state: TrainerState, *rest: object, **more: object
    ) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    line = f"{UNLEARN} --method pdu --batch-size 2 --lr 1e-3 --checkpoint-steps 1 --epochs 3"
    line += " --label-smoothing 0.1 --z-loss 1e-3 --dual-step-size 0.2 --retain-loss-target 1"
    whole = run(line.replace("--output out", "--output whole"))
    assert whole.exit_code == 0, whole.output
    with monkeypatch.context() as patch:
        patch.setattr(progress.Bar, "on_step_end", interrupted)
        assert run(line).exit_code == 130
    settings = json.loads(Path("out/unlearning.json").read_text())["settings"]
    assert (settings["label_smoothing"], settings["z_loss"]) == (0.1, 1e-3)
    assert (settings["dual_step_size"], settings["retain_loss_target"]) == (0.2, 1.0)
    other = run(f"{line} --resume --dual-update epoch")
    assert "started with other settings: dual_update (step -> epoch)" in other.stderr
    result = run(f"{line} --resume")
    assert result.exit_code == 0, result.output
    assert "resuming from out/checkpoints/checkpoint-2" in result.output
    assert Path("out/model.safetensors").read_bytes() == (
        Path("whole/model.safetensors").read_bytes()
    )


def test_a_method_s_parameters_by_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(training, "train", lambda settings, resume: seen.append(settings))
    line = f"{UNLEARN} --method cross_entropy --method-parameter entropy=-0.5"
    assert run(f"{line} --method-parameter z_loss=1e-3").exit_code == 0
    assert run(f"{UNLEARN} --method npo --beta 0.5").exit_code == 0
    assert seen[0].method_parameters == {"entropy": -0.5, "z_loss": 1e-3}
    assert seen[1].method_parameters == {"beta": 0.5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (UNLEARN.replace("forget.jsonl", "none.jsonl"), "none.jsonl: no such file"),
        (UNLEARN.replace("retain.jsonl", "bad.jsonl"), 'bad.jsonl, line 2: field "completion"'),
        (UNLEARN.replace("forget.jsonl", "empty.jsonl"), "empty.jsonl: holds no rows"),
        (UNLEARN.replace("--model model", "--model nowhere"), "could be loaded from 'nowhere'"),
        (UNLEARN.replace("--model model", "--model ./model/no"), "'./model/no': there is no such"),
        ("evaluate --model /no --data a=forget.jsonl", "model '/no': there is no such folder"),
        (f"{UNLEARN} --max-length 2", "none carries loss within the 2 of max_length"),
        (f"{UNLEARN} --method anger", "method must be one of"),
        (f"{UNLEARN} --method npo --gamma 1", "method 'npo' has no parameter 'gamma'; it has beta"),
        (f"{UNLEARN} --method idk_dpo", "method 'idk_dpo' needs refusals"),
        (f"{UNLEARN} --refusals empty.jsonl", "method 'unilogit' takes no refusals"),
        (f"{UNLEARN} --method flat --refusals empty.jsonl", "empty.jsonl: holds no refusals"),
        (f"{UNLEARN} --train-layers 9", "cannot train the top 9"),
        (f"{UNLEARN} --batch-size many", "--batch-size"),
        (f"{UNLEARN} --template-arg thinking", "a template argument is NAME=VALUE"),
        (f"{UNLEARN} --template-arg a=1", "no prompt goes through a template"),
        ("evaluate --model model --data a=forget.jsonl --stop=", "--stop takes a text"),
        ("evaluate --model model --data a=forget.jsonl --max-new-tokens 0", "--max-new-tokens"),
        ("evaluate --model model --data forget.jsonl", "--data takes NAME=FILE"),
        ("evaluate --model model --data a=none.jsonl", "none.jsonl: no such file"),
        ("evaluate --model model --data a=forget.jsonl --data a=forget.jsonl", "'a' twice"),
        ("evaluate --model nowhere --data a=forget.jsonl", "could be loaded from 'nowhere'"),
        ("evaluate --model model --data a=forget.jsonl --dtype int4", "dtype must be one of"),
    ],
)
def test_wrong_input_is_told_before_anything_starts(run: Run, line: str, message: str) -> None:
    Path("bad.jsonl").write_text('{"text": "good"}\n{"prompt": "no completion"}\n')
    Path("empty.jsonl").write_text("")
    result = run(line)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not Path("out").exists()


def test_rows_that_are_cut_are_told(run: Run) -> None:
    result = run(f"{UNLEARN} --max-length 10 --epochs 1")
    assert result.exit_code == 0, result.output
    assert "note: 1 retain rows are cut to 10 tokens" in result.output
    assert "forget rows are cut" not in result.output


def test_the_template_is_given_arguments_and_answers_are_ended(run: Run) -> None:
    template = "{% for message in messages if plain %}{{ message.content }}{% endfor %}"
    make_tokenizer(chat_template=template).save_pretrained("model")
    line = "evaluate --model model --data a=forget.jsonl --json figures.json"
    assert "the chat template does not write the answers" in run(line).output
    untrained = run(f"{line} --template-arg plain=true --max-new-tokens 3")
    assert untrained.exit_code == 0, untrained.output
    assert "note: 3 of 3 answers to a did not end in time" in untrained.output
    said = json.loads(Path("figures.json").read_text())["sets"]["a"]["answers"][0]["generated"]
    ended = run(f"{line} --template-arg plain=true --max-new-tokens 3 --stop {said[0]}")
    assert "note: 3 of 3" not in ended.output
    assert json.loads(Path("figures.json").read_text())["sets"]["a"]["unfinished"] < 3


def test_doctor(run: Run) -> None:
    found = json.loads(run("doctor --json").output)
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"] == dict(available_backends())
    assert found["devices"][0]["device"] == "cpu"
    shown = run("doctor").output
    for name, reason in available_backends().items():
        assert name in shown
        assert reason is None or reason in shown
    assert "fused losses of Hugging Face models" in shown


def test_doctor_needs_nothing_but_torch() -> None:
    """It says what each missing package is for, so it runs without all of them."""
    extras = ("typer", "rich", "click", "transformers", "accelerate", "regex", "safetensors")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"
        "sys.argv[1:] = ['doctor']\n"
        "from unilogit_kernels.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "unlearn" in done.stdout


@pytest.mark.parametrize("missing", ["typer", "transformers", "yaml"])
def test_a_missing_extra_is_named(missing: str) -> None:
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "sys.argv[1:] = ['evaluate', '--help']\n"
        "from unilogit_kernels.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert f"{missing!r} is missing; run: pip install 'unilogit-kernels[unlearn]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_missing_module_is_not_hidden() -> None:
    script = (
        "import sys; sys.modules['unilogit_kernels.unlearning.settings'] = None\n"
        "sys.argv[1:] = ['unlearn', '--help']\n"
        "from unilogit_kernels.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("command", ["doctor", "evaluate"])
def test_a_package_that_is_too_old_is_named(command: str) -> None:
    """And the doctor speaks all the same."""
    script = (
        "import importlib.metadata as metadata, sys\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '4.45.1' if name == 'transformers' else real(name)\n"
        f"sys.argv[1:] = [{command!r}]\n"
        "from unilogit_kernels.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert "Traceback" not in done.stderr
    if command == "doctor":
        assert done.returncode == 0, done.stderr
        assert "4.45.1" in done.stdout
    else:
        assert done.returncode == 2
        assert "needs transformers >= 4.57, but 4.45.1 is installed" in done.stderr
