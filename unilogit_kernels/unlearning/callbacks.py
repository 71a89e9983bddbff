"""What is done when the Trainer says where it is: at the start of a training, and after steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from unilogit_kernels.unlearning.arguments import UnlearningArguments
from unilogit_kernels.unlearning.data import Features, count_labels
from unilogit_kernels.unlearning.evaluation import token_log_probabilities
from unilogit_kernels.unlearning.processes import over_rows
from unilogit_kernels.unlearning.stopping import Target, spread, steps_to_next_look

_PROBABILITY, _LOSS = "forget_probability", "checked_retain_loss"
"""What is logged of a look."""
_ROWS_OF_A_LOOK = 64
"""Of each set: a forward of so many costs about what a step of 8 forget and 8 retain rows does."""


class Training(Protocol):
    """What is asked of the Trainer."""

    model: Any
    """Which is trained."""

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


class LogAtCheckpoints(TrainerCallback):
    """Has losses logged where a checkpoint is written, or may be, whatever `logging_steps` says.

    What is logged is a mean over the steps since the last log, and a run that is resumed knows
    none of those before its checkpoint. So no mean runs over a checkpoint.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Log, if a checkpoint comes."""
        best = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
        if args.logging_strategy != IntervalStrategy.NO and (control.should_save or best):
            control.should_log = True

    on_epoch_end = on_step_end


class Watch(TrainerCallback):
    """Looks at what is forgotten and kept, more often near the target, and ends a run in time.

    What it saw is in the Trainer's log, so a run that is resumed looks where it would have looked.

    Args:
        trainer: whose model is looked at.
        forget: rows of the probability; those without a label have none and do not count.
        retain: rows whose loss may not rise too far.
        pad_id: the token to pad with.

    Attributes:
        reason: why the run was ended before its last step, or None.
        damaged: whether that was for what it does to the retain rows.
    """

    def __init__(
        self,
        trainer: Training,
        forget: Sequence[Features],
        retain: Sequence[Features],
        pad_id: int,
    ) -> None:
        self.trainer, self.pad_id = trainer, pad_id
        self.forget = [example for example in forget if count_labels(example) > 0]
        labelled = [example for example in retain if count_labels(example) > 0]
        self.retain = [labelled[position] for position in spread(labelled, _ROWS_OF_A_LOOK)]
        self.target: Target | None = None
        self.reason: str | None = None
        self.damaged = False
        self.missed: set[str] = set()

    def on_train_begin(  # type: ignore[override]  # only ever called with this class's arguments
        self,
        args: UnlearningArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look at the model as it starts."""
        self.target, self.reason, self.damaged = args.target(), None, False
        self.missed.clear()
        if state.global_step == 0:
            self._look(args, control)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """See that the evaluations, if there was one, computed what the run is to stop at.

        Raises:
            ValueError: they did not.
        """
        if self.missed and self.target is not None:
            raise ValueError(
                f"stop_at {self.target.asked!r}: the evaluations compute no {self.target.metric}, "
                f"but {', '.join(sorted(self.missed))}"
            )

    def on_step_end(  # type: ignore[override]  # only ever called with this class's arguments
        self,
        args: UnlearningArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look, if it is time to, log what was seen, and end the run where that says so."""
        goals = self._goals(args, state)
        due = [
            seen[-1][0] + steps_to_next_look(seen, goal, args.check_steps) for seen, goal in goals
        ]
        if not due or state.global_step < min(due):
            return
        found = self._look(args, control)
        probability, loss = found.get(_PROBABILITY), found.get(_LOSS)
        if probability is not None and self.target and probability <= self.target.value:
            self._end(
                control,
                f"the forget probability is {probability:.3g} at step {state.global_step}, at or "
                f"below {self.target.value:.3g} (stop_at {self.target.asked})",
            )
        if loss is not None and args.max_retain_loss_rise is not None:
            rise = loss - _seen(state, _LOSS)[0][1]
            if rise > args.max_retain_loss_rise:
                self.damaged = True
                self._end(
                    control,
                    f"the retain loss has risen by {rise:.3g} at step {state.global_step}, more "
                    f"than the {args.max_retain_loss_rise:g} of max_retain_loss_rise",
                )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """End the run where a metric of the evaluation has come to the target."""
        if self.target is None or self.target.is_probability or not metrics:
            return
        if self.target.metric not in metrics:
            seen_before = any(self.target.metric in log for log in state.log_history)
            self.missed |= set() if seen_before else set(metrics)
            return
        self.missed.clear()
        value = metrics[self.target.metric]
        first = next(log for log in state.log_history if self.target.metric in log)
        if self.target.reached(first[self.target.metric], value):
            self._end(
                control,
                f"{self.target.metric} is {value:.3g} at step {state.global_step} "
                f"(stop_at {self.target.asked})",
            )

    def _end(self, control: TrainerControl, reason: str) -> None:
        self.reason = reason if self.reason is None else f"{self.reason}, and {reason}"
        control.should_training_stop = True

    def _goals(
        self, args: UnlearningArguments, state: TrainerState
    ) -> list[tuple[list[tuple[int, float]], float]]:
        """What was seen of each figure that may end the run, and where it does, both falling."""
        found = []
        if self.target is not None and self.target.is_probability:
            found.append((_seen(state, _PROBABILITY), self.target.value))
        if args.max_retain_loss_rise is not None:
            seen = _seen(state, _LOSS)
            most = seen[0][1] + args.max_retain_loss_rise
            found.append(([(step, -loss) for step, loss in seen], -most))
        return found

    def _look(self, args: UnlearningArguments, control: TrainerControl) -> dict[str, float]:
        """Measure what may end the run, over some rows of each set, and log it.

        Where that ends it, the probability of all forget rows decides.
        """
        found: dict[str, float] = {}
        size = args.per_device_eval_batch_size
        if self.target is not None and self.target.is_probability:
            some = [self.forget[position] for position in spread(self.forget, _ROWS_OF_A_LOOK)]
            found[_PROBABILITY] = self._probability(some, size)
            if found[_PROBABILITY] <= self.target.value and len(some) < len(self.forget):
                found[_PROBABILITY] = self._probability(self.forget, size)
        if args.max_retain_loss_rise is not None:
            found[_LOSS] = self._loss(self.retain, size)
        if found:
            # A log ends the step's turn to log, which the losses still need.
            turn = control.should_log
            self.trainer.log(dict(found))
            control.should_log = turn
        return found

    def _probability(self, rows: Sequence[Features], size: int) -> float:
        """The mean over rows, each read by one process; the same number in each."""
        sums = self._log_probabilities(rows, size)
        return sum(math.exp(log_p / count) for log_p, count in sums) / len(rows)

    def _loss(self, rows: Sequence[Features], size: int) -> float:
        """The mean of `-log p` over their labels, the same number in each process."""
        sums = self._log_probabilities(rows, size)
        return -sum(log_p for log_p, _ in sums) / sum(count for _, count in sums)

    def _log_probabilities(self, rows: Sequence[Features], size: int) -> list[tuple[float, int]]:
        def of_rows(mine: list[Features]) -> list[tuple[float, int]]:
            with self.trainer.evaluating_as_in_training() as model:
                found = token_log_probabilities(model, mine, pad_id=self.pad_id, batch_size=size)
            return [
                (float(log_p.sum()), count_labels(row))
                for log_p, row in zip(found, mine, strict=True)
            ]

        return over_rows(rows, of_rows, self.trainer.model)


def _seen(state: TrainerState, name: str) -> list[tuple[int, float]]:
    """Step and value of each log of a figure."""
    return [(int(log["step"]), log[name]) for log in state.log_history if name in log]
