"""Tells when a model's weights are too coarse for the steps that they are to take.

A bfloat16 number of size 0.02 has its neighbour 1.2e-4 away. A step of 1e-5, which is what Adam
takes at a learning rate of 1e-5, rounds to nothing, and so does every step after it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

# So many weights, spread evenly over all: the share is known to 0.4 %, in no time beside a step's.
_SAMPLE = 1 << 16
# Steps at the full learning rate before the share is read; in float32 every weight has moved then.
_STEPS = 8
# A run in which most weights stay where they are is not the run that was asked for.
_EXPECTED_SHARE = 0.5

_ADVICE = "What helps: a higher learning rate or fewer warmup_steps"
_ADVICE_FOR_HALF = (
    f"{_ADVICE}; float32 weights, computed with in bfloat16 (bf16=True; --dtype float32 --autocast "
    "--save-dtype bfloat16 on the command line); or an optimizer that keeps what rounding loses "
    "(optim='stable_adamw', --args.optim stable_adamw, with the package torch-optimi)"
)


class CoarseWeightsWarning(UserWarning):
    """Most weights do not change, since a step is less than their rounding."""


class CompensatingTrainer(Trainer):
    """A Trainer whose compensated optimizer (`optim="stable_adamw"`) runs on CPUs as well."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """Hugging Face's choice; where there is no GPU, optimi is not to ask Triton for one."""
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer.__module__.startswith("optimi.") and args.device.type == "cpu":
            options = {**options, "triton": False}
        return optimizer, options


class WarnOfCoarseWeights(TrainerCallback):
    """Counts which weights the first steps change, among those that have a gradient, and warns.

    Args:
        trainer: whose model is watched. The figure is of all its processes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.watched: list[nn.Parameter] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember where a sample of the weights starts."""
        assert model is not None
        self.watched = [p for p in model.parameters() if p.requires_grad]
        self.stride = max(1, sum(_own(p).numel() for p in self.watched) // _SAMPLE)
        self.start = [self._sample(p).clone() for p in self.watched]
        self.pushed = [torch.zeros_like(values, dtype=torch.bool) for values in self.start]
        self.first_step, self.rate = state.global_step, 0.0
        self.last_step = min(
            state.global_step + args.get_warmup_steps(state.max_steps) + _STEPS, state.max_steps
        )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Note which of them have a gradient: an embedding that is not used does not move."""
        if self.watched and optimizer is not None:
            self.rate = max(self.rate, *(float(group["lr"]) for group in optimizer.param_groups))
        for parameter, pushed in zip(self.watched, self.pushed, strict=True):
            if parameter.grad is not None:
                pushed |= self._sample(parameter.grad) != 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count them, once."""
        if state.global_step == self.last_step:
            self._judge(args, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count them now, if the training ended early."""
        if self.first_step < state.global_step < self.last_step:
            self._judge(args, state)
        self.watched = []

    def _sample(self, values: Tensor) -> Tensor:
        return _own(values.detach()).flatten()[:: self.stride]

    def _judge(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.rate == 0:  # nothing was to move: the warm-up's first step
            return
        counts = torch.zeros(2, dtype=torch.int64, device=args.device)
        for parameter, start, pushed in zip(self.watched, self.start, self.pushed, strict=True):
            counts[0] += ((self._sample(parameter) != start) & pushed).sum()
            counts[1] += pushed.sum()
        moved, pushed_in_all = self.trainer.accelerator.reduce(counts, "sum").tolist()
        if (
            moved < _EXPECTED_SHARE * pushed_in_all
            and state.is_world_process_zero
            and not _keeps_remainders(self.trainer.optimizer)
        ):
            steps = state.global_step - self.first_step
            half = any(parameter.element_size() < 4 for parameter in self.watched)
            advice = _ADVICE_FOR_HALF if half else _ADVICE
            warnings.warn(
                f"only {moved / pushed_in_all:.2%} of the weights that have a gradient changed in "
                f"{steps} steps with learning rates up to {self.rate:g}: such a step is less than "
                f"the rounding of {_dtypes(self.watched)} weights, and is lost. {advice}",
                CoarseWeightsWarning,
                stacklevel=2,
            )
        self.watched, self.start, self.pushed = [], [], []


def _own(values: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return values.to_local() if isinstance(values, DTensor) else values


def _dtypes(parameters: list[nn.Parameter]) -> str:
    return " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))


def _keeps_remainders(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether what a step loses is kept for the next one, so that small steps add up (Kahan)."""
    states = [] if optimizer is None else optimizer.state.values()
    return any(
        ("kahan" in key or "compensation" in key)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        for state in states
        for key, value in state.items()
    )
