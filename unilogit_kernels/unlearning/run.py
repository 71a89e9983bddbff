"""One run from files to files: what `unilogit unlearn` and `unilogit finetune` do."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)

from unilogit_kernels.huggingface.head import observe_logit_transform
from unilogit_kernels.unlearning.adapters import check_no_adapter
from unilogit_kernels.unlearning.checks import check_settings
from unilogit_kernels.unlearning.config import FILE as SETTINGS_FILE
from unilogit_kernels.unlearning.config import as_yaml
from unilogit_kernels.unlearning.data import IGNORED, Encoding, Example, Row, padding_id
from unilogit_kernels.unlearning.errors import RunError, check_writable, reading
from unilogit_kernels.unlearning.evaluation import SetReport
from unilogit_kernels.unlearning.guards import Started, StopAtNonFinite
from unilogit_kernels.unlearning.hidden_states import steered_layer
from unilogit_kernels.unlearning.layers import train_only_top_layers
from unilogit_kernels.unlearning.loading import (
    DTYPES,
    check_fits,
    encode,
    load_encoding,
    load_model,
)
from unilogit_kernels.unlearning.lora import add_lora, merged, save_adapter
from unilogit_kernels.unlearning.methods import RMU
from unilogit_kernels.unlearning.outcome import Outcome, check_known, measure_sets, sentence_of
from unilogit_kernels.unlearning.processes import (
    check_launch,
    check_world,
    hearing_all,
    together,
)
from unilogit_kernels.unlearning.record import (
    CHECKPOINTS,
    PROCESSES,
    Record,
    digests,
    file_digest,
    newest_checkpoint,
    printing_date,
    read_record,
)
from unilogit_kernels.unlearning.settings import Settings
from unilogit_kernels.unlearning.sources import LEARNED, read_sets
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer
from unilogit_kernels.unlearning.translation import training_arguments

_RMU_LAYERS = 3
"""How many the paper trains: the one that it steers, and the two below."""

__all__ = ["Prepared", "RunError", "Settings", "execute", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs have all been read and found good.

    Attributes:
        settings: of the run.
        arguments: the Trainer's.
        model: loaded, with frozen layers frozen, or with a new adapter.
        encoding: of the rows.
        sets: encoded rows by name: those of `sources.read_sets`.
        rows: as they were read, before long texts were cut into blocks.
        record: of the run, as it is or will be in the output directory.
        resumed: whether it is there already.
        checkpoint: to resume from, or None.
    """

    settings: Settings
    arguments: UnlearningArguments
    model: nn.Module
    encoding: Encoding
    sets: dict[str, list[Example]]
    rows: dict[str, list[Row]]
    record: Record
    resumed: bool
    checkpoint: Path | None

    def truncated(self) -> dict[str, int]:
        """How many rows of each set are cut to `max_length`."""
        return {name: sum(each.truncated for each in rows) for name, rows in self.sets.items()}

    def blocks(self) -> dict[str, int]:
        """How many examples there are of each set in which texts were cut into several."""
        sizes = {name: len(examples) for name, examples in self.sets.items()}
        return {name: size for name, size in sizes.items() if size > len(self.rows[name])}


