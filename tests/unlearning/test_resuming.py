"""A run that is killed and resumed ends as one that was not: weights, logs, outcome, to the bit."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    make_model,
    make_tokenizer,
    on_one_thread,
    one_thread,
    write_rows,
)
from tests.unlearning.test_trainer import InterruptAt
from unilogit_kernels.unlearning.outcome import FILE as OUTCOME
from unilogit_kernels.unlearning.run import Done, Settings, execute, prepare

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

ALTERNATES = ["no", ["idk", "hm"], "so"]
MORE = [{"prompt": f"where {i}?", "completion": f" {w}", "key": w} for i, w in enumerate("xyz")]


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a model with dropout that knows them."""
    folder = tmp_path_factory.mktemp("memorised")
    forget = [*({**row, "alternate": a} for row, a in zip(FORGET, ALTERNATES, strict=True))]
    for name, rows in (("forget", forget), ("retain", [*RETAIN, *MORE])):
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "refusals.txt").write_text("I do not know.\n\nno idea\n")
    model = make_model(num_hidden_layers=3, attention_dropout=0.1)
    model.save_pretrained(folder / "new")
    make_tokenizer().save_pretrained(folder / "new")
    learn = Settings.finetuning(
        model=str(folder / "new"),
        output=folder / "model",
        data=(folder / "forget.jsonl", folder / "retain.jsonl"),
        epochs=60,
        batch_size=16,
        learning_rate=3e-3,
        warmup_steps=0,
        checkpoint_steps=60,
    )
    with on_one_thread():
        execute(prepare(learn))
    return folder


WITHOUT_RETAIN: dict[str, Any] = {"retain": None, "retain_loss": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "unilogit": {},
    "npo": {},
    "undial": {"retain_loss": "kl"},
    "idk_dpo": {"refusals": Path("refusals.txt")},
    "rmu": {"method_parameters": {"layer": 1}},
    "altpo": {},
    "task_vector": WITHOUT_RETAIN,
    "ceu": WITHOUT_RETAIN,
}
"""One of each kind: of tokens, with a reference, a teacher, refusals; of hidden states; ..."""

HOW: dict[str, dict[str, Any]] = {
    "whole": {},
    "LoRA": {"lora": "r=4,targets=all-linear+lm_head,dropout=0.2", "learning_rate": 1e-2},
    "accumulation": {"batch_size": 1, "gradient_accumulation": 2},
    "early stop": {"stop_at": "probability=0.4", "max_retain_loss_rise": 9.0, "epochs": 40},
}


def settings_of(memorised: Path, output: Path, method: str, how: str) -> Settings:
    given: dict[str, Any] = {
        "model": str(memorised / "model"),
        "forget": memorised / "forget.jsonl",
        "retain": memorised / "retain.jsonl",
        "output": output,
        "method": method,
        "epochs": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "stop_at": "none",
        "checkpoint_steps": 2,
        **METHODS[method],
        **HOW[how],
    }
    if "refusals" in given:
        given["refusals"] = memorised / given["refusals"]
    if given["retain"] is None:
        given.pop("max_retain_loss_rise", None)
    return Settings(**given)


def log_of(done: Done) -> list[dict[str, float]]:
    """What was logged, but for the last line, which is about the steps of one process alone."""
    assert {"train_runtime", "train_loss"} < done.log[-1].keys()
    return done.log[:-1]


# Unilogit in every way, the others in two of them each; `make prove` adds the rest.
CASES = [
    pytest.param(method, how, marks=[pytest.mark.prove] if row and (row + column) % 2 else [])
    for (row, method), (column, how) in itertools.product(enumerate(METHODS), enumerate(HOW))
    if method != "task_vector" or how in ("whole", "accumulation")
]


@pytest.mark.parametrize(("method", "how"), CASES)
def test_a_killed_run_ends_as_one_that_was_not(
    memorised: Path, tmp_path: Path, method: str, how: str
) -> None:
    asked = settings_of(memorised, tmp_path / "whole", method, how)
    whole = execute(prepare(asked))
    assert (whole.ended is not None) == (how == "early stop")
    again = dataclasses.replace(asked, output=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(again), [InterruptAt(3)])
    resumed = prepare(again, resume=True)
    assert resumed.checkpoint is not None
    found = execute(resumed)
    assert log_of(found) == log_of(whole)
    assert (found.steps, found.ended, found.outcome) == (whole.steps, whole.ended, whole.outcome)
    assert (again.output / OUTCOME).read_bytes() == (asked.output / OUTCOME).read_bytes()
    (name,) = (path.name for path in asked.output.glob("*.safetensors"))
    assert (asked.output / name).read_bytes() == (again.output / name).read_bytes()
    saved = load_file(again.output / name)
    start = load_file(memorised / "model" / "model.safetensors")
    still = {n for n, w in saved.items() if n in start and torch.equal(w, start[n])}
    assert len(still) < len(saved)
