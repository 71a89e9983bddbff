"""One unlearning run from files to files: what `unilogit unlearn` does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from unilogit_kernels.huggingface.head import observe_logit_transform
from unilogit_kernels.unlearning.data import (
    Encoding,
    Example,
    padding_id,
    read_refusals,
    read_rows,
)
from unilogit_kernels.unlearning.methods import RETAIN_LOSSES, Method, MethodError
from unilogit_kernels.unlearning.trainer import (
    UnlearningArguments,
    UnlearningTrainer,
    train_only_top_layers,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes the weights may be trained in."""

_SETTINGS_FILE = "unlearning.json"
_CHECKPOINTS = "checkpoints"


class RunError(ValueError):
    """A run cannot start as it was asked for."""


@dataclass(frozen=True)
class Settings:
    """What is unlearned from what, and how.

    Attributes:
        model: directory or Hub id of a causal LM.
        forget: JSONL file of the rows to forget.
        retain: JSONL file of the rows to keep.
        output: directory for the model; checkpoints lie there until the run is done.
        method: loss of the forget rows, a name from `methods.method_names()`.
        method_parameters: the method's float parameters, where they differ from its defaults.
        refusals: text file of what to say instead, one a line, for methods that take them; forget
            rows take them in turn.
        epochs: passes over the forget rows.
        learning_rate: of AdamW, constant after the warm-up.
        warmup_steps: steps over which the learning rate rises to it.
        batch_size: forget rows in a batch; the retain rows come on top.
        gradient_accumulation: batches in a step.
        retain_per_forget: retain rows for each forget row.
        forget_weight: factor of the forget loss.
        retain_loss: of the retain rows: `"cross_entropy"` or `"kl"`, see `UnlearningArguments`.
        retain_weight: factor of that loss.
        stop_at_probability: stop at this mean probability of a forget token, or None.
        train_layers: train only so many of the top layers, or None for all parameters.
        max_length: rows are cut after so many tokens.
        chat_template: see `Encoding`.
        template_arguments: see `Encoding`.
        dtype: of the weights, a key of `DTYPES`.
        autocast: compute in bfloat16 whatever the weights' dtype.
        gradient_checkpointing: recompute activations in the backward to save memory.
        checkpoint_steps: steps between checkpoints.
        seed: of the order of the rows, and of dropout.
    """

    model: str
    forget: Path
    retain: Path
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
    retain_loss: str = "cross_entropy"
    retain_weight: float = 1.0
    stop_at_probability: float | None = None
    train_layers: int | None = None
    max_length: int = 512
    chat_template: bool | None = None
    template_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    autocast: bool = False
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 50
    seed: int = 0

    def recorded(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "output"}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs have all been read and found good.

    Attributes:
        settings: of the run.
        model: loaded, with frozen layers frozen.
        encoding: of the rows.
        forget: encoded rows to forget.
        retain: encoded rows to keep.
        refusals: encoded answers to give instead, one for each row to forget, or none.
        checkpoint: to resume from, or None.
    """

    settings: Settings
    model: PreTrainedModel
    encoding: Encoding
    forget: list[Example]
    retain: list[Example]
    refusals: list[Example]
    checkpoint: Path | None

    def truncated(self) -> dict[str, int]:
        """How many rows of each set are longer than `max_length`."""
        return {
            "forget": sum(example.truncated for example in self.forget),
            "retain": sum(example.truncated for example in self.retain),
        }


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        RunError: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"no tokenizer could be loaded from {model!r}: {error}") from error
    return tokenizer


def load_model(model: str, dtype: str) -> PreTrainedModel:
    """A causal LM, on the accelerator where there is one.

    Args:
        model: directory or Hub id.
        dtype: a key of `DTYPES`.

    Raises:
        RunError: it cannot be loaded, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise RunError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"no causal LM could be loaded from {model!r}: {error}") from error
    accelerator = torch.accelerator.current_accelerator()
    return loaded if accelerator is None else loaded.to(accelerator)  # type: ignore[arg-type]


