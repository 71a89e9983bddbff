"""Adapters in the Trainer: the base is the start, every adapter moves, adapters are saved.

That their steps are the literal ones shows test_twenty_steps.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

from tests.support.tiny_models import FORGET, RETAIN, encoded, make_model, one_thread
from tests.unlearning.tiny_adapters import ADAPTERS, learning, with_adapter
from tests.unlearning.tiny_trainer import arguments, logged
from unilogit_kernels.huggingface import WithoutAdapters
from unilogit_kernels.unlearning.methods import MethodError
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

BETA = 0.1


# ---- recomputed activations ----------------------------------------------------------------------


def recomputing(reentrant: bool) -> dict[str, Any]:
    """The arguments that recompute activations, by whichever name."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("method", ["unilogit", "undial"])
@pytest.mark.parametrize("kind", ["lora", "lora on the head"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_every_adapter_moves_where_activations_are_recomputed(
    tmp_path: Path, reentrant: bool, kind: str, method: str, native: bool
) -> None:
    """And by the same steps as without."""

    def trained(**options: Any) -> dict[str, Tensor]:
        model = with_adapter(kind)
        if native:
            model = make_model()
            torch.manual_seed(1)
            model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, **ADAPTERS[kind]))
        start = {name: value.clone() for name, value in learning(model).items()}
        options = {"method": method, "num_train_epochs": 2, "learning_rate": 1e-2, **options}
        trainer = UnlearningTrainer(
            model, arguments(tmp_path, **options), forget=encoded(FORGET), retain=encoded(RETAIN)
        )
        trainer.train()
        for name, value in learning(model).items():
            assert not torch.equal(value, start[name]), f"{name} did not move"
        return learning(model)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        found, expected = trained(**recomputing(reentrant)), trained()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


# ---- the starting model, and what is saved -------------------------------------------------------


def train(tmp_path: Path, model: nn.Module, **options: Any) -> UnlearningTrainer:
    args = arguments(tmp_path, **options)
    trainer = UnlearningTrainer(model, args, forget=encoded(FORGET), retain=encoded(RETAIN))
    trainer.train()
    return trainer


def test_no_second_model_is_held(tmp_path: Path) -> None:
    """The teacher is the model itself; nothing of its frozen weights is copied."""
    model = with_adapter("lora")
    trainer = train(tmp_path, model, method="npo", retain_loss="kl", learning_rate=0.1)
    assert isinstance(trainer._teacher, WithoutAdapters)
    losses = logged(trainer, "retain_loss")
    assert losses[0] == 0 < losses[-1]
    base = dict(make_model().named_parameters())
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, base[plain]), name


def test_rmu_keeps_retain_rows_where_the_base_has_them(tmp_path: Path) -> None:
    model = with_adapter("lora")
    options = {"method": "rmu", "method_parameters": {"layer": 1}, "learning_rate": 0.01}
    trainer = train(tmp_path, model, retain_loss="hidden_states", num_train_epochs=2, **options)
    # Squares of roundings at first, at most: rows in another batch are summed in another order.
    first, *_, last = logged(trainer, "retain_loss")
    assert first <= torch.finfo(torch.float32).eps ** 2 < last


def test_an_adapter_that_was_trained_before_is_said_not_to_be_the_start(tmp_path: Path) -> None:
    model = with_adapter("lora")
    train(tmp_path, model, learning_rate=0.1)
    for options in ({"method": "npo"}, {"retain_loss": "kl"}):
        with pytest.warns(UserWarning, match="has been trained already .*lora_B"):
            trainer = train(tmp_path, model, **options)
        assert trainer.state.global_step > 0
        if "method" in options:
            # That of a model which is its own reference.
            assert abs(logged(trainer, "forget_loss")[0] - 2 / BETA * math.log(2)) > 1e-3
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the adapter has been trained")
        train(tmp_path, model, method="unilogit")


def test_negated_factors_are_no_negated_product(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="a product of two negated factors is not"):
        train(tmp_path, with_adapter("lora"), method="task_vector")


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "none"])
def test_resumed_and_saved_as_an_adapter(tmp_path: Path, kind: str) -> None:
    """A run that goes on from a checkpoint ends as one without a break; what it saves is little."""
    options = {
        "method": "undial",
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = with_adapter(kind)
    train(tmp_path / "whole", whole, **options)
    resumed = with_adapter(kind)
    args = arguments(tmp_path / "whole", **options)
    trainer = UnlearningTrainer(resumed, args, forget=encoded(FORGET), retain=encoded(RETAIN))
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in learning(whole).items():
        assert torch.equal(value, learning(resumed)[name]), name
    trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    make_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = encoded(FORGET)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, resumed.eval()(ids).logits)
