"""One run from files to files: what `unilogit unlearn` and `unilogit finetune` do."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from unilogit_kernels.huggingface.head import observe_logit_transform
from unilogit_kernels.unlearning.adapters import check_no_adapter
from unilogit_kernels.unlearning.data import Encoding, Example, Row, padding_id
from unilogit_kernels.unlearning.errors import RunError, check_writable, reading
from unilogit_kernels.unlearning.guards import Started, StopAtNonFinite
from unilogit_kernels.unlearning.hidden_states import steered_layer
from unilogit_kernels.unlearning.layers import train_only_top_layers
from unilogit_kernels.unlearning.loading import check_fits, encode, load_encoding, load_model
from unilogit_kernels.unlearning.lora import add_lora, merged, save_adapter
from unilogit_kernels.unlearning.methods import RMU
from unilogit_kernels.unlearning.processes import (
    check_launch,
    check_world,
    hearing_all,
    on_cpu,
    together,
)
from unilogit_kernels.unlearning.record import (
    CHECKPOINTS,
    PROCESSES,
    Record,
    digests,
    newest_checkpoint,
    printing_date,
    read_record,
)
from unilogit_kernels.unlearning.settings import Settings
from unilogit_kernels.unlearning.sources import LEARNED, read_sets
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

_RMU_LAYERS = 3
"""How many the paper trains: the one that it steers, and the two below."""

__all__ = ["Prepared", "RunError", "Settings", "execute", "prepare", "training_arguments"]


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs have all been read and found good.

    Attributes:
        settings: of the run.
        arguments: the Trainer's.
        model: loaded, with frozen layers frozen, or with a new adapter.
        encoding: of the rows.
        sets: encoded rows by name: those of `sources.read_sets`.
        rows: how many rows of each set there were before long texts were cut into blocks.
        record: of the run, as it is or will be in the output directory.
        resumed: whether it is there already.
        checkpoint: to resume from, or None.
    """

    settings: Settings
    arguments: UnlearningArguments
    model: nn.Module
    encoding: Encoding
    sets: dict[str, list[Example]]
    rows: dict[str, int]
    record: Record
    resumed: bool
    checkpoint: Path | None

    def truncated(self) -> dict[str, int]:
        """How many rows of each set are cut to `max_length`."""
        return {name: sum(each.truncated for each in rows) for name, rows in self.sets.items()}

    def blocks(self) -> dict[str, int]:
        """How many examples there are of each set in which texts were cut into several."""
        sizes = {name: len(examples) for name, examples in self.sets.items()}
        return {name: size for name, size in sizes.items() if size > self.rows[name]}


def prepare(
    settings: Settings, *, resume: bool = False, note: Callable[[str], None] = print
) -> Prepared:
    """Read and check everything a run needs; nothing is written.

    Where several processes were launched, each calls this, and all fail if one does.

    Args:
        settings: of the run.
        resume: go on from the newest checkpoint in the output directory.
        note: is told what the user should know, such as weights that are missing.

    Raises:
        RunError: settings, model or output directory do not fit.
        DataError: a data file does not.
        UnsupportedHeadError: the model's lm_head does not.
    """
    settings.check()
    check_launch()
    with reading("the Trainer does not take these settings"):
        arguments = training_arguments(settings, settings.output / CHECKPOINTS)
        device = arguments.device
    check_world(arguments.world_size)

    def work() -> Prepared:
        return _prepare(settings, arguments, device, resume, note)

    return together(work)


def _prepare(
    settings: Settings,
    arguments: UnlearningArguments,
    device: torch.device,
    resume: bool,
    note: Callable[[str], None],
) -> Prepared:
    record = _unfinished(settings, resume)
    date = datetime.now().replace(microsecond=0) if record is None else record.date
    rows = read_sets(settings)
    check_no_adapter(settings.model)
    encoding = load_encoding(
        settings.model,
        settings.max_length,
        settings.chat_template,
        settings.template_arguments,
        settings.block_stride,
    )
    sets = _encode(encoding, date, rows)
    model = load_model(
        settings.model,
        settings.dtype,
        device=device,
        allow_missing=settings.allow_missing_weights,
        note=note,
    )
    with reading(f"the model of {settings.model!r} cannot be run"):
        observe_logit_transform(model)
    check_fits(model, encoding, list(sets.values()))
    inputs = digests(model, encoding, sets, arguments.world_size)
    if record is not None:
        record.check(settings.output, "inputs", inputs)
        _keep_steps(arguments, record, note)
    return Prepared(
        settings,
        arguments,
        _trainable(model, settings),
        encoding,
        sets=sets,
        rows={name: len(each) for name, each in rows.items()},
        record=record or Record(settings.recorded(), inputs, date),
        resumed=record is not None,
        checkpoint=newest_checkpoint(settings.output) if record is not None else None,
    )


def _trainable(model: PreTrainedModel, settings: Settings) -> nn.Module:
    """The model with what the settings say left trainable; RMU reaches no layer above its own."""
    if settings.lora is not None:
        adapted = add_lora(model, settings.lora, seed=settings.seed, merge=settings.merge)
        observe_logit_transform(adapted)
        return adapted
    layers, below = settings.train_layers, None
    if settings.method == RMU:
        with reading("method rmu"):
            below = steered_layer(model, settings.method_parameters) + 1
            layers = min(_RMU_LAYERS, below) if layers is None else layers
    with reading("train_layers"):
        if layers is not None:
            train_only_top_layers(model, layers, below=below)
    return model