def prepare(settings: Settings, *, resume: bool = False) -> Prepared:
    """Read and check everything a run needs; nothing is written.

    Args:
        settings: of the run.
        resume: go on from the newest checkpoint in the output directory.

    Raises:
        RunError: settings, model or output directory do not fit.
        DataError: a data file does not.
        UnsupportedHeadError: the model's lm_head does not.
    """
    _check(settings)
    checkpoint = _find_checkpoint(settings, resume)
    rows = read_rows(settings.forget), read_rows(settings.retain)
    refusals = [] if settings.refusals is None else read_refusals(settings.refusals, rows[0])
    encoding = Encoding(
        load_tokenizer(settings.model),
        settings.max_length,
        settings.chat_template,
        template_arguments=settings.template_arguments,
    )
    if settings.chat_template and encoding.tokenizer.chat_template is None:
        raise RunError(f"the tokenizer of {settings.model!r} has no chat template")
    # That an answer ends is no knowledge to forget; unlearning it makes the model run on.
    forget = dataclasses.replace(encoding, append_eos=False).encode(rows[0])
    retain = encoding.encode(rows[1])
    # A refusal is to be learned, its end included.
    instead = encoding.encode(refusals)
    model = load_model(settings.model, settings.dtype)
    observe_logit_transform(model)
    if settings.train_layers is not None:
        try:
            train_only_top_layers(model, settings.train_layers)
        except ValueError as error:
            raise RunError(str(error)) from error
    return Prepared(settings, model, encoding, forget, retain, instead, checkpoint)


def _check(settings: Settings) -> None:
    try:
        method = Method(settings.method, settings.method_parameters)
    except MethodError as error:
        raise RunError(str(error)) from error
    if settings.retain_loss not in RETAIN_LOSSES:
        known = ", ".join(RETAIN_LOSSES)
        raise RunError(f"retain_loss must be one of {known}, got {settings.retain_loss!r}")
    if method.needs_refusals and settings.refusals is None:
        raise RunError(f"method {method.name!r} needs refusals: a text file with one a line")
    if settings.refusals is not None and not method.needs_refusals:
        raise RunError(f"method {method.name!r} takes no refusals")
    for name in (
        "epochs",
        "batch_size",
        "gradient_accumulation",
        "retain_per_forget",
        "checkpoint_steps",
    ):
        if getattr(settings, name) < 1:
            raise RunError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if settings.learning_rate <= 0:
        raise RunError(f"learning_rate must be positive, got {settings.learning_rate}")
    probability = settings.stop_at_probability
    if probability is not None and not 0 < probability < 1:
        raise RunError(f"stop_at_probability must be between 0 and 1, got {probability}")


def _find_checkpoint(settings: Settings, resume: bool) -> Path | None:
    output = settings.output
    if output.exists() and not output.is_dir():
        raise RunError(f"{output} is not a directory")
    if (output / "config.json").exists():
        raise RunError(f"{output} already holds a model; choose another output directory")
    record = output / _SETTINGS_FILE
    if not record.exists():
        return None
    if not resume:
        raise RunError(
            f"{output} holds an unfinished run: resume it (--resume), or choose another directory"
        )
    before, now = json.loads(record.read_text()), settings.recorded()
    changed = [name for name in now if now[name] != before.get(name)]
    if changed:
        details = ", ".join(f"{name} ({before.get(name)} -> {now[name]})" for name in changed)
        raise RunError(f"the run in {output} was started with other settings: {details}")
    # The Trainer writes its state last, so a checkpoint without it was cut short.
    finished = [
        path.parent for path in (output / _CHECKPOINTS).glob("checkpoint-*/trainer_state.json")
    ]
    return max(finished, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def execute(prepared: Prepared, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Unlearn, and write model and tokenizer to the output directory.

    Args:
        prepared: by `prepare`.
        callbacks: for progress bars and the like.

    Returns:
        `steps`, and `log`: what was logged at each step.
    """
    settings = prepared.settings
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / _SETTINGS_FILE).write_text(json.dumps(settings.recorded(), indent=2))
    checkpoints = settings.output / _CHECKPOINTS
    trainer = UnlearningTrainer(
        prepared.model,
        training_arguments(settings, checkpoints),
        forget=[example.features() for example in prepared.forget],
        retain=[example.features() for example in prepared.retain],
        refusals=[example.features() for example in prepared.refusals],
        pad_id=padding_id(prepared.encoding.tokenizer),
        tokenizer=prepared.encoding.tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(
        resume_from_checkpoint=None if prepared.checkpoint is None else str(prepared.checkpoint)
    )
    trainer.save_model(str(settings.output))
    if trainer.is_world_process_zero():
        shutil.rmtree(checkpoints, ignore_errors=True)
    return {"steps": trainer.state.global_step, "log": trainer.state.log_history}


def training_arguments(settings: Settings, checkpoints: Path) -> UnlearningArguments:
    """The Trainer's arguments for a run."""
    return UnlearningArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=settings.autocast,
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=settings.seed,
        method=settings.method,
        method_parameters=dict(settings.method_parameters),
        forget_weight=settings.forget_weight,
        retain_loss=settings.retain_loss,
        retain_weight=settings.retain_weight,
        retain_per_forget=settings.retain_per_forget,
        stop_at_probability=settings.stop_at_probability,
    )
