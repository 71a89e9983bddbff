"""What a run refuses before it writes anything, and what it records to go on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import chat_template_utils

from tests.cli.test_cli import UNLEARN, Run, run
from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    encoded,
    make_model,
    make_tokenizer,
    one_thread,
    save_model,
)
from tests.unlearning.test_trainer import InterruptAt, settings
from tests.unlearning.tiny_trainer import arguments
from unilogit_kernels.cli import progress, training
from unilogit_kernels.unlearning import run as run_module
from unilogit_kernels.unlearning.record import newest_checkpoint
from unilogit_kernels.unlearning.run import (
    RunError,
    Settings,
    execute,
    prepare,
)
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

__all__ = ["run", "settings"]
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

EVALUATE = "evaluate --model model --data a=forget.jsonl"


def refused(result: Any, message: str, code: int = 2) -> None:
    """One line, and nothing written."""
    assert result.exit_code == code, result.output
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert message in error
    assert "Traceback" not in result.output
    assert not Path("out").exists()


# ---- adapters ----------------------------------------------------------------------------------


def with_adapter() -> Any:
    return peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("more", ["", " --train-layers 1"])
def test_an_adapter_is_no_model_to_unlearn(run: Run, more: str) -> None:
    with_adapter().save_pretrained("adapter")
    make_tokenizer().save_pretrained("adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "model"
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    refused(run(UNLEARN.replace("--model model", "--model adapter") + more), "merge_and_unload()")


def test_nothing_is_trained_that_saving_would_lose(tmp_path: Path) -> None:
    def make(model: Any) -> UnlearningTrainer:
        forget, retain = encoded(FORGET), encoded(RETAIN)
        return UnlearningTrainer(model, arguments(tmp_path), forget=forget, retain=retain)

    make(with_adapter())
    for model in (with_adapter(), make_model()):
        if not isinstance(model, peft.PeftModel):
            model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        next(p for n, p in model.named_parameters() if "layers.1.mlp.up_proj" in n).requires_grad_(
            True
        )
        with pytest.raises(ValueError, match=r"keeps them alone.*layers\.1\.mlp\.up_proj"):
            make(model)


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--forget-weight nan", "forget_weight must be a finite number, got nan"),
        ("--retain-weight -1", "retain_weight must be at least 0, got -1.0"),
        ("--method npo --beta nan", "beta of method 'npo' must be a finite number, got nan"),
        ("--method npo --beta -1", "beta of method 'npo' must be at least 1e-06"),
        ("--method simnpo --beta 0", "beta of method 'simnpo' must be at least 1e-06"),
        ("--method simnpo --delta inf", "delta of method 'simnpo' must be a finite number"),
        ("--method wga --alpha -1", "alpha of method 'wga' must be at least 0"),
        ("--max-length -1", "max_length must be at least 1, got -1"),
        ("--lr nan", "learning_rate must be a finite number, got nan"),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--seed 4294967296", "seed must be at most 4294967295"),
        ("--warmup-steps -1", "warmup_steps must be at least 0"),
        ("--stop-at probability=nan", "stop_at probability must be between 0 and 1"),
        ("--label-smoothing 1.5", "label_smoothing must be at most 1, got 1.5"),
        ("--z-loss -1", "z_loss must be at least 0, got -1.0"),
        ("--z-loss 0.1 --retain-loss kl", "z_loss would have no effect with retain_loss 'kl'"),
        ("--label-smoothing 0.1 --retain-loss kl", "error: label_smoothing would have no effect"),
        ("--dual-step-size nan", "dual_step_size must be a finite number"),
        ("--dual-update epoch", "dual_update would have no effect without dual_step_size"),
        ("--dual-step-size 1 --dual-update all", "dual_update must be one of step, epoch"),
        ("--dual-step-size 1 --dual-warmup-epochs 20", "dual_step_size would have no effect"),
        ("--method-parameter alpha", "--method-parameter takes NAME=NUMBER, got 'alpha'"),
        ("--method-parameter alpha=x", "--method-parameter takes NAME=NUMBER, got 'alpha=x'"),
        ("--method npo --beta 1 --method-parameter beta=2", "beta is given twice"),
        ("--method-parameter beta=2", "method 'unilogit' has no parameter 'beta'"),
        ("--method entropy --method-parameter weight=nan", "weight of method 'entropy' must be a"),
        (
            "--method cross_entropy --method-parameter label_smoothing=-1",
            "label_smoothing of method 'cross_entropy' must be at least 0",
        ),
    ],
)
def test_numbers_out_of_range(run: Run, options: str, message: str) -> None:
    refused(run(f"{UNLEARN} {options}"), message)


@pytest.mark.parametrize(
    "options",
    [
        {"forget_weight": float("nan")},
        {"retain_weight": -1.0},
        {"learning_rate": float("inf")},
        {"check_steps": 0},
        {"method": "npo", "method_parameters": {"beta": 0.0}},
    ],
)
def test_the_trainer_has_the_same_ranges(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be (a finite number|at least)"):
        arguments(tmp_path, **options)


def test_autocast_and_recomputation_on_a_cpu(run: Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        result = run(f"{UNLEARN} --epochs 1 --autocast --gradient-checkpointing")
    assert result.exit_code == 0, result.output


def test_a_run_ends_at_the_first_loss_that_is_not_finite(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(self: Any, args: Any, state: Any, control: Any, model: Any, **rest: Any) -> None:
        if state.global_step == 2:
            next(model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(progress.Bar, "on_step_begin", poison)
    result = run(f"{UNLEARN} --checkpoint-steps 1")
    assert result.exit_code == 1
    assert "at step 3, so the run ends, and out/checkpoints/checkpoint-2 is kept" in result.stderr
    assert not Path("out/config.json").exists()
    kept = load_file("out/checkpoints/checkpoint-2/model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in kept.values())


# ---- one line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [UNLEARN, EVALUATE])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no users') }}",
            "forget.jsonl, line 1: the tokenizer's chat template fails",
        ),
        ("{% for", "forget.jsonl, line 1: the tokenizer's chat template fails"),
        ({"tool_use": "x"}, "has no chat template to use"),
        (None, "has no chat template: leave out --chat-template"),
    ],
)
def test_templates_that_fail(run: Run, command: str, template: Any, message: str) -> None:
    make_tokenizer(chat_template=template).save_pretrained("model")
    refused(run(f"{command} --chat-template"), message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{EVALUATE} --batch-size 0", "batch_size must be at least 1, got 0"),
        (f"{EVALUATE} --max-length -1", "max_length must be at least 1, got -1"),
        (f"{EVALUATE} --json forget.jsonl/x.json", "forget.jsonl is a file"),
        (f"{EVALUATE} --json model", "--json model: is a directory"),
        (UNLEARN.replace("output out", "output forget.jsonl/x"), "forget.jsonl is a file"),
        (UNLEARN.replace("output out", f"output {'n' * 300}"), "name too long"),
        (UNLEARN.replace("forget forget.jsonl", f"forget {'n' * 300}"), "name too long"),
        (UNLEARN.replace("forget.jsonl", "half.jsonl"), 'half.jsonl, line 1: field "text" holds'),
        (UNLEARN.replace("forget.jsonl", "deep.jsonl"), "deep.jsonl: not JSON"),
        (UNLEARN.replace("--model model", "--model cut"), "loaded from 'cut': "),
        (UNLEARN.replace("--model model", "--model small"), "has embeddings for 100 tokens"),
        (UNLEARN.replace("--model model", "--model short"), "pass --max-length 5"),
        (UNLEARN.replace("--model model", "--model nan"), "'nan' are NaN or infinite: lm_head"),
    ],
)
def test_inputs_that_are_no_use(run: Run, line: str, message: str) -> None:
    Path("half.jsonl").write_text('{"text": "a \\ud800"}\n')
    Path("deep.jsonl").write_text("[" * 100_000)
    for name, options in (
        ("small", {"vocab_size": 100}),
        ("short", {"max_position_embeddings": 5}),
    ):
        if name in line:
            save_model(Path(name), **options)
    for name in ("cut", "nan"):
        shutil.copytree("model", name)
    file = Path("cut/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    weights = load_file("nan/model.safetensors")
    weights["lm_head.weight"][3, 3] = float("nan")
    save_file(weights, "nan/model.safetensors", {"format": "pt"})
    refused(run(line), message)


def test_json_goes_where_it_is_told(run: Run) -> None:
    result = run(f"{EVALUATE} --json new_dir/x.json")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("new_dir/x.json").read_text())["model"] == "model"


def test_a_fault_of_the_package_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of the\npackage")

    monkeypatch.setattr(training, "prepare", broken)
    message = "ZeroDivisionError: of the package (this should not happen; UNILOGIT_DEBUG=1"
    refused(run(UNLEARN), message, code=1)
    monkeypatch.setenv("UNILOGIT_DEBUG", "1")
    assert "Traceback" in run(UNLEARN).stderr


# ---- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [UNLEARN, EVALUATE])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 3},
            "missing weights of 'model', which are random then: model.layers.2",
        ),
        ({"num_hidden_layers": 1}, "unexpected weights of 'model'"),
        ({"intermediate_size": 32}, "mlp.down_proj.weight [32, 64] instead of [32, 32]"),
    ],
)
def test_weights_that_are_not_the_model_s(
    run: Run, line: str, change: dict[str, int], message: str
) -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, **change}))
    refused(run(line), message)
    if "intermediate_size" not in change:
        result = run(f"{line} --allow-missing-weights")
        assert result.exit_code == 0, result.output
        assert f"note: {message}" in result.stderr


def test_a_tied_head_is_not_missing(run: Run) -> None:
    save_model(Path("model"), tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file("model/model.safetensors")
    assert run(EVALUATE).exit_code == 0


# ---- going on ----------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def other_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][5] += 1e-6
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: edit(s.forget, lambda text: text.replace(" ada", " adb")), "forget rows"),
        (lambda s: edit(s.retain, lambda text: text[: text.rindex("{")]), "retain rows"),
        (lambda s: other_weight(Path(s.model)), "weights"),
        (lambda s: make_tokenizer(chat_template="x").save_pretrained(s.model), "chat template"),
        (
            lambda s: edit(
                Path(s.model) / "config.json",
                lambda text: text.replace('"attention_dropout": 0.1', '"attention_dropout": 0.2'),
            ),
            "configuration",
        ),
    ],
)
def test_a_run_goes_on_with_what_it_began_with(
    settings: Settings, change: Callable[[Settings], None], name: str
) -> None:
    settings = dataclasses.replace(settings, chat_template=False)
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(settings), [InterruptAt(3)])
    change(settings)
    with pytest.raises(RunError, match=f"was started with other inputs: {name} \\("):
        prepare(settings, resume=True)


def test_a_run_keeps_its_date_over_midnight(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template prints the date; a run resumed a day later ends bit for bit the same."""
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    make_tokenizer(chat_template=template).save_pretrained(settings.model)

    def on(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Clock:
                return cls(2026, 11, day, 23, 59)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(run_module, "datetime", Clock, raising=False)

    on(1)
    execute(prepare(settings))
    again = dataclasses.replace(settings, output=settings.output.with_name("again"))
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(again), [InterruptAt(5)])
    on(2)
    execute(prepare(again, resume=True))
    expected = AutoModelForCausalLM.from_pretrained(settings.output).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(again.output).state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_checkpoint_that_cannot_be_read_is_named(settings: Settings) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(settings), [InterruptAt(5)])
    newest = newest_checkpoint(settings.output)
    assert newest is not None
    (newest / "optimizer.pt").write_bytes(b"no optimizer")
    with pytest.raises(RunError, match="checkpoint-4 cannot be resumed from; delete it"):
        execute(prepare(settings, resume=True))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (newest / name).rename(newest / "away")
        assert newest_checkpoint(settings.output) == newest.with_name("checkpoint-2")
        (newest / "away").rename(newest / name)
    assert newest_checkpoint(settings.output) == newest
    (newest / "trainer_state.json").write_text('{"global_step": ')
    assert newest_checkpoint(settings.output) == newest.with_name("checkpoint-2")