def _keep_steps(
    arguments: UnlearningArguments, record: Record, note: Callable[[str], None]
) -> None:
    """Have a step take the batches that it took when the run started, in whatever processes."""
    before = arguments.gradient_accumulation_steps
    now = record.accumulation(before, arguments.world_size)
    if now != before:
        note(
            f"the run was started in {record.inputs[PROCESSES]} processes and goes on in "
            f"{arguments.world_size}: gradient accumulation {now} in place of {before} keeps its "
            "steps"
        )
        arguments.gradient_accumulation_steps = now


def _encode(
    encoding: Encoding, date: datetime, rows: Mapping[str, Sequence[Row]]
) -> dict[str, list[Example]]:
    # That an answer ends is no knowledge to forget; unlearning it makes the model run on. A
    # refusal is to be learned, its end included.
    endless = dataclasses.replace(encoding, append_eos=False)
    with printing_date(date, encoding):
        return {
            name: encode(endless if name == "forget" else encoding, each)
            for name, each in rows.items()
        }


def _unfinished(settings: Settings, resume: bool) -> Record | None:
    """The record of the run that is to go on, or None for a new one."""
    output = settings.output
    check_writable(output, folder=True, option="the output")
    record = read_record(output)
    if record is None:
        return None
    if not resume:
        raise RunError(
            f"{output} holds an unfinished run: resume it (--resume), or choose another directory"
        )
    record.check(output, "settings", settings.recorded())
    return record


def execute(prepared: Prepared, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Unlearn, or learn, and write model and tokenizer to the output directory.

    Args:
        prepared: by `prepare`.
        callbacks: for progress bars and the like.

    Returns:
        `steps`, and `log`: what was logged at each step.

    Raises:
        TrainingError: a loss or gradient became NaN or infinite; the newest checkpoint stays.
        LostProcessError: another process ended, or did not answer in time.
        RunError: the output cannot be written, or the checkpoint not read.
    """
    settings = prepared.settings
    started = Started()
    features = {
        name: [example.features() for example in examples]
        for name, examples in prepared.sets.items()
    }
    trainer = UnlearningTrainer(
        prepared.model,
        prepared.arguments,
        # Rows to learn are the method's, which is cross-entropy then.
        forget=features.get("forget") or features[LEARNED],
        retain=features.get("retain", []),
        refusals=features.get("refusal", []),
        pad_id=padding_id(prepared.encoding.tokenizer),
        tokenizer=prepared.encoding.tokenizer,
        callbacks=[started, StopAtNonFinite(settings.output), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)

    def claim() -> None:
        if trainer.is_world_process_zero() and not prepared.resumed:
            with reading(f"{settings.output} cannot be written to"):
                prepared.record.write(settings.output)

    together(claim)
    if prepared.checkpoint is None:
        with hearing_all():
            trainer.train()
    else:
        with started.reading(prepared.checkpoint), hearing_all():
            trainer.train(resume_from_checkpoint=str(prepared.checkpoint))
    with hearing_all():
        if settings.merge and trainer.model is not None:
            trainer.model = merged(trainer.model)
        trainer.save_model(str(settings.output))
        if trainer.is_world_process_zero():
            adapts = settings.lora is not None and not settings.merge
            if adapts and trainer.model is not None and not trainer.is_fsdp_enabled:
                save_adapter(trainer.model, settings.output)
            shutil.rmtree(settings.output / CHECKPOINTS, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    return {"steps": trainer.state.global_step, "log": trainer.state.log_history}


def training_arguments(settings: Settings, checkpoints: Path) -> UnlearningArguments:
    """The Trainer's arguments for a run."""
    budget = settings.memory_budget_mib
    return UnlearningArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        **_recomputation(settings.gradient_checkpointing),
        bf16=settings.autocast,
        use_cpu=on_cpu(),
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_first_step=True,
        # `StopAtNonFinite` is to see them.
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu(),
        seed=settings.seed,
        method=settings.method,
        method_parameters=dict(settings.method_parameters),
        forget_weight=settings.forget_weight,
        retain_loss=settings.retain_loss,
        retain_weight=settings.retain_weight,
        retain_per_forget=settings.retain_per_forget,
        stop_at_probability=settings.stop_at_probability,
        memory_budget=None if budget is None else budget << 20,
        logits_dtype=settings.logits_dtype,
        skip_below=settings.skip_below,
        label_smoothing_factor=settings.label_smoothing,
        z_loss=settings.z_loss,
        dual_step_size=settings.dual_step_size,
        retain_loss_target=settings.retain_loss_target,
        dual_update=settings.dual_update,
        dual_warmup_epochs=settings.dual_warmup_epochs,
    )


def _recomputation(wanted: bool) -> dict[str, Any]:
    """To recompute activations in the backward; transformers 5.20 gave it another name."""
    if not wanted:
        return {}
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
