"""The Trainer's arguments: what unlearning adds, and which of Hugging Face's it has no use for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.objectives import CrossEntropy
from unilogit_kernels.unlearning.dual import check_dual
from unilogit_kernels.unlearning.limits import check_choice, check_numbers
from unilogit_kernels.unlearning.methods import (
    NONE,
    Method,
    check_goes_together,
    check_retain_loss,
    default_retain_loss,
)
from unilogit_kernels.unlearning.settings import ForgettingSettings, HeadSettings
from unilogit_kernels.unlearning.stopping import Target, read_target

_STRATEGY, _BY_LENGTH = "train_sampling_strategy", "group_by_length"
_MOST_BATCHES = 50
"""Of rows that are sorted by length together: Hugging Face's number, or a quarter of the set."""
_LOSS = "the loss is that of the method: choose it by method, method_parameters and retain_loss"
_LABELS = "the labels are the column `labels`: name it so in the examples"

REFUSED_ARGUMENTS: Mapping[str, str] = {
    "length_column_name": "lengths are those of the rows: leave it",
    "label_names": _LABELS,
    "use_cache": "no step of training reads a key-value cache: leave it False",
}
"""Arguments of `TrainingArguments` that would be without effect, and what to do instead."""

REFUSED_OPTIONS: Mapping[str, str] = {
    "preprocess_logits_for_metrics": (
        "there are no logits: compute_metrics is given the log-probabilities of the labels"
    ),
    "compute_loss_func": _LOSS,
    "model_init": "the starting model is the one that is given: pass it as model",
    "data_collator": "rows are padded by data.collate: pass examples that it takes",
    "train_dataset": "pass the rows as forget and retain",
    "processing_class": "pass it as tokenizer",
}
"""Options of `Trainer` that would be without effect, and what to do instead."""

ACCEPTED_OPTIONS = (
    "callbacks",
    "optimizers",
    "optimizer_cls_and_kwargs",
    "eval_dataset",
    "compute_metrics",
)
"""Options that are handed on to `Trainer`."""


_CHECKED = (
    "forget_weight",
    "retain_weight",
    "retain_per_forget",
    "label_smoothing_factor",
    "z_loss",
    "dual_step_size",
    "retain_loss_target",
    "dual_warmup_epochs",
    "check_steps",
    "max_retain_loss_rise",
    "vocab_size",
    "memory_budget",
    "skip_below",
)
"""Numbers that this class adds or gives a meaning to, and must lie in their ranges."""


