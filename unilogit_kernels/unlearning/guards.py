"""What watches over a run while it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unilogit_kernels.unlearning.errors import TrainingError, reading
from unilogit_kernels.unlearning.record import newest_checkpoint

_WATCHED = ("loss", "grad_norm", "forget_loss", "retain_loss", "auxiliary_loss")


class StopAtNonFinite(TrainerCallback):
    """Ends a run at the first loss or gradient that is NaN or infinite.

    It sees what is logged, which is on the host anyway, before the Trainer saves a checkpoint of
    the same step: no checkpoint is written of weights that such a gradient has spoilt.

    Args:
        output: the run's folder.
    """

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at what was logged.

        Raises:
            TrainingError: some of it is not finite.
        """
        for name in _WATCHED:
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                kept = newest_checkpoint(self.output)
                left = "no checkpoint was written yet" if kept is None else f"{kept} is kept"
                raise TrainingError(
                    f"{name} is {value} at step {state.global_step}, so the run ends, and {left}; "
                    "try a lower learning rate, a lower forget weight, or float32"
                )


class Started(TrainerCallback):
    """Knows whether the first step began, up to which a checkpoint is being read."""

    def __init__(self) -> None:
        self.seen = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The checkpoint has been read."""
        self.seen = True

    @contextmanager
    def reading(self, checkpoint: Path) -> Iterator[None]:
        """An error before the first step is the checkpoint's.

        Raises:
            RunError: in place of such an error.
        """
        try:
            yield
        except Exception as error:
            if self.seen or isinstance(error, TrainingError):
                raise
            advice = "cannot be resumed from; delete it to resume from an older one, or start anew"
            with reading(f"{checkpoint} {advice}"):
                raise error
