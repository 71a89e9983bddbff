"""Adapters in the Trainer: the literal steps, the base as the start, every adapter moves."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

from tests.support import literal
from tests.support.tiny_models import FORGET, RETAIN, encoded, make_model, one_thread
from tests.unlearning.tiny_trainer import REFUSALS, arguments, logged
from unilogit_kernels.huggingface import WithoutAdapters
from unilogit_kernels.testing import assert_tensors_within_budget, assert_within_budget
from unilogit_kernels.unlearning.methods import MethodError
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "lora": {"target_modules": LINEAR},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
GAMMA, BETA = 3.0, 0.1


def with_adapter(kind: str) -> nn.Module:
    """A model with a new adapter: it changes nothing yet."""
    model = make_model()
    if not ADAPTERS[kind]:
        return model
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **ADAPTERS[kind])
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


# ---- the definitions -----------------------------------------------------------------------------

Read = Callable[[nn.Module], tuple[Tensor, Tensor]]
"""From a model to its logits and the labels that they predict, of some rows."""


def unilogit(model: nn.Module, start: nn.Module, read: Read, other: Read) -> Tensor:
    z, y = read(model)
    return literal.TOKEN["unilogit"](z[y != -100], y[y != -100])


def npo(model: nn.Module, start: nn.Module, read: Read, other: Read) -> Tensor:
    (z, y), (start_z, _) = read(model), read(start)
    return literal.npo(literal.sequence_log_p(z, y), literal.sequence_log_p(start_z, y), BETA)


def undial(model: nn.Module, start: nn.Module, read: Read, other: Read) -> Tensor:
    (z, y), (start_z, _) = read(model), read(start)
    counted = y != -100
    return literal.undial(GAMMA)(z[counted], start_z[counted], y[counted])


def idk_dpo(model: nn.Module, start: nn.Module, read: Read, other: Read) -> Tensor:
    def ratio(read: Read) -> Tensor:
        (z, y), (start_z, _) = read(model), read(start)
        return literal.sequence_log_p(z, y) - literal.sequence_log_p(start_z, y)

    return 2 / BETA * literal.dpo((ratio(other), ratio(read)), BETA)


METHODS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "unilogit": (unilogit, {}),
    "npo": (npo, {"method_parameters": {"beta": BETA}}),
    "undial": (undial, {"method_parameters": {"gamma": GAMMA}, "retain_loss": "kl"}),
    "idk_dpo": (idk_dpo, {}),
}


class Batch:
    """One, of which each model makes logits once."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.labels = batch["labels"]
        self._inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        self._logits: dict[nn.Module, Tensor] = {}

    def rows(self, rows: slice) -> Read:
        def read(model: nn.Module) -> tuple[Tensor, Tensor]:
            if model not in self._logits:
                learns = any(parameter.requires_grad for parameter in model.parameters())
                with torch.set_grad_enabled(learns):
                    self._logits[model] = model(**self._inputs).logits
            return self._logits[model][rows, :-1], self.labels[rows, 1:]

        return read


def literal_steps(
    model: nn.Module, windows: list[list[dict[str, Tensor]]], args: Any, lr: float
) -> list[Tensor]:
    """Steps of SGD with full logits; returns the forget and retain loss of each."""
    start: nn.Module = make_model().eval().requires_grad_(False)
    start = start.to(next(model.parameters()).dtype)
    formula, _ = METHODS[args.method]
    seen = []
    for window in windows:
        dropped, kept = [], []
        for batch in map(Batch, window):
            n = len(batch.labels) // (3 if args.method == "idk_dpo" else 2)
            first = n if args.method == "idk_dpo" else 0
            forget, other = batch.rows(slice(first, first + n)), batch.rows(slice(0, n))
            dropped.append(formula(model, start, forget, other))
            retain = batch.rows(slice(first + n, None))
            z, y = retain(model)
            counted = y != -100
            if args.retain_loss == "kl":
                q, _ = retain(start)
                kept.append(literal.kl_to_teacher(z[counted], q[counted], y[counted]))
            else:
                kept.append(F.cross_entropy(z[counted], y[counted], reduction="none"))
        losses = torch.cat(dropped).mean(), torch.cat(kept).mean()
        model.zero_grad()
        (args.forget_weight * losses[0] + args.retain_weight * losses[1]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    parameter.sub_(lr * parameter.grad)
        seen.append(torch.stack(losses).detach())
    return seen


def learning(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_are_the_literal_loop(
    tmp_path: Path, method: str, kind: str, accumulation: int
) -> None:
    """Windows of four batches and of what is left of an epoch, of unequal numbers of tokens."""
    lr, forget = 0.01, [*FORGET, *FORGET]
    model = with_adapter(kind)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    size = 1 if accumulation > 1 else 3
    args = arguments(
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=10,
        method=method,
        **METHODS[method][1],
        forget_weight=0.7,
        retain_weight=1.3,
        learning_rate=lr,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
    )
    refusals = encoded([*REFUSALS, *REFUSALS]) if method == "idk_dpo" else []
    trainer = UnlearningTrainer(
        model, args, forget=encoded(forget), retain=encoded(RETAIN), refusals=refusals
    )
    if kind != "none" and method == "undial":
        assert isinstance(trainer._teacher, WithoutAdapters)
    batches: list[dict[str, Tensor]] = []
    compute = trainer.compute_loss

    def recorded(model: nn.Module, inputs: dict[str, Tensor], *more: Any, **others: Any) -> Tensor:
        batches.append({name: value.clone() for name, value in inputs.items()})
        return compute(model, inputs, *more, **others)

    trainer.compute_loss = recorded  # type: ignore[method-assign]
    trainer.train()
    of_epoch = 6 // size
    assert trainer.state.global_step == 20 == 10 * -(-of_epoch // accumulation)
    windows = [
        batches[at : min(at + accumulation, epoch + of_epoch)]
        for epoch in range(0, len(batches), of_epoch)
        for at in range(epoch, epoch + of_epoch, accumulation)
    ]
    theirs, right = (literal_steps(each, windows, args, lr) for each in (plain, exact))
    ours = torch.tensor(
        [*zip(logged(trainer, "forget_loss"), logged(trainer, "retain_loss"), strict=True)]
    )
    # The errors of a course are those of its first steps, grown since: few are independent.
    losses = ours, torch.stack(right), torch.stack(theirs)
    assert_within_budget(*losses, smallest_scale=1.0, independent=4)
    start, found = learning(with_adapter(kind)), learning(model)
    assert len(found) >= 5
    for name, value in found.items():
        # A starts with the gradient that B has made by then, which may round to nothing.
        assert "lora_A" in name or not torch.equal(value, start[name]), f"{name} did not move"
    assert_tensors_within_budget(found, learning(exact), learning(plain))


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
