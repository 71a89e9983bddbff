"""What a training logs is what it did: after a resume, the second time, and in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.processes import run_ranks
from tests.support.tiny_models import FORGET, encoded, make_model, one_thread
from tests.unlearning.tiny_trainer import arguments, logged, make_trainer
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def losses(trainer: UnlearningTrainer) -> list[tuple[float, ...]]:
    """The loss and its two parts at each log, which must go together."""
    names = ("loss", "forget_loss", "retain_loss")
    rows = []
    for log in trainer.state.log_history:
        if "loss" in log:
            loss, forget, retain = row = tuple(log[name] for name in names)
            weight = log.get("retain_weight", trainer.args.retain_weight)
            together = trainer.args.forget_weight * forget + weight * retain
            assert loss == pytest.approx(together, rel=1e-5)
            rows.append(row)
    return rows


@pytest.mark.parametrize("every", [1, 2, 4])
def test_after_a_resume(tmp_path: Path, every: int) -> None:
    """Also within an epoch, which has two steps, and between two logs."""
    options: dict[str, Any] = {
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": every,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = make_trainer(make_model(), arguments(tmp_path, **options))
    whole.train()
    again = make_trainer(make_model(1), arguments(tmp_path / "again", **options))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found, expected = losses(again), losses(whole)
    # The checkpoints after 3 and 6 steps are logs, too, or a mean would run over the break.
    assert len(expected) == {1: 6, 2: 4, 4: 3}[every]
    assert found == expected


def test_of_a_second_training(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), arguments(tmp_path, learning_rate=1e-2))
    trainer.train()
    assert len(losses(trainer)) == 2
    trainer.train()
    assert len(losses(trainer)) == 2


TWO = {
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 1,
    "method": "npo",
    "dual_step_size": 0.25,
    "retain_loss_target": 1.0,
    "stop_at": "probability=1e-9",
    "check_steps": 2,
    "use_cpu": True,
}
ROWS = [*FORGET, {"prompt": "who 3?", "completion": " dee and more"}]
NAMES = ("loss", "forget_loss", "retain_loss", "retain_weight", "forget_probability", "grad_norm")


def _worker(folder: str, expected: dict[str, list[float]]) -> None:
    args = arguments(Path(folder), ddp_backend="gloo", **TWO)
    assert args.world_size == 2
    trainer = make_trainer(make_model(), args, forget=encoded(ROWS))
    trainer.train()
    for name, values in expected.items():
        assert logged(trainer, name) == pytest.approx(values, rel=1e-4), name
    weights: list[Any] = [None, None]
    dist.all_gather_object(weights, logged(trainer, "retain_weight"))
    assert weights[0] == weights[1]


def test_of_two_processes(tmp_path: Path) -> None:
    """Each logs what one process logs that takes the batches of both, in every epoch."""
    alone = make_trainer(
        make_model(),
        arguments(tmp_path, gradient_accumulation_steps=2, **TWO),
        forget=encoded(ROWS),
    )
    alone.train()
    # A probability that is logged takes no step's losses away.
    assert len(losses(alone)) == alone.state.global_step == 6
    expected = {name: logged(alone, name) for name in NAMES}
    # At the start, and after each step but where the last look was no nearer to the target.
    assert 4 <= len(expected["forget_probability"]) <= 7
    run_ranks(_worker, str(tmp_path), expected)
