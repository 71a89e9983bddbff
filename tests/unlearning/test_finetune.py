"""Models that are taught rows: starting and golden models, and the way from them to unlearning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    encoded,
    make_model,
    make_tokenizer,
    one_thread,
    save_model,
    write_rows,
)
from tests.unlearning.benchmark_files import MUSE, TOFU, write_tables
from tests.unlearning.test_trainer import InterruptAt
from tests.unlearning.tiny_trainer import REFUSALS, arguments, logged
from unilogit_kernels.cli.app import app
from unilogit_kernels.testing import assert_tensors_within_budget
from unilogit_kernels.unlearning.benchmarks import Benchmark, load_benchmark
from unilogit_kernels.unlearning.checks import check_settings
from unilogit_kernels.unlearning.data import Encoding, collate
from unilogit_kernels.unlearning.evaluation import token_probabilities
from unilogit_kernels.unlearning.measuring.store import load_records
from unilogit_kernels.unlearning.rows import Row
from unilogit_kernels.unlearning.run import RunError, Settings, execute, prepare
from unilogit_kernels.unlearning.sources import read_sets
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

TEACH = "--epochs 60 --lr 3e-3 --batch-size 6 --warmup-steps 0"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, files of rows, and the fixtures of TOFU."""
    save_model(tmp_path / "model")
    write_rows(tmp_path / "a.jsonl", FORGET)
    write_rows(tmp_path / "b.jsonl", RETAIN)
    write_tables(tmp_path / "tofu", TOFU)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(line: str) -> Result:
    return CliRunner().invoke(app, line.split())


def done(line: str) -> Result:
    result = run(line)
    assert result.exit_code == 0, result.output
    return result


def known(model: str, rows: tuple[Row, ...]) -> float:
    """Mean probability of the rows' tokens, their end left out."""
    encoding = Encoding(make_tokenizer(), append_eos=False)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    features = [example.features() for example in encoding.encode(rows)]
    return float(token_probabilities(loaded, features, pad_id=0, batch_size=8).mean())


def test_from_golden_and_starting_model_to_the_unlearned_one(folder: Path) -> None:
    benchmark = load_benchmark("tofu:forget10", folder / "tofu")
    rows = "--benchmark tofu:forget10 --data-dir tofu"
    golden = done(f"finetune --model model {rows} --output golden {TEACH}")
    assert "3 rows to learn; each prompt goes as it is" in golden.output
    assert "60 steps; the model is in golden" in golden.output
    start = done(f"finetune --model model {rows} --with-forget --output start {TEACH}")
    assert "6 rows to learn" in start.output
    unlearned = done(
        f"unlearn --model start {rows} --output unlearned --epochs 30 --lr 1e-3 --batch-size 3"
        " --stop-at probability=0.3"
    )
    assert "3 rows to forget, 3 to keep" in unlearned.output
    forget, retain = benchmark.training["forget"], benchmark.training["retain"]
    assert known("start", forget) > 0.6
    for model in ("golden", "unlearned"):
        assert known(model, forget) < 0.3
    for model in ("start", "golden", "unlearned"):
        assert known(model, retain) > 0.6
    measured = done(f"evaluate --model unlearned {rows} --golden golden --output results")
    assert "not computed" not in measured.stderr
    found = json.loads(Path("results/TOFU_EVAL.json").read_text())
    assert set(found["forget_truth_ratio"]) == {"agg_value", "value_by_index"}
    assert set(found["forget_truth_ratio"]["value_by_index"]) == {"0", "1", "2"}
    assert 0 < found["forget_quality"]["agg_value"] <= 1
    summary = json.loads(Path("results/TOFU_SUMMARY.json").read_text())
    assert summary == {name: entry["agg_value"] for name, entry in found.items()}


