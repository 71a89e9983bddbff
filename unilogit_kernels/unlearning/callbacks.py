"""What is done when the Trainer says where it is: at the start of a training, and after steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unilogit_kernels.unlearning.arguments import UnlearningArguments
from unilogit_kernels.unlearning.data import Features, count_labels
from unilogit_kernels.unlearning.evaluation import token_probabilities
from unilogit_kernels.unlearning.processes import over_rows


class Training(Protocol):
    """What is asked of the Trainer."""

    def begin(self) -> None:
        """A training begins."""

    def end(self) -> None:
        """It has taken its last step."""

    def evaluating_as_in_training(self) -> AbstractContextManager[nn.Module]:
        """The model as it trains."""

    def log(self, logs: dict[str, float]) -> None:
        """Log figures."""


class Begin(TrainerCallback):
    """Tells the Trainer when a training begins, also one that is resumed or its second, and ends.

    Args:
        trainer: is told.
    """

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Tell it."""
        self.trainer.begin()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Tell it."""
        self.trainer.end()


class StopAtProbability(TrainerCallback):
    """Asks every few steps how probable a forget token is, and stops all processes at once.

    Args:
        trainer: whose model is asked.
        forget: examples; those without a label have no probability and do not count.
        pad_id: the token to pad with.
    """

    def __init__(self, trainer: Training, forget: Sequence[Features], pad_id: int) -> None:
        self.trainer, self.pad_id = trainer, pad_id
        self.forget = [example for example in forget if count_labels(example) > 0]

    def on_step_end(  # type: ignore[override]  # only ever called with this class's arguments
        self,
        args: UnlearningArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Ask, log what came out, and stop if it is low enough."""
        if state.global_step % args.probability_steps or args.stop_at_probability is None:
            return
        probability = self._mean_probability(args.per_device_eval_batch_size, kwargs["model"])
        # A log ends the step's turn to log, which the losses still need.
        turn = control.should_log
        self.trainer.log({"forget_probability": probability})
        control.should_log = turn
        if probability <= args.stop_at_probability:
            control.should_training_stop = True

    def _mean_probability(self, batch_size: int, whose: nn.Module) -> float:
        """Over all rows, each read by one process; the same number in each."""

        def of_rows(mine: list[Features]) -> list[float]:
            with self.trainer.evaluating_as_in_training() as model:
                found = token_probabilities(model, mine, pad_id=self.pad_id, batch_size=batch_size)
            return found.tolist()

        return sum(over_rows(self.forget, of_rows, whose)) / len(self.forget)
