"""What a run is asked for, and whether it can be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.dual import check_dual
from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.limits import check_choice, check_numbers
from unilogit_kernels.unlearning.lora import lora_options
from unilogit_kernels.unlearning.methods import (
    ALTPO,
    NONE,
    Method,
    check_goes_together,
    check_retain_loss,
    default_retain_loss,
)

TASKS = {"unlearn": "unlearning", "finetune": "fine-tuning"}
"""What a run may do, and what that is called while it is done."""


@dataclass(frozen=True)
class Settings:
    """What is unlearned from what, and how.

    Attributes:
        model: directory or Hub id of a causal LM.
        forget: file of the rows to forget, or None for the benchmark's.
        retain: file of the rows to keep, or None for the benchmark's; None where `retain_loss` is
            `"none"`.
        output: directory for the model; checkpoints lie there until the run is done.
        task: `"unlearn"`, or `"finetune"`, see `finetuning`.
        benchmark: name of a benchmark whose rows to take, see `load_benchmark`.
        data_dir: directory that holds its files.
        data: files of rows to learn, in a fine-tuning.
        with_forget: also learn the benchmark's forget rows, in a fine-tuning.
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
        max_length: rows are cut after so many tokens, and texts into blocks of as many.
        block_stride: see `Encoding`.
        chat_template: see `Encoding`.
        template_arguments: see `Encoding`.
        dtype: of the weights, a key of `DTYPES`.
        autocast: compute in bfloat16 whatever the weights' dtype.
        gradient_checkpointing: recompute activations in the backward to save memory.
        checkpoint_steps: steps between checkpoints.
        seed: of the order of the rows, and of dropout.
        allow_missing_weights: see `load_model`.
        lora: train a LoRA adapter, see `lora.lora_config`, or None for the weights themselves.
        merge: write the whole model, with the adapter merged, in the place of the adapter.
    """

    model: str
    forget: Path | None
    retain: Path | None
    output: Path
    task: str = "unlearn"
    benchmark: str | None = None
    data_dir: Path | None = None
    data: tuple[Path, ...] = ()
    with_forget: bool = False
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
    block_stride: int | None = None
    chat_template: bool | None = None
    template_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    autocast: bool = False
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 50
    seed: int = 0
    allow_missing_weights: bool = False
    lora: str | None = None
    merge: bool = False

    def recorded(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "output"}
        values["data"] = [str(path) for path in self.data]
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    @property
    def retain_loss_or_default(self) -> str:
        """The loss of the retain rows, the method's own where none is given."""
        return self.retain_loss or default_retain_loss(self.method)

    @property
    def takes_retain_rows(self) -> bool:
        """Whether there is a loss of retain rows, and so are rows."""
        return self.retain_loss_or_default != NONE

    @classmethod
    def finetuning(cls, **given: Any) -> Settings:
        """Of a run that learns rows by cross-entropy and forgets none.

        Args:
            given: settings by name; those of forgetting and retaining have no place here.
        """
        fixed = {"forget": None, "retain": None, "task": "finetune", "method": "cross_entropy"}
        return cls(**{**fixed, "forget_weight": 1.0, "retain_loss": NONE, **given})

    def check(self) -> None:
        """See that they go together.

        Raises:
            RunError: they do not, or one of them has no such value.
        """
        self._check_sources()
        try:
            method = Method(self.method, self.method_parameters)
            check_numbers(vars(self))
            of_labels = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
            check_retain_loss(self.retain_loss_or_default, of_labels)
            check_goes_together(
                method.name,
                self.retain_loss_or_default,
                self.dual_step_size,
                self.stop_at_probability,
            )
            check_dual(vars(self), self.epochs)
        except ValueError as error:
            raise RunError(str(error)) from error
        self._check_retain_rows()
        self._check_lora(method)
        takes_refusals = method.needs_refusals and method.name != ALTPO
        if takes_refusals and self.refusals is None:
            raise RunError(f"method {method.name!r} needs refusals: a text file with one a line")
        if self.refusals is not None and not takes_refusals:
            raise RunError(f"method {method.name!r} takes no refusals")

    def _check_sources(self) -> None:
        """See that it is said where the rows come from, and once."""
        check_choice("task", self.task, TASKS)
        if (self.benchmark is None) != (self.data_dir is None):
            raise RunError(
                "--benchmark and --data-dir go together: the one names what, the other where"
            )
        if self.task == "finetune":
            if not self.data and self.benchmark is None:
                raise RunError("there is nothing to learn: name files by --data, or a --benchmark")
            if self.with_forget and self.benchmark is None:
                raise RunError("--with-forget is about the rows of a benchmark: name one")
            return
        if self.forget is None and self.benchmark is None:
            raise RunError("name the rows to forget: --forget FILE, or a --benchmark")

    def _check_lora(self, method: Method) -> None:
        """See that an adapter is asked for in a way that can be, and with what goes with one."""
        if self.lora is None:
            if self.merge:
                raise RunError("--merge is about the adapter of --lora, which is not given")
            return
        lora_options(self.lora)
        if self.train_layers is not None:
            raise RunError("--train-layers and --lora both say what is trained: leave one out")
        if method.is_negated:
            raise RunError(f"method {method.name!r} negates weights, which --lora does not train")

    def _check_retain_rows(self) -> None:
        """See that there are rows to keep where there is a loss of them, and only there."""
        retain_loss = self.retain_loss_or_default
        if not self.takes_retain_rows and self.retain is not None:
            raise RunError(f"retain_loss {retain_loss!r} takes no rows to keep, got {self.retain}")
        if self.takes_retain_rows and self.task == "finetune":
            raise RunError(
                f"a fine-tuning keeps no rows: retain_loss must be 'none', got {retain_loss!r}"
            )
        if self.takes_retain_rows and self.retain is None and self.benchmark is None:
            raise RunError(
                f"retain_loss {retain_loss!r} needs rows to keep: --retain FILE, or a --benchmark; "
                "retain_loss 'none' does not"
            )
