"""The seam to the Trainer: learning rows, and unlearning them under a watch of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from unilogit_kernels.unlearning.comparison.cost import seconds
from unilogit_kernels.unlearning.comparison.measure import Look
from unilogit_kernels.unlearning.comparison.parts import ChecksPlan, LearnPlan, UnlearnPlan
from unilogit_kernels.unlearning.comparison.subject import Bench, Settings, Subject
from unilogit_kernels.unlearning.data import Features
from unilogit_kernels.unlearning.errors import TrainingError
from unilogit_kernels.unlearning.guards import StopAtNonFinite
from unilogit_kernels.unlearning.processes import on_cpu
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

_LOSSES = ("forget_loss", "retain_loss")


class Watch(TrainerCallback):
    """Looks at the model every few steps, keeps it as it is at the target, and ends the run.

    Args:
        look: at the model as it is.
        start: what it saw before the first step.
        target: forget probability at which the model is kept.
        when: to look.
    """

    def __init__(self, look: Callable[[], Look], start: Look, target: float, when: ChecksPlan):
        self.look, self.target, self.when = look, target, when
        self.checks: list[dict[str, Any]] = [{"step": 0, "sets": start}]
        self.losses: list[dict[str, float]] = []
        self.seconds, self._began = 0.0, 0.0
        self.kept: dict[str, Tensor] | None = None
        self.kept_at: int | None = None

    @property
    def probability(self) -> float:
        """Of the forget rows, at the last look."""
        return float(self.checks[-1]["sets"]["forget"]["all"]["probability"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock: looks do not count."""
        self._began = seconds()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look if it is time, and say whether the run has come to its end."""
        self.seconds += seconds() - self._began
        step, last = state.global_step, state.global_step >= state.max_steps
        near = self.probability <= self.when.near * self.target
        if step % self.when.every and not near and not last:
            return
        self.checks.append({"step": step, "sets": self.look()})
        if not math.isfinite(self.probability):
            raise TrainingError(f"the forget probability is {self.probability} at step {step}")
        if self.probability <= self.target and self.kept is None:
            self.kept = _trained(kwargs["model"])
            self.kept_at = step
        if self.probability <= self.when.past * self.target:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the losses."""
        found = {name: float(v) for name, v in (logs or {}).items() if name in _LOSSES}
        if found:
            self.losses.append({"step": state.global_step, **found})

    def restore(self, model: nn.Module) -> None:
        """Give a model the weights that it had at the target, if it came there."""
        if self.kept is not None:
            named = dict(model.named_parameters())
            with torch.no_grad():
                for name, weight in self.kept.items():
                    named[name].copy_(weight)
            self.kept = None


def _trained(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: weight.detach().clone() for name, weight in named if weight.requires_grad}


def learn(
    subject: Subject, rows: Sequence[Features], plan: LearnPlan, bench: Bench, scratch: Path
) -> None:
    """Teach a model rows by cross-entropy, in place.

    Args:
        subject: the model.
        rows: what it is to know.
        plan: how.
        bench: of the model.
        scratch: folder for the Trainer.
    """
    smoothing = {"label_smoothing": plan.label_smoothing} if plan.label_smoothing else {}
    arguments = _arguments(
        scratch,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(plan.warmup_steps, plan.steps - 1),
        seed=plan.seed,
        method="cross_entropy",
        method_parameters=smoothing,
        forget_weight=1.0,
        retain_loss="none",
    )
    _train(subject, arguments, bench, scratch, forget=rows)


def unlearn(
    subject: Subject,
    settings: Settings,
    plan: UnlearnPlan,
    bench: Bench,
    watch: Watch,
    scratch: Path,
) -> None:
    """Unlearn, in place, until the watch ends it; the model is then as it was at the target.

    Args:
        subject: the starting model.
        settings: of the cell.
        plan: what all cells share.
        bench: of the model.
        watch: of the run.
        scratch: folder for the Trainer.

    Raises:
        TrainingError: a loss or gradient became NaN or infinite.
        ValueError: the method cannot run as it is asked for.
    """
    arguments = _arguments(
        scratch,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=plan.warmup_steps,
        seed=settings["seed"],
        method=settings["method"],
        method_parameters=dict(settings["parameters"]),
        forget_weight=settings["forget_weight"],
        retain_loss=settings["retain_loss"],
        retain_weight=settings["retain_weight"],
        retain_per_forget=plan.retain_per_forget,
    )
    forget = bench.fed(subject, "forget", bench.training["forget"])
    retain: Sequence[Features] = ()
    if arguments.retain_rows:
        retain = bench.fed(subject, "retain", bench.training["retain"])
    _train(subject, arguments, bench, scratch, forget=forget, retain=retain, watch=watch)
    watch.restore(subject.trained)


def _arguments(scratch: Path, **given: Any) -> UnlearningArguments:
    common: dict[str, Any] = {
        "output_dir": str(scratch),
        "use_cpu": on_cpu(),
        "weight_decay": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # `StopAtNonFinite` is to see them.
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu(),
    }
    return UnlearningArguments(**common, **given)


def _train(
    subject: Subject,
    arguments: UnlearningArguments,
    bench: Bench,
    scratch: Path,
    watch: Watch | None = None,
    **rows: Sequence[Features],
) -> None:
    set_seed(arguments.seed)
    trainer = UnlearningTrainer(
        subject.trained,
        arguments,
        forget=rows["forget"],
        retain=rows.get("retain", ()),
        pad_id=bench.pad_id,
        callbacks=[StopAtNonFinite(scratch), *([] if watch is None else [watch])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    subject.trained.eval()
