"""What a run is asked for, and whether it can be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.dual import check_dual
from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.limits import check_numbers
from unilogit_kernels.unlearning.methods import (
    ALTPO,
    NONE,
    Method,
    check_goes_together,
    check_retain_loss,
    default_retain_loss,
)


@dataclass(frozen=True)
class Settings:
    """What is unlearned from what, and how.

    Attributes:
        model: directory or Hub id of a causal LM.
        forget: JSONL file of the rows to forget.
        retain: JSONL file of the rows to keep, or None where `retain_loss` is `"none"`.
        output: directory for the model; checkpoints lie there until the run is done.
        method: loss of the forget rows, a name from `methods.method_names()`.
        method_parameters: the method's float parameters, where they differ from its defaults.
        refusals: text file of what to say instead, one a line, for methods that take them; forget
            rows take them in turn. `altpo` takes the rows' own alternates.
        epochs: passes over the forget rows.
        learning_rate: of AdamW, constant after the warm-up.
        warmup_steps: steps over which the learning rate rises to it.
        batch_size: forget rows in a batch; the retain rows come on top.
        gradient_accumulation: batches in a step.
        retain_per_forget: retain rows for each forget row.
        forget_weight: factor of the forget loss.
        retain_loss: of the retain rows, see `UnlearningArguments`; None for the method's own.
        retain_weight: factor of that loss; where it is dual, the one at the start.
        label_smoothing: of the retain rows' cross-entropy.
        z_loss: see `UnlearningArguments`.
        dual_step_size: see `UnlearningArguments`.
        retain_loss_target: see `UnlearningArguments`.
        dual_update: see `UnlearningArguments`.
        dual_warmup_epochs: see `UnlearningArguments`.
        stop_at_probability: stop at this mean probability of a forget token, or None.
        train_layers: train only so many of the top layers, or None for all parameters. For `rmu`
            it counts from the steered layer down, and None is 3, as in the paper.
        memory_budget_mib: MiB that the losses' buffers may take, or None for the device's default.
        logits_dtype: see `UnlearningArguments`.
        skip_below: see `UnlearningArguments`.
        max_length: rows are cut after so many tokens.
        chat_template: see `Encoding`.
        template_arguments: see `Encoding`.
        dtype: of the weights, a key of `DTYPES`.
        autocast: compute in bfloat16 whatever the weights' dtype.
        gradient_checkpointing: recompute activations in the backward to save memory.
        checkpoint_steps: steps between checkpoints.
        seed: of the order of the rows, and of dropout.
        allow_missing_weights: see `load_model`.
    """

    model: str
    forget: Path
    retain: Path | None
    output: Path
    method: str = "unilogit"
    method_parameters: dict[str, float] = dataclasses.field(default_factory=dict)
    refusals: Path | None = None
    epochs: int = 5
    learning_rate: float = 1e-5
    warmup_steps: int = 5
    batch_size: int = 8
    gradient_accumulation: int = 1
    retain_per_forget: int = 1
    forget_weight: float = 0.1
    retain_loss: str | None = None
    retain_weight: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dual_step_size: float = 0.0
    retain_loss_target: float = 0.0
    dual_update: str = "step"
    dual_warmup_epochs: int = 0
    stop_at_probability: float | None = None
    train_layers: int | None = None
    memory_budget_mib: int | None = None
    logits_dtype: str | None = None
    skip_below: float = 0.0
    max_length: int = 512
    chat_template: bool | None = None
    template_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    autocast: bool = False
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 50
    seed: int = 0
    allow_missing_weights: bool = False

    def recorded(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "output"}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    def check(self) -> None:
        """See that they go together.

        Raises:
            RunError: they do not, or one of them has no such value.
        """
        try:
            method = Method(self.method, self.method_parameters)
            check_numbers(vars(self))
            of_labels = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
            retain_loss = self.retain_loss or default_retain_loss(method.name)
            check_retain_loss(retain_loss, of_labels)
            check_goes_together(
                method.name, retain_loss, self.dual_step_size, self.stop_at_probability
            )
            check_dual(vars(self), self.epochs)
        except ValueError as error:
            raise RunError(str(error)) from error
        if (retain_loss == NONE) != (self.retain is None):
            raise RunError(
                f"retain_loss {retain_loss!r} takes no rows to keep, got {self.retain}"
                if retain_loss == NONE
                else f"retain_loss {retain_loss!r} needs rows to keep; retain_loss 'none' does not"
            )
        takes_refusals = method.needs_refusals and method.name != ALTPO
        if takes_refusals and self.refusals is None:
            raise RunError(f"method {method.name!r} needs refusals: a text file with one a line")
        if self.refusals is not None and not takes_refusals:
            raise RunError(f"method {method.name!r} takes no refusals")
