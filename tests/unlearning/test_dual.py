"""A retain weight that follows the retain loss: by which formula, and over interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import make_model, one_thread
from tests.unlearning.tiny_trainer import arguments, logged, make_trainer
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

STEPS = 2
"""Of an epoch: batches of two of three forget rows."""


def dual_arguments(folder: Path, **options: Any) -> UnlearningArguments:
    defaults = {"num_train_epochs": 4, "learning_rate": 1e-2, "dual_step_size": 0.3}
    return arguments(folder, **{**defaults, **options})


def weights_of(args: UnlearningArguments, losses: list[float]) -> list[float]:
    """The weight that each step is taken with, by the retain losses of all."""
    weight, weights, since = args.retain_weight, [], list[float]()
    for step, loss in enumerate(losses):
        weights.append(weight)
        since.append(loss)
        epoch, is_last = step // STEPS, step % STEPS == STEPS - 1
        if args.dual_update == "step":
            update, seen = epoch >= args.dual_warmup_epochs, loss
        else:
            update, seen = is_last and epoch + 1 >= args.dual_warmup_epochs, sum(since) / len(since)
        if update:
            weight = max(0.0, weight + args.dual_step_size * (seen - args.retain_loss_target))
        if is_last:
            since = []
    return weights


@pytest.mark.parametrize(
    "options",
    [
        {"method": "pdu"},
        {"retain_weight": 0.0},
        # Too much at first, and then too little: the weight falls to 0, and rises again.
        {"retain_loss_target": 5.6, "retain_weight": 0.05, "learning_rate": 0.1},
        {"dual_warmup_epochs": 2},
        {"dual_update": "epoch"},
        {"dual_update": "epoch", "dual_warmup_epochs": 2, "gradient_accumulation_steps": 1},
        {"method": "idk_dpo"},
        {"retain_loss": "kl", "dual_step_size": 40.0},
        {"label_smoothing_factor": 0.1, "z_loss": 1e-3},
    ],
    ids=str,
)
def test_the_weight_follows_the_logged_losses(tmp_path: Path, options: dict[str, Any]) -> None:
    args = dual_arguments(tmp_path, **options)
    trainer = make_trainer(make_model(), args)
    trainer.train()
    columns = ("loss", "forget_loss", "retain_loss", "retain_weight")
    totals, forget, retain, weights = (logged(trainer, name) for name in columns)
    assert len(weights) == STEPS * 4
    assert weights == weights_of(args, retain)
    assert len(set(weights)) > 1
    if args.retain_loss_target:
        assert min(weights) == 0 < weights[-1]
    for total, dropped, kept, weight in zip(totals, forget, retain, weights, strict=True):
        assert total == pytest.approx(args.forget_weight * dropped + weight * kept, rel=1e-5)
    assert trainer.retain_weight == weights_of(args, [*retain, 0.0])[-1]


def test_a_step_over_several_batches_is_one_update(tmp_path: Path) -> None:
    """Where the authors update after each batch."""
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    args = dual_arguments(tmp_path, **options)
    trainer = make_trainer(make_model(), args)
    trainer.train()
    weights = logged(trainer, "retain_weight")
    assert weights == weights_of(args, logged(trainer, "retain_loss"))
    assert len(weights) == trainer.state.global_step == STEPS * 4


@pytest.mark.parametrize("update", ["step", "epoch"])
@pytest.mark.parametrize(("at", "restore"), [(3, False), (4, True)])
def test_a_resumed_training_has_the_weight(
    tmp_path: Path, update: str, at: int, restore: bool
) -> None:
    """Within an epoch and between two, also where the Trainer makes its callbacks anew."""

    def make(name: str, seed: int) -> UnlearningTrainer:
        args = dual_arguments(
            tmp_path / name,
            dual_update=update,
            save_strategy="steps",
            save_steps=at,
            restore_callback_states_from_checkpoint=restore,
        )
        return make_trainer(make_model(seed), args)

    whole, again = make("whole", 0), make("again", 1)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    for name in ("loss", "forget_loss", "retain_loss", "retain_weight"):
        assert logged(again, name) == logged(whole, name), name
    assert again.retain_weight == whole.retain_weight
    assert whole.model is not None
    assert again.model is not None
    expected = whole.model.state_dict()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_checkpoint_without_a_weight_is_refused(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(make_model(), dual_arguments(tmp_path, dual_step_size=0.0, **saved)).train()
    trainer = make_trainer(make_model(), dual_arguments(tmp_path / "again"))
    with pytest.raises(ValueError, match=r"dual_step_size is 0.3, but the checkpoint holds no"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_second_training_starts_anew(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), dual_arguments(tmp_path, num_train_epochs=1))
    for _ in range(2):
        trainer.train()
        weights = logged(trainer, "retain_weight")
        assert weights[0] == trainer.args.retain_weight
        assert weights == weights_of(trainer.args, logged(trainer, "retain_loss"))
    assert trainer.retain_weight != trainer.args.retain_weight


def test_a_constant_weight_is_not_logged(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), arguments(tmp_path))
    trainer.train()
    assert logged(trainer, "retain_weight") == []
    assert trainer.retain_weight == trainer.args.retain_weight
