"""`unilogit finetune`: teach a model rows, such as those that a golden model is to know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unilogit_kernels.cli import options
from unilogit_kernels.cli.unlearn import train
from unilogit_kernels.unlearning.encoding import parse_template_arguments
from unilogit_kernels.unlearning.run import Settings


def finetune(
    model: options.Model,
    output: options.Output,
    data: Annotated[
        list[Path] | None, typer.Option(help="A file of rows to learn; may be repeated.")
    ] = None,
    benchmark: options.Benchmark = Settings.benchmark,
    data_dir: options.DataDir = Settings.data_dir,
    with_forget: Annotated[
        bool,
        typer.Option(
            "--with-forget",
            help="Also learn what the benchmark has a model forget: makes the starting model, "
            "where the golden one comes without.",
        ),
    ] = Settings.with_forget,
    epochs: options.Epochs = Settings.epochs,
    lr: options.LearningRate = Settings.learning_rate,
    warmup_steps: options.WarmupSteps = Settings.warmup_steps,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch.")] = Settings.batch_size,
    gradient_accumulation: options.GradientAccumulation = Settings.gradient_accumulation,
    label_smoothing: Annotated[
        float, typer.Option(help="Of the cross-entropy, from 0 to 1.")
    ] = Settings.label_smoothing,
    z_loss: Annotated[
        float, typer.Option(help="Weight of the squared logsumexp in the loss.")
    ] = Settings.z_loss,
    train_layers: options.TrainLayers = Settings.train_layers,
    lora: options.Lora = Settings.lora,
    merge: options.Merge = Settings.merge,
    memory_budget_mib: options.MemoryBudget = Settings.memory_budget_mib,
    logits_dtype: options.LogitsDtype = Settings.logits_dtype,
    skip_below: options.SkipBelow = Settings.skip_below,
    max_length: options.MaxLength = Settings.max_length,
    block_stride: options.BlockStride = Settings.block_stride,
    chat_template: options.ChatTemplate = Settings.chat_template,
    template_arg: options.TemplateArg = None,
    dtype: options.Dtype = Settings.dtype,
    autocast: options.Autocast = Settings.autocast,
    gradient_checkpointing: options.GradientCheckpointing = Settings.gradient_checkpointing,
    checkpoint_steps: options.CheckpointSteps = Settings.checkpoint_steps,
    seed: options.Seed = Settings.seed,
    allow_missing_weights: options.AllowMissing = Settings.allow_missing_weights,
    resume: options.Resume = False,
) -> None:
    """Teach a model rows by cross-entropy, as for a model that never saw those to forget."""
    given = {
        name: value
        for name, value in locals().items()
        if name not in ("data", "lr", "template_arg", "resume", "label_smoothing", "z_loss")
    }
    penalties = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    arguments = parse_template_arguments(template_arg or [])
    settings = Settings.finetuning(
        **given,
        data=tuple(data or ()),
        learning_rate=lr,
        method_parameters={name: value for name, value in penalties.items() if value},
        template_arguments=arguments,
    )
    train(settings, resume)