def test_a_step_is_that_of_cross_entropy(tmp_path: Path) -> None:
    """Loss and gradients of a batch against the model's own."""
    rows = encoded([*FORGET, *RETAIN])
    options: dict[str, Any] = {"method": "cross_entropy", "forget_weight": 1.0}
    args = arguments(tmp_path, retain_loss="none", per_device_train_batch_size=len(rows), **options)
    model = make_model()
    trainer = UnlearningTrainer(model, args, forget=rows)
    batch: dict[str, Any] = dict(collate(rows, 0))
    found = trainer.compute_loss(model, batch)

    def gradients(of: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        names, weights = zip(*of.named_parameters(), strict=True)
        of_weights = torch.autograd.grad(loss, weights)
        return {"loss": loss.detach()} | dict(zip(names, of_weights, strict=True))

    def own(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        other: Any = make_model()
        other = other.to(dtype)
        logits = other(**batch).logits[:, :-1].flatten(0, 1)
        return gradients(other, cross_entropy(logits, batch["labels"][:, 1:].flatten()))

    ours = gradients(model, found)
    assert_tensors_within_budget(ours, own(torch.float64), own(torch.float32))
    trainer.train()
    (loss,) = logged(trainer, "loss")
    assert loss == pytest.approx(float(ours["loss"]), abs=1e-3)
    assert logged(trainer, "retain_loss") == []


@pytest.mark.parametrize("method", ["gradient_ascent", "npo", "idk_dpo", "undial"])
def test_methods_do_without_retain_rows(tmp_path: Path, method: str) -> None:
    """The loss is the method's alone, whichever way it goes."""

    def loss(**rows: Any) -> float:
        args = arguments(
            tmp_path,
            method=method,
            forget_weight=1.0,
            retain_weight=0.0,
            retain_loss="cross_entropy" if rows["retain"] else "none",
            per_device_train_batch_size=len(FORGET),
        )
        if method == "idk_dpo":
            rows["refusals"] = encoded(REFUSALS)
        trainer = UnlearningTrainer(make_model(), args, forget=encoded(FORGET), **rows)
        trainer.train()
        return logged(trainer, "forget_loss")[0]

    assert loss(retain=()) == pytest.approx(loss(retain=encoded(RETAIN[:3])), rel=1e-5)


def test_a_resumed_fine_tuning_ends_as_an_uninterrupted_one(folder: Path) -> None:
    settings = Settings.finetuning(
        model="model",
        output=folder / "whole",
        data=(folder / "a.jsonl", folder / "b.jsonl"),
        epochs=2,
        batch_size=3,
        learning_rate=1e-3,
        checkpoint_steps=1,
        label_smoothing=0.1,
    )
    execute(prepare(settings))
    again = dataclasses.replace(settings, output=folder / "again")
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(again), [InterruptAt(4)])
    with pytest.raises(RunError, match="other settings: data"):
        prepare(dataclasses.replace(again, data=settings.data[:1]), resume=True)
    write_rows(folder / "b.jsonl", RETAIN[1:])
    with pytest.raises(RunError, match="other inputs: data rows"):
        prepare(again, resume=True)
    write_rows(folder / "b.jsonl", RETAIN)
    resumed = prepare(again, resume=True)
    assert resumed.checkpoint is not None
    execute(resumed)
    first, second = (folder / name / "model.safetensors" for name in ("whole", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_where_the_rows_come_from(folder: Path) -> None:
    """Files before the benchmark's rows; `known` beside the retain rows, but not in unlearning."""
    write_tables(folder / "tofu", {"general": TOFU["world_facts_perturbed"]})
    given: dict[str, Any] = {
        "model": "model",
        "output": folder / "out",
        "benchmark": "tofu:forget10",
        "data_dir": folder / "tofu",
    }

    def answers(settings: Settings) -> dict[str, list[str]]:
        check_settings(settings)
        sets = read_sets(settings)
        return {name: [row.completion.strip() for row in rows] for name, rows in sets.items()}

    learned = answers(Settings.finetuning(**given, data=(folder / "a.jsonl",)))
    general = ["It is Paris.", "It is Lima.", "It is Malmö."]
    kept = ["It is Rome.", "It is Oslo.", "It is 京都."]
    dropped = ["It is Ada.", "It is Bo.", "It is Åse."]
    assert learned == {"data": ["ada", "bo", "cyd", *kept, *general]}
    start = answers(Settings.finetuning(**given, with_forget=True))
    assert start == {"data": [*kept, *general, *dropped]}
    both = answers(Settings(forget=None, retain=None, **given))
    assert both == {"forget": dropped, "retain": kept, "refusal": []}
    alone = answers(Settings(forget=None, retain=None, retain_loss="none", **given))
    assert alone == {"forget": dropped, "retain": [], "refusal": []}
    # A file in place of the benchmark's rows.
    own = answers(Settings(forget=None, retain=folder / "b.jsonl", **given))
    assert own["forget"] == dropped
    assert own["retain"] == ["yes", "no", "so", "well", "ok"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("finetune --model model --output out", "there is nothing to learn"),
        ("finetune --model model --output out --data none.jsonl", "none.jsonl: no such file"),
        ("finetune --model model --output out --benchmark tofu", "--benchmark and --data-dir go"),
        ("finetune --model model --output out --data-dir tofu", "--benchmark and --data-dir go"),
        ("finetune --model model --output out --data a.jsonl --with-forget", "--with-forget is"),
        (
            "finetune --model model --output out --data a.jsonl --label-smoothing 2",
            "label_smoothing must be at most 1",
        ),
        (
            "finetune --model model --output out --benchmark tofu:forget05 --data-dir tofu",
            "forget05: no such table",
        ),
        ("unlearn --model model --output out", "name the rows to forget: --forget FILE"),
        (
            "unlearn --model model --output out --forget a.jsonl",
            "needs rows to keep: --retain FILE",
        ),
        (
            "unlearn --model model --output out --forget a.jsonl --retain b.jsonl"
            " --retain-per-forget 0",
            "retain_per_forget must be at least 1, got 0",
        ),
        (
            "unlearn --model model --output out --forget a.jsonl --retain b.jsonl"
            " --block-stride 513",
            "block_stride must be from 1 to max_length, which is 512",
        ),
    ],
)
def test_wrong_input_is_told_before_anything_starts(folder: Path, line: str, message: str) -> None:
    result = run(line)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not Path("out").exists()


def test_long_texts_are_learned_whole(folder: Path) -> None:
    """In blocks, and it is said into how many."""
    write_tables(folder / "muse", {**MUSE, "raw/forget": ["x" * 100, "short"]}, "json")
    result = done(
        "unlearn --model model --benchmark muse-news --data-dir muse --output out --epochs 1"
        " --stop-at none"
        " --max-length 32 --block-stride 24"
    )
    # Blocks of 32 start at 0, 24, 48 and 72, the last of which holds the end of 100.
    assert "long forget texts are cut into blocks of 32 tokens, 5 rows" in result.stderr
    assert "5 rows to forget, 3 to keep" in result.output
    assert "retain texts are cut" not in result.stderr
    assert "rows are cut to" not in result.stderr


def test_long_texts_are_measured_whole(folder: Path) -> None:
    """In the blocks that they are learned in: the same log-probability of every token but one."""
    text = "the quick brown fox jumps over the lazy dog, é"
    write_tables(folder, {"forget": [{"text": text}, {"text": "short"}]})
    line = "evaluate --model model --data forget=forget.jsonl --no-generate --max-length"
    done(f"{line} 16 --output blocks")
    done(f"{line} 512 --output whole")
    size = {}
    for name in ("blocks", "whole"):
        records = load_records(next((folder / name / "tokens").iterdir()))
        size[name] = [len(record) for record in records.values()]
    # Every token of the bytes but the first, and the end.
    assert size["blocks"] == size["whole"] == [len(text.encode()), len("short")]


def test_a_benchmark_without_retain_rows_says_so(folder: Path, monkeypatch: Any) -> None:
    rows = load_benchmark("tofu:forget10", folder / "tofu").training["forget"]
    lacking = Benchmark("tofu", (), {"forget": rows}, {"positive": "a retain set"})
    monkeypatch.setattr(
        "unilogit_kernels.unlearning.sources.load_benchmark", lambda *given: lacking
    )
    result = run("unlearn --model model --benchmark tofu --data-dir tofu --output out")
    assert result.exit_code == 2
    assert "has no retain rows here: name a file of them (missing: positive: a" in result.output
    settings = json.dumps(Settings.finetuning(model="m", output=Path("o")).recorded())
    assert '"task": "finetune"' in settings
