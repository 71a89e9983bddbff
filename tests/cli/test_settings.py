"""One definition of a setting: the shell, a file and Python say the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from tests.cli.test_cli import UNLEARN, Run, run
from tests.support.tiny_models import one_thread
from unilogit_kernels.cli import training
from unilogit_kernels.cli.app import COMMANDS, app, load
from unilogit_kernels.unlearning.arguments import UnlearningArguments
from unilogit_kernels.unlearning.config import FILE, as_yaml, make_settings
from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.settings import (
    METHOD_OPTIONS,
    TASKS,
    ForgettingSettings,
    HeadSettings,
    Settings,
    option_of,
    settings_of,
)
from unilogit_kernels.unlearning.translation import training_arguments

__all__ = ["run"]
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

COMMAND = "unlearn --model m --output o --forget f --retain r"


def options_of(command: str) -> dict[str, set[str]]:
    """The parameters of a command by name, with their options."""
    alone = typer.Typer(add_completion=False)
    alone.command(**COMMANDS[command].settings)(load(command))
    found: Any = typer.main.get_command(alone)
    return {each.name: {*each.opts, *each.secondary_opts} for each in found.params}


@pytest.mark.parametrize("task", TASKS)
def test_every_setting_is_an_option_and_nothing_else_is(task: str) -> None:
    found = options_of(task)
    own = {"config", "print_config", "resume"}
    if task == "unlearn":
        own |= METHOD_OPTIONS.keys()
    known = {each.name: each for each in settings_of(task)}
    assert found.keys() == known.keys() | own
    for name in known.keys() - {"args", "method_parameters"}:
        assert option_of(known[name]) in found[name]


def test_no_setting_is_forgotten() -> None:
    """Each belongs to a command, says what it is, and no two classes define one twice."""
    of_commands = {each.name for task in TASKS for each in settings_of(task)}
    every = dataclasses.fields(Settings)
    assert {each.name for each in every} - of_commands == {"task"}
    assert all(each.metadata["help"].endswith(".") for each in every)
    for shared in (ForgettingSettings, HeadSettings):
        for each in dataclasses.fields(shared):
            for other in (Settings, UnlearningArguments):
                assert other.__dataclass_fields__[each.name] is each


def test_a_fine_tuning_has_defaults_of_its_own() -> None:
    alone = typer.Typer(add_completion=False)
    alone.command(**COMMANDS["finetune"].settings)(load("finetune"))
    command: Any = typer.main.get_command(alone)
    shown = {each.name: each.default for each in command.params}
    made = make_settings("finetune", {"model": "m", "output": "o"}, None)
    assert made == Settings.finetuning(model="m", output=Path("o"))
    for known in settings_of("finetune"):
        assert shown[known.name] in (None, getattr(made, known.name)), known.name


def test_help_waits_for_no_torch() -> None:
    script = (
        "import sys; sys.argv[1:] = ['unlearn', '--help']\n"
        "from unilogit_kernels.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert "--args.NAME" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def printed(line: str) -> dict[str, Any]:
    """What `--print-config` shows."""
    result = CliRunner().invoke(app, [*line.split(), "--print-config"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = yaml.safe_load(result.stdout)
    return found


def test_the_command_line_goes_before_the_file_before_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\noutput: o\nforget: f\nretain: r\nmethod: wga\nlearning_rate: 1e-4\n"
        "epochs: 7\nautocast: true\nmethod_parameters: {alpha: 2}\n"
        "args: {report_to: [none], warmup_steps: 3, max_grad_norm: 2}\n"
    )
    given = f"--config {file} --lr 2e-5 --no-autocast --args.seed 4 --args.max_grad_norm=0.5"
    found = printed(f"unlearn {given} --args.save_only_model --retain other")
    assert found["learning_rate"] == 2e-5
    assert (found["epochs"], found["autocast"], found["retain"]) == (7, False, "other")
    assert found["method_parameters"] == {"alpha": 2.0}
    assert (found["warmup_steps"], found["seed"]) == (3, 4)
    handed_on = {"report_to": ["none"], "max_grad_norm": 0.5, "save_only_model": True}
    assert found["args"] == handed_on
    defaults = Settings(model="m", output=Path("o"))
    assert found["batch_size"] == defaults.batch_size
    changed = printed(f"unlearn --config {file} --alpha 3")
    assert changed["method_parameters"] == {"alpha": 3.0}


@pytest.mark.parametrize("task", TASKS)
def test_what_is_written_is_read_again(tmp_path: Path, task: str) -> None:
    """Every setting, with another value than its default."""
    changed: dict[str, Any] = {}
    for known in settings_of(task):
        default = getattr(Settings(model="", output=Path()), known.name)
        sort = str(known.type)
        changed[known.name] = (
            (Path("a"), Path("b"))
            if sort.startswith("tuple")
            else {"max_grad_norm": 0.5, "report_to": ["none"]}
            if known.name == "args"
            else {"a": 1.5}
            if sort.startswith("dict")
            else not default
            if sort.startswith("bool")
            else Path("x: é")
            if sort.startswith("Path")
            else 3
            if sort.startswith("int")
            else 1e-7
            if sort.startswith("float")
            else "1e-5"
        )
    make = Settings if task == "unlearn" else Settings.finetuning
    settings = make(**changed)
    (tmp_path / "a.yaml").write_text(as_yaml(settings), encoding="utf-8")
    assert make_settings(task, {}, tmp_path / "a.yaml") == settings


def test_a_run_leaves_its_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(f"{UNLEARN} --epochs 1 --batch-size 3 --args.max_steps 1 --args.max_grad_norm 2")
    assert result.exit_code == 0, result.output
    assert "1 steps; the model is in out" in result.output
    seen: list[Settings] = []
    monkeypatch.setattr(training, "train", lambda settings, resume: seen.append(settings))
    assert run(f"unlearn --config out/{FILE} --output again").exit_code == 0
    assert run(f"{UNLEARN} --epochs 1 --batch-size 3 --args.max_steps 1").exit_code == 0
    assert seen[0].args == {"max_steps": 1, "max_grad_norm": 2.0}
    changes: dict[str, Any] = {
        "output": Path("again"),
        "args": {"max_steps": 1, "max_grad_norm": 2.0},
    }
    assert dataclasses.replace(seen[1], **changes) == seen[0]


def test_settings_reach_the_trainer(tmp_path: Path) -> None:
    """Those of the shared classes under their names, the others under Hugging Face's."""
    given: dict[str, Any] = {
        "z_loss": 0.2,
        "dual_step_size": 0.3,
        "retain_loss_target": 0.4,
        "dual_update": "epoch",
        "dual_warmup_epochs": 2,
        "skip_below": 0.1,
        "warmup_steps": 3,
    }
    settings = Settings(
        model="m",
        output=tmp_path,
        label_smoothing=0.1,
        epochs=9,
        learning_rate=0.5,
        batch_size=2,
        gradient_accumulation=3,
        checkpoint_steps=4,
        memory_budget_mib=5,
        gradient_checkpointing=True,
        args={"logging_steps": 7, "lr_scheduler_type": "linear"},
        **given,
    )
    found = training_arguments(settings, tmp_path)
    assert {name: getattr(found, name) for name in given} == given
    assert (found.label_smoothing_factor, found.num_train_epochs) == (0.1, 9)
    assert (found.learning_rate, found.per_device_train_batch_size) == (0.5, 2)
    assert (found.gradient_accumulation_steps, found.save_steps) == (3, 4)
    assert (found.memory_budget, found.logging_steps) == (5 << 20, 7)
    assert found.lr_scheduler_type == "linear"
    learned = Settings.finetuning(model="m", output=tmp_path, label_smoothing=0.1, z_loss=1e-3)
    of_learning = training_arguments(learned, tmp_path)
    assert of_learning.method_parameters == {"label_smoothing": 0.1, "z_loss": 1e-3}
    assert of_learning.label_smoothing_factor == of_learning.z_loss == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--args.report_too x", "has no field 'report_too'; the nearest is 'report_to'"),
        ("--args.max_steps many", "args.max_steps must be an integer, got 'many'"),
        ("--args.output_dir x", "args.output_dir has no place here: checkpoints lie in --output"),
        ("--args.forget_weight 1", "is no argument of the Trainer's: --forget-weight"),
        ("--args.learning_rate 1 --lr 1", "args.learning_rate is learning_rate, which is given"),
        ("--args.bf16 maybe", "args.bf16 must be true or false, got 'maybe'"),
        ("--args.max_steps 1 --args.max_steps 2", "max_steps is given twice"),
        ("--bach-size 3", "No such option"),
        ("--config none.yaml", "--config none.yaml: "),
        ("--config list.yaml", "holds no settings by name"),
        ("--config typo.yaml", "there is no setting 'batch_sise'; the nearest is 'batch_size'"),
        ("--config short.yaml", "there is no setting 'lr'; --lr is learning_rate in a file"),
        ("--config type.yaml", "type.yaml: epochs must be an integer, got 1.5"),
        ("--config other.yaml", "there is no setting 'with_forget'"),
        ("--config hf.yaml", "hf.yaml: TrainingArguments has no field 'lerning_rate'"),
    ],
)
def test_what_no_setting_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    files = {
        "list": "[1]",
        "typo": "batch_sise: 1",
        "short": "lr: 1",
        "type": "epochs: 1.5",
        "other": "with_forget: true",
        "hf": "args: {lerning_rate: 1}",
    }
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)
    result: Result = CliRunner().invoke(app, f"{COMMAND} --print-config {more}".split())
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_what_must_be_said() -> None:
    with pytest.raises(RunError, match=r"--model is missing, and no --config names it: Directory"):
        make_settings("unlearn", {"output": "o"}, None)