LOGITS_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What `logits_dtype` may be."""


@dataclass
class UnlearningArguments(ForgettingSettings, HeadSettings, TrainingArguments):
    """`TrainingArguments`, and what unlearning adds.

    `per_device_train_batch_size` counts forget rows; the retain rows come on top.
    `per_device_eval_batch_size` counts the rows in a forward of an evaluation and of the early
    stop. `data_seed`, or `seed` without one, decides the order of the rows. `remove_unused_columns`
    is always False.
    `label_smoothing_factor` is that of the retain rows' cross-entropy, as PyTorch defines it.

    The fields of `ForgettingSettings` and `HeadSettings` are described there; of this class are

    Attributes:
        vocab_size: number of real tokens, for a teacher whose vocabulary is padded to another size
            than the model's.
        memory_budget: bytes that the losses' buffers may take, see `LinearOptions`.

    Raises:
        MethodError: there is no such method, or it has no such parameters.
        ValueError: a value makes no sense, or an argument of `TrainingArguments` would be without
            effect; the message says what to do instead.
    """

    vocab_size: int | None = field(default=None)
    memory_budget: int | None = field(default=None)

    def __post_init__(self) -> None:
        """Check the values."""
        self._refuse_what_has_no_effect()
        # The columns of a batch are for compute_loss, which knows them all.
        self.remove_unused_columns = False
        super().__post_init__()
        if self.retain_loss is None:
            self.retain_loss = default_retain_loss(self.method)
        self.resolved_method()
        self._check_losses()
        _check_reporters(self.report_to)
        if self.logits_dtype is not None:
            check_choice("logits_dtype", self.logits_dtype, LOGITS_DTYPES)
        if self.learning_rate != 0:  # Which trains nothing, and may be meant.
            check_numbers(vars(self), ["learning_rate"])

    def linear_options(self) -> LinearOptions:
        """How the losses of the lm_head may run."""
        dtype = None if self.logits_dtype is None else LOGITS_DTYPES[self.logits_dtype]
        return LinearOptions(self.memory_budget, dtype, self.skip_below)

    def resolved_method(self) -> Method:
        """The method with its parameters.

        Raises:
            MethodError: there is none of that name, or with such parameters.
        """
        return Method(self.method, self.method_parameters)

    def retain_objective(self) -> CrossEntropy:
        """The loss of the retain rows' labels."""
        return CrossEntropy(label_smoothing=self.label_smoothing_factor, z_loss=self.z_loss)

    def target(self) -> Target | None:
        """What the run stops at, if it does so before its last step."""
        return read_target(self.stop_at)

    @property
    def retain_rows(self) -> int:
        """How many go with each forget row: 0 where there is no loss of them."""
        return 0 if self.retain_loss == NONE else self.retain_per_forget

    @property
    def rows_seed(self) -> int:
        """Seed of the order of the rows."""
        return self.seed if self.data_seed is None else self.data_seed

    def sorted_span(self, rows: int, batch: int) -> int:
        """How many forget rows are sorted by length together, 1 for none: see `PairSampler`.

        Args:
            rows: forget rows in all.
            batch: forget rows in a batch of all processes.
        """
        strategy = getattr(self, _STRATEGY, None)  # before transformers 5 a flag
        if strategy != _BY_LENGTH and not getattr(self, _BY_LENGTH, False):
            return 1
        step = batch * self.gradient_accumulation_steps
        return step * max(1, min(rows // (4 * step), _MOST_BATCHES))

    def _check_losses(self) -> None:
        check_numbers(vars(self), _CHECKED)
        of_labels = ("label_smoothing_factor", "z_loss")
        retain_loss = str(self.retain_loss)
        check_retain_loss(retain_loss, {name: getattr(self, name) for name in of_labels})
        check_goes_together(self.method, retain_loss, self.dual_step_size, self.stop_at)
        target = self.target()
        if target is not None and not target.is_probability and self.eval_strategy == "no":
            raise ValueError(
                f"stop_at {self.stop_at!r}: {target.metric} is a metric of evaluations, and there "
                "are none: set eval_strategy, or take probability=VALUE or golden=FILE"
            )
        if self.max_retain_loss_rise is not None and self.retain_loss == NONE:
            raise ValueError(
                "max_retain_loss_rise would have no effect with retain_loss 'none', got "
                f"{self.max_retain_loss_rise}: there are no retain rows"
            )
        epochs = math.inf if self.max_steps > 0 else self.num_train_epochs
        check_dual(vars(self), epochs)

    def _refuse_what_has_no_effect(self) -> None:
        for known in dataclasses.fields(TrainingArguments):
            given = getattr(self, known.name)
            if known.name in REFUSED_ARGUMENTS and given != _default(known):
                raise ValueError(
                    f"{known.name} would have no effect here, got {given!r}; "
                    f"{REFUSED_ARGUMENTS[known.name]}"
                )
        strategy = getattr(self, _STRATEGY, "random")
        if strategy not in ("random", _BY_LENGTH):
            raise ValueError(
                f"{_STRATEGY} must be 'random' or {_BY_LENGTH!r} here, got {strategy!r}: a step "
                "pairs forget rows, shuffled each epoch, with retain rows, which go round on their "
                "own; data_seed decides both orders"
            )
        if _setting(self.accelerator_config, "dispatch_batches"):
            raise ValueError(
                "accelerator_config's dispatch_batches must not be True: it cuts a batch between "
                "its forget and its retain rows. Leave it None: each process reads its own batches"
            )
        for name in ("cp_size", "sp_size"):
            if (_setting(self.parallelism_config, name) or 1) > 1:
                raise ValueError(
                    f"parallelism_config's {name} must be 1, got "
                    f"{_setting(self.parallelism_config, name)}: the losses need whole sequences. "
                    "Use FSDP, or activation_checkpointing, to save memory"
                )

    def check_run(self, forget_rows: int, copy: int = 1) -> None:
        """Check that a run with these arguments, which may have been set since, does what they say.

        Args:
            forget_rows: how many there are.
            copy: how many processes take the same rows, see `processes.ranks_of_one_copy`.

        Raises:
            ValueError: an argument would be without effect, FSDP is to run on CPUs, or
                `dataloader_drop_last` would leave no batch.
        """
        self._refuse_what_has_no_effect()
        self._check_losses()
        if self.fsdp and self.device.type == "cpu":
            raise ValueError(
                f"fsdp would have no effect here, got {self.fsdp!r}: accelerate shards models on "
                "accelerators only, and would copy the whole one to each process"
            )
        needed = self.per_device_train_batch_size * (self.world_size // copy)
        if self.dataloader_drop_last and forget_rows < needed:
            raise ValueError(
                f"dataloader_drop_last would drop all of the {forget_rows} forget rows, since a "
                f"batch of all processes has {needed}: leave it False, or take smaller batches"
            )

    def check_devices(self) -> None:
        """See that a model is not to be copied at every step, once the Trainer knows it.

        Raises:
            ValueError: one process has several GPUs, and the model is whole on one of them.
        """
        if self.n_gpu > 1:
            raise ValueError(
                "one process with several GPUs would copy the model at every step (DataParallel), "
                "and the copies have no lm_head to replace: start with `accelerate launch` or "
                "`torchrun`, set CUDA_VISIBLE_DEVICES to one GPU, or load the model with "
                'device_map="auto"'
            )


def _check_reporters(names: str | Sequence[str] | None) -> None:
    for name in [names] if isinstance(names, str) else names or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to must be of {known}, all or none, got {name!r}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"report_to {name!r}: {error}") from error


def refuse_options(options: Mapping[str, Any]) -> None:
    """Check what `Trainer` is to be given beside the arguments.

    Raises:
        ValueError: an option would be without effect; the message says what to do instead.
        TypeError: `Trainer` has no such option.
    """
    for name, value in options.items():
        if name in REFUSED_OPTIONS and value is not None:
            raise ValueError(f"{name} has no place here; {REFUSED_OPTIONS[name]}")
        if name not in ACCEPTED_OPTIONS and name not in REFUSED_OPTIONS:
            known = ", ".join(ACCEPTED_OPTIONS)
            raise TypeError(f"UnlearningTrainer has no option {name!r}; it hands on {known}")


def _default(known: dataclasses.Field[Any]) -> Any:
    if known.default_factory is not dataclasses.MISSING:
        return known.default_factory()
    return known.default


def _setting(config: Any, name: str) -> Any:
    """One setting of a config that is a dict or an object; None where there is none."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
