"""The settings of a run in the Trainer's terms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from unilogit_kernels.unlearning.arguments import UnlearningArguments
from unilogit_kernels.unlearning.processes import on_cpu
from unilogit_kernels.unlearning.settings import (
    OWN_ARGUMENTS,
    ForgettingSettings,
    HeadSettings,
    Settings,
)

_PENALTIES = {"label_smoothing": "label_smoothing_factor", "z_loss": "z_loss"}
"""Parameters of the cross-entropy, and the argument that each is for retain rows."""


def training_arguments(settings: Settings, checkpoints: Path) -> UnlearningArguments:
    """The Trainer's arguments for a run."""
    shared = (*dataclasses.fields(ForgettingSettings), *dataclasses.fields(HeadSettings))
    named = {each.name: each.name for each in shared} | {
        own: name for name, own in OWN_ARGUMENTS.items() if own != "gradient_checkpointing"
    }
    given = {argument: getattr(settings, own) for own, argument in named.items()}
    if settings.task == "finetune":  # What is learned is the method's, and so are its penalties.
        penalties = {name: given.pop(_PENALTIES[name]) for name in _PENALTIES}
        given["method_parameters"] = {name: value for name, value in penalties.items() if value}
    budget = settings.memory_budget_mib
    fixed: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.0,
        "per_device_eval_batch_size": settings.batch_size,
        **_recomputation(settings.gradient_checkpointing),
        "use_cpu": on_cpu(),
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_first_step": True,
        # `StopAtNonFinite` is to see them.
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu(),
        "memory_budget": None if budget is None else budget << 20,
    }
    return UnlearningArguments(**{**fixed, **given, **settings.args})


def _recomputation(wanted: bool) -> dict[str, Any]:
    """To recompute activations in the backward; transformers 5.20 gave it another name."""
    if not wanted:
        return {}
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
