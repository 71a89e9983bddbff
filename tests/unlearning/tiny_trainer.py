"""A Trainer of a tiny model, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tests.support.tiny_models import FORGET, RETAIN, encoded
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

REFUSALS = [
    {**row, "completion": f" {w}"} for row, w in zip(FORGET, ("no", "idk", "hm"), strict=True)
]


def arguments(folder: Path, **options: Any) -> UnlearningArguments:
    """Of one epoch over batches of two, each step of which is logged."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return UnlearningArguments(**{**defaults, **options})


def make_trainer(model: nn.Module, args: UnlearningArguments, **options: Any) -> UnlearningTrainer:
    """Over FORGET and RETAIN, and REFUSALS where the method takes them."""
    rows: dict[str, Any] = {"forget": encoded(FORGET), "retain": encoded(RETAIN)}
    if args.retain_rows == 0:
        rows["retain"] = ()
    if args.resolved_method().needs_refusals:
        rows["refusals"] = encoded(REFUSALS)
    return UnlearningTrainer(model, args, **{**rows, **options})


def logged(trainer: UnlearningTrainer, name: str) -> list[float]:
    """Every value that was logged by that name."""
    return [log[name] for log in trainer.state.log_history if name in log]
