"""What a command shows on standard error while it runs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from unilogit_kernels.unlearning.processes import is_first
from unilogit_kernels.unlearning.settings import TASKS

_SHOWN = {
    "unlearn": ("forget_loss", "retain_loss", "retain_weight", "forget_probability"),
    "finetune": ("loss",),
}
"""Figures by what is done."""


def quieten_libraries() -> None:
    """Leave standard output and error to a command's own lines and its progress bar."""
    if not is_first():
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def progress_bar(task: str) -> Progress:
    """An empty one, which the first process alone shows.

    Args:
        task: what is done, a key of `settings.TASKS`.
    """
    return Progress(
        TextColumn(TASKS[task]),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
        disable=not is_first(),
    )


def stages_bar() -> Progress:
    """An empty one for stages whose number is not known, which is gone when all are done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not is_first(),
    )


class Bar(TrainerCallback):
    """Shows the Trainer's steps and its last figures.

    Args:
        progress: where.
        task: what is done, a key of `settings.TASKS`.
    """

    def __init__(self, progress: Progress, task: str = "unlearn") -> None:
        self.progress, self.shown = progress, _SHOWN[task]
        self.task = progress.add_task("", total=None, figures="")
        self.figures: dict[str, float] = {}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Show the step."""
        self.progress.update(self.task, completed=state.global_step, total=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures."""
        self.figures.update({k: v for k, v in (logs or {}).items() if k in self.shown})
        text = "  ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in self.figures.items())
        self.progress.update(self.task, figures=text)