class Done(NamedTuple):
    """What a run did.

    Attributes:
        steps: that were taken.
        log: what was logged at each.
        ended: why it ended before its last step, or None.
        outcome: both sets before and after; None where they were not measured.
    """

    steps: int
    log: list[dict[str, float]]
    ended: str | None
    outcome: Outcome | None


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
    target = arguments.target()
    if target is not None and target.file is not None:
        inputs["golden results"] = file_digest(target.file)
    if record is not None:
        record.check(settings.output, "inputs", inputs)
        _keep_steps(arguments, record, note)
    return Prepared(
        settings,
        arguments,
        _trainable(model, settings),
        encoding,
        sets=sets,
        rows=rows,
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


def execute(prepared: Prepared, callbacks: Sequence[TrainerCallback] = ()) -> Done:
    """Unlearn, or learn, and write model and tokenizer to the output directory.

    Args:
        prepared: by `prepare`.
        callbacks: for progress bars and the like.

    Returns:
        What was done, and what came of it.

    Raises:
        TrainingError: a loss or gradient became NaN or infinite; the newest checkpoint stays.
        LostProcessError: another process ended, or did not answer in time.
        RunError: the output cannot be written, or the checkpoint not read.
    """
    settings, arguments = prepared.settings, prepared.arguments
    before = _measured(prepared, prepared.model, generate=True)
    problem = check_known(before, arguments.target())
    if problem is not None:
        raise RunError(problem)
    started = Started()
    with reading("push_to_hub") if arguments.push_to_hub else nullcontext():
        trainer = _trainer(prepared, [started, StopAtNonFinite(settings.output), *callbacks])
    trainer.remove_callback(PrinterCallback)
    if settings.save_dtype is not None and _is_sharded(trainer):
        raise RunError(
            f"save_dtype {settings.save_dtype!r}: a sharded model is written as it is trained; "
            "cast what is written"
        )

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
    if settings.save_dtype is not None and trainer.model is not None:
        trainer.model.to(DTYPES[settings.save_dtype])
    ended = trainer.watch.reason
    outcome = None
    if before:
        after = _after(prepared, trainer)
        told = ended if trainer.watch.damaged else None
        sentence = sentence_of(before, after, arguments.target(), told)
        outcome = Outcome(before, after, sentence, trainer.state.global_step, ended)
    with hearing_all():
        if settings.merge and trainer.model is not None:
            trainer.model = merged(trainer.model)
        trainer.save_model(str(settings.output))
        if outcome is not None and trainer.is_world_process_zero():
            outcome.write(settings.output)
        if trainer.is_world_process_zero():
            adapts = settings.lora is not None and not settings.merge
            if adapts and trainer.model is not None and not trainer.is_fsdp_enabled:
                save_adapter(trainer.model, settings.output)
            shutil.rmtree(settings.output / CHECKPOINTS, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    state = trainer.state
    return Done(state.global_step, list(state.log_history), ended, outcome)


def _trainer(prepared: Prepared, callbacks: list[TrainerCallback]) -> UnlearningTrainer:
    features = {
        name: [example.features() for example in examples]
        for name, examples in prepared.sets.items()
    }
    encoding = prepared.encoding
    evaluated: dict[str, Any] = {}
    if prepared.arguments.eval_strategy != "no":
        evaluated = {
            "eval_dataset": {name: rows for name, rows in features.items() if rows},
            "compute_metrics": _probability,
        }
    # What is looked at is what `unilogit evaluate` looks at: answers with their ends.
    whole = encode(encoding, prepared.rows["forget"]) if "forget" in features else ()
    return UnlearningTrainer(
        prepared.model,
        prepared.arguments,
        # Rows to learn are the method's, which is cross-entropy then.
        forget=features.get("forget") or features[LEARNED],
        retain=features.get("retain", []),
        refusals=features.get("refusal", []),
        pad_id=padding_id(encoding.tokenizer),
        tokenizer=encoding.tokenizer,
        check_rows={"forget": [example.features() for example in whole]} if whole else {},
        callbacks=callbacks,
        **evaluated,
    )


def _probability(prediction: EvalPrediction) -> dict[str, float]:
    """Of the labels of each row, the geometric mean; the mean of that over the rows."""
    labels, log_p = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    counts = (labels[:, 1:] != IGNORED).sum(1)
    means = log_p.sum(1, dtype="float64")[counts > 0] / counts[counts > 0]
    return {"probability": float(np.exp(means).mean())}


def _measured(prepared: Prepared, model: nn.Module, *, generate: bool) -> dict[str, SetReport]:
    settings = prepared.settings
    if settings.task != "unlearn":
        return {}
    with printing_date(prepared.record.date, prepared.encoding):
        return measure_sets(
            model,
            prepared.rows,
            prepared.encoding,
            most=settings.report_rows,
            batch_size=settings.batch_size,
            generate=generate,
        )


def _is_sharded(trainer: UnlearningTrainer) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _after(prepared: Prepared, trainer: UnlearningTrainer) -> dict[str, SetReport]:
    """The sets under the model as it is now; a sharded one answers no prompts."""
    model = trainer.model
    if not _is_sharded(trainer) and model is not None:
        return _measured(prepared, model, generate=True)
    with trainer.evaluating_as_in_training() as wrapped:
        return _measured(prepared, wrapped, generate=False)
