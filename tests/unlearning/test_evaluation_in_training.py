"""Evaluation inside training does what a Trainer's user expects, without logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel

from tests.support import literal
from tests.support.tiny_models import FORGET, RETAIN, encoded, make_model, one_thread
from tests.unlearning.tiny_trainer import arguments, logged, make_trainer
from unilogit_kernels.testing import AllocationGuard, assert_sum_within_budget, assert_within_budget
from unilogit_kernels.unlearning.data import DataError, collate

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def log_probs(model: PreTrainedModel, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Of all tokens but the first of each row, by the model's logits; and which have a label."""
    batch = collate(encoded(rows), 0)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
    labels = batch["labels"][:, 1:]
    log_p = literal.log_p(logits.flatten(0, 1), labels.clamp(min=0).flatten())
    return log_p.view(labels.shape), labels != -100


def test_losses_and_metrics_are_those_of_the_logits(tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        counted = prediction.label_ids != -100
        return {"probability": float(np.exp(prediction.predictions[counted]).mean())}

    model = make_model()
    trainer = make_trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=8),
        eval_dataset={"forget": encoded(FORGET), "kept": encoded(RETAIN)},
        compute_metrics=metrics,
    )
    found = trainer.evaluate()
    for name, of_set in (("forget", FORGET), ("kept", RETAIN)):
        plain, counted = log_probs(make_model(), of_set)
        double = make_model()
        double.double()
        exact, _ = log_probs(double, of_set)
        prediction = seen.pop(0)
        labels = torch.as_tensor(prediction.label_ids)
        assert torch.equal(labels[:, 1:] != -100, counted)
        by_label = torch.as_tensor(prediction.predictions)[:, 1:]
        assert_within_budget(by_label[counted], exact[counted], plain[counted], smallest_scale=1.0)
        assert (by_label[~counted] == 0).all()
        count = int(counted.sum())
        loss = torch.tensor(found[f"eval_{name}_loss"])
        assert_sum_within_budget(loss, -exact[counted] / count, -plain[counted] / count)
        mean = float(exact[counted].exp().mean())
        assert found[f"eval_{name}_probability"] == pytest.approx(mean, rel=1e-6)
    rows: Any = encoded(FORGET)
    predictions = torch.as_tensor(trainer.predict(rows).predictions)
    assert predictions.shape == collate(rows, 0)["labels"].shape


def test_nothing_of_the_size_of_the_logits_is_allocated(tmp_path: Path) -> None:
    model, ids = make_model(vocab_size=4001), torch.randint(4001, (60, 44))
    args = arguments(tmp_path, per_device_eval_batch_size=60)
    examples = [{"input_ids": row, "labels": row} for row in ids]
    trainer = make_trainer(model, args, eval_dataset=examples)
    trainer.evaluate()  # What the model does to its logits is observed once.
    forbidden = 60 * 43 * 4001
    with AllocationGuard(forbidden):
        trainer.evaluate()
    with pytest.raises(AssertionError, match="elements was allocated"), AllocationGuard(forbidden):
        model(input_ids=ids)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """Their loss rises while the model forgets; the steps of training are what they would be."""
    options: dict[str, Any] = {"num_train_epochs": 3, "learning_rate": 3e-2, "forget_weight": 30.0}
    evaluated = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        **options,
    )
    model, bare = make_model(), make_model()
    trainer = make_trainer(model, evaluated, eval_dataset=encoded(RETAIN))
    trainer.train()
    plain = make_trainer(bare, arguments(tmp_path / "plain", **options))
    plain.train()
    assert logged(trainer, "loss") == logged(plain, "loss")
    losses = logged(trainer, "eval_loss")
    assert len(losses) == 3
    best = 2 * (1 + losses.index(min(losses)))
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert best < 6
    assert trainer.evaluate()["eval_loss"] == min(losses)


def test_callbacks_of_hugging_face_stop_it(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        num_train_epochs=20,
        learning_rate=3e-2,
        forget_weight=30.0,
        eval_strategy="epoch",
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        retain_loss="none",
    )
    patience = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make_trainer(make_model(), args, eval_dataset=encoded(RETAIN), callbacks=[patience])
    trainer.train()
    assert trainer.state.global_step < trainer.state.max_steps


def test_what_is_negated_is_the_best_model(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        method="task_vector",
        method_parameters={"scale": 0.0},
        num_train_epochs=2,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    model = make_model()
    make_trainer(model, args, eval_dataset=encoded(FORGET)).train()
    start = dict(make_model().named_parameters())
    assert all(torch.equal(value, start[name]) for name, value in model.named_parameters())


def test_examples_are_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eval_dataset 'kept' example 0 has no labels"):
        make_trainer(
            make_model(),
            arguments(tmp_path),
            eval_dataset={"kept": [{"input_ids": torch.arange(3)}]},
        )
