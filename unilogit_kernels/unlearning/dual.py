"""A retain weight that follows the retain loss: the dual ascent of PDU (arXiv 2506.05314).

The weight is the multiplier of the constraint that the retain loss be at most a target: it grows
while the loss is above, and falls to 0 at the least while it is below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from unilogit_kernels.unlearning.limits import check_choice

DUAL_UPDATES = ("step", "epoch")
"""When the weight is updated: after each optimizer step, or after the last one of each epoch."""

_DEFAULTS = {"retain_loss_target": 0.0, "dual_update": "step", "dual_warmup_epochs": 0}
"""Settings that say how the weight follows, where nothing is said."""


def check_dual(settings: Mapping[str, Any], epochs: float) -> None:
    """See that the settings of a dual retain weight say something, and what they say happens.

    Args:
        settings: `dual_step_size` and those that say how it is used, by name.
        epochs: how long the training lasts; infinite where that is not known.

    Raises:
        ValueError: there is no such `dual_update`, or a setting would have no effect.
    """
    check_choice("dual_update", settings["dual_update"], DUAL_UPDATES)
    if settings["dual_step_size"] == 0:
        for name, default in _DEFAULTS.items():
            if settings[name] != default:
                raise ValueError(
                    f"{name} would have no effect without dual_step_size, got {settings[name]!r}: "
                    f"give dual_step_size a positive number, or leave {name} {default!r}"
                )
        return
    warmup, by_epoch = settings["dual_warmup_epochs"], settings["dual_update"] == "epoch"
    # What is updated after the last epoch weighs nothing any more.
    if (max(warmup, 1) if by_epoch else warmup) >= epochs:
        raise ValueError(
            f"dual_step_size would have no effect, got {settings['dual_step_size']}: with "
            f"dual_update {settings['dual_update']!r} and dual_warmup_epochs {warmup} the retain "
            f"weight would first be updated after the {epochs:g} epochs of this run. Train longer, "
            "or warm up for fewer epochs"
        )


class DualArguments(Protocol):
    """What the weight is told; see `UnlearningArguments`."""

    retain_weight: float
    dual_step_size: float
    retain_loss_target: float
    dual_update: str
    dual_warmup_epochs: int


class DualRetainWeight(TrainerCallback, ExportableState):
    """The retain weight of a training, which the Trainer saves with its own state.

    It is made of what it saves and nothing else, so that the Trainer can make it anew from a
    checkpoint (`restore_callback_states_from_checkpoint`).

    Attributes:
        weight: as it is now.
        loss_sum: sum of the retain losses of the steps since it was last updated.
        steps: their number.
    """

    def __init__(self, weight: float = 0.0, loss_sum: float = 0.0, steps: int = 0) -> None:
        self.weight, self.loss_sum, self.steps = weight, loss_sum, steps

    def state(self) -> dict[str, Any]:
        """What is saved, with all digits."""
        return {"args": dict(vars(self)), "attributes": {}}

    def on_train_begin(  # type: ignore[override]  # only ever called with this package's arguments
        self, args: DualArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the arguments' weight, or go on from the checkpoint's.

        Raises:
            ValueError: the checkpoint has none.
        """
        saved: dict[str, Any] = {"weight": args.retain_weight}
        if state.global_step > 0:
            name = type(self).__name__
            of_callbacks: Any = state.stateful_callbacks or {}
            if name not in of_callbacks:
                raise ValueError(
                    f"dual_step_size is {args.dual_step_size}, but the checkpoint holds no dual "
                    "retain weight to go on with: leave dual_step_size 0, or start the run anew"
                )
            saved = of_callbacks[name]["args"]
        DualRetainWeight.__init__(self, **saved)

    def follow(self, args: DualArguments, epoch: float, retain_loss: float) -> None:
        """Be told of a step, and update the weight if it is time to.

        Args:
            args: how.
            epoch: how many epochs are over, the fraction of this one included.
            retain_loss: of the step, over all processes. NaN makes the weight NaN.
        """
        self.loss_sum, self.steps = self.loss_sum + retain_loss, self.steps + 1
        by_epoch = args.dual_update == "epoch"
        if by_epoch and not float(epoch).is_integer():
            return
        # Of a step counts how many epochs were over before it.
        if (epoch if by_epoch else math.ceil(epoch) - 1) >= args.dual_warmup_epochs:
            excess = self.loss_sum / self.steps - args.retain_loss_target
            self.weight = max(self.weight + args.dual_step_size * excess, 0.0)
        self.loss_sum, self.steps = 0.0, 0
