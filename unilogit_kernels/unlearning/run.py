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
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from unilogit_kernels.huggingface.head import observe_logit_transform
from unilogit_kernels.unlearning.adapters import check_no_adapter
from unilogit_kernels.unlearning.checks import check_settings
from unilogit_kernels.unlearning.config import FILE as SETTINGS_FILE
from unilogit_kernels.unlearning.config import as_yaml
from unilogit_kernels.unlearning.data import Encoding, Example, Row, padding_id
from unilogit_kernels.unlearning.errors import RunError, check_writable, reading
from unilogit_kernels.unlearning.guards import Started, StopAtNonFinite
from unilogit_kernels.unlearning.hidden_states import steered_layer
from unilogit_kernels.unlearning.layers import train_only_top_layers
from unilogit_kernels.unlearning.loading import check_fits, encode, load_encoding, load_model
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
from unilogit_kernels.unlearning.settings import (
    OWN_ARGUMENTS,
    ForgettingSettings,
    HeadSettings,
    Settings,
)
from unilogit_kernels.unlearning.sources import LEARNED, read_sets
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

_RMU_LAYERS = 3
"""How many the paper trains: the one that it steers, and the two below."""

_PENALTIES = {"label_smoothing": "label_smoothing_factor", "z_loss": "z_loss"}
"""Parameters of the cross-entropy, and the argument that each is for retain rows."""

__all__ = ["Prepared", "RunError", "Settings", "execute", "prepare", "training_arguments"]


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs have all been read and found good.

    Attributes:
        settings: of the run.
        arguments: the Trainer's.
        model: loaded, with frozen layers frozen.
        encoding: of the rows.
        sets: encoded rows by name: those of `sources.read_sets`.
        rows: how many rows of each set there were before long texts were cut into blocks.
        record: of the run, as it is or will be in the output directory.
        resumed: whether it is there already.
        checkpoint: to resume from, or None.
    """

    settings: Settings
    arguments: UnlearningArguments
    model: PreTrainedModel
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
    check_settings(settings)
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
    _freeze(model, settings)
    return Prepared(
        settings,
        arguments,
        model,
        encoding,
        sets=sets,
        rows={name: len(each) for name, each in rows.items()},
        record=record or Record(settings.recorded(), inputs, date),
        resumed=record is not None,
        checkpoint=newest_checkpoint(settings.output) if record is not None else None,
    )


def _freeze(model: PreTrainedModel, settings: Settings) -> None:
    """Leave trainable what the settings say; RMU reaches no layer above the one that it steers."""
    layers, below = settings.train_layers, None
    if settings.method == RMU:
        with reading("method rmu"):
            below = steered_layer(model, settings.method_parameters) + 1
            layers = min(_RMU_LAYERS, below) if layers is None else layers
    with reading("train_layers"):
        if layers is not None:
            train_only_top_layers(model, layers, below=below)


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
                (settings.output / SETTINGS_FILE).write_text(as_yaml(settings), encoding="utf-8")

    together(claim)
    if prepared.checkpoint is None:
        with hearing_all():
            trainer.train()
    else:
        with started.reading(prepared.checkpoint), hearing_all():
            trainer.train(resume_from_checkpoint=str(prepared.checkpoint))
    with hearing_all():
        trainer.save_model(str(settings.output))
        if trainer.is_world_process_zero():
            shutil.rmtree(settings.output / CHECKPOINTS, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    return {"steps": trainer.state.global_step, "log": trainer.state.log_history}


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
