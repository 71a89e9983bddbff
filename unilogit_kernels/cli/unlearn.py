"""`unilogit unlearn`: what it takes, prints and exits with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unilogit_kernels.cli import options
from unilogit_kernels.cli.console import note, say
from unilogit_kernels.cli.progress import Bar, progress_bar, quieten_libraries
from unilogit_kernels.unlearning.encoding import parse_template_arguments
from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.run import Settings, execute, prepare

_INTERRUPTED = 130
_METHOD_PARAMETERS = ("alpha", "beta", "beta1", "beta2", "gamma", "delta")
"""Those with an option of their own; `--method-parameter` takes every one."""


def unlearn(
    model: options.Model,
    output: options.Output,
    forget: Annotated[Path | None, typer.Option(help="File of the rows to forget.")] = None,
    retain: Annotated[
        Path | None, typer.Option(help="File of the rows to keep; none with --retain-loss none.")
    ] = None,
    benchmark: options.Benchmark = Settings.benchmark,
    data_dir: options.DataDir = Settings.data_dir,
    method: Annotated[str, typer.Option(help="Loss of the forget rows.")] = Settings.method,
    alpha: Annotated[float | None, typer.Option(help="Parameter of wga, tnpo.")] = None,
    beta: Annotated[float | None, typer.Option(help="Parameter of npo, dpo, tnpo...")] = None,
    beta1: Annotated[float | None, typer.Option(help="Parameter of satimp.")] = None,
    beta2: Annotated[float | None, typer.Option(help="Parameter of satimp.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Parameter of undial, self_undial.")] = None,
    delta: Annotated[float | None, typer.Option(help="Parameter of simnpo.")] = None,
    method_parameter: Annotated[
        list[str] | None,
        typer.Option(help="Any parameter of the method, as NAME=NUMBER; may be repeated."),
    ] = None,
    refusals: Annotated[
        Path | None,
        typer.Option(help="Answers to give instead, one a line, for idk_dpo, dpo and flat."),
    ] = Settings.refusals,
    epochs: Annotated[int, typer.Option(help="Passes over the forget rows.")] = Settings.epochs,
    lr: options.LearningRate = Settings.learning_rate,
    warmup_steps: options.WarmupSteps = Settings.warmup_steps,
    batch_size: Annotated[
        int, typer.Option(help="Forget rows in a batch; retain rows come on top.")
    ] = Settings.batch_size,
    gradient_accumulation: options.GradientAccumulation = Settings.gradient_accumulation,
    retain_per_forget: Annotated[
        int, typer.Option(help="Retain rows for each forget row.")
    ] = Settings.retain_per_forget,
    forget_weight: Annotated[
        float, typer.Option(help="Factor of the forget loss.")
    ] = Settings.forget_weight,
    retain_loss: Annotated[
        str | None,
        typer.Option(
            help="Loss of the retain rows: cross_entropy, kl to the model, hidden_states (of rmu), "
            "or none. Default: the method's."
        ),
    ] = Settings.retain_loss,
    retain_weight: Annotated[
        float, typer.Option(help="Factor of the retain rows' loss.")
    ] = Settings.retain_weight,
    label_smoothing: Annotated[
        float, typer.Option(help="Of the retain rows' cross-entropy, from 0 to 1.")
    ] = Settings.label_smoothing,
    z_loss: Annotated[
        float, typer.Option(help="Weight of the squared logsumexp in the retain rows' loss.")
    ] = Settings.z_loss,
    dual_step_size: Annotated[
        float, typer.Option(help="Of a retain weight that follows the retain loss, as in PDU.")
    ] = Settings.dual_step_size,
    retain_loss_target: Annotated[
        float, typer.Option(help="Retain loss at which such a weight stays as it is.")
    ] = Settings.retain_loss_target,
    dual_update: Annotated[
        str, typer.Option(help="When such a weight is updated: step or epoch.")
    ] = Settings.dual_update,
    dual_warmup_epochs: Annotated[
        int, typer.Option(help="Epochs before such a weight is updated.")
    ] = Settings.dual_warmup_epochs,
    stop_at_probability: Annotated[
        float | None,
        typer.Option(help="Stop once the mean probability of a forget token is this low."),
    ] = Settings.stop_at_probability,
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
    """Make a model forget some rows and keep the others.

    The paper's recipe (arXiv 2505.06027) is what runs without further
    options: --method unilogit on the forget rows, which takes neither a
    reference model nor a parameter, beside cross-entropy on as many retain
    rows. What is left to choose:

    unilogit unlearn --model DIR --forget F.jsonl --retain R.jsonl
    --output OUT --lr 1e-5 --epochs 5 --forget-weight 0.1
    --stop-at-probability 0.05

    Its ablations are --method unilogit_forward and unilogit_starting_model;
    it is compared with gradient_ascent, npo and undial. All others:
    unilogit methods. The paper's code divides the forget loss by tokens x
    vocabulary, this one by tokens, so its weights do not carry over.
    """
    given = dict(locals())
    of_method = {name: given.pop(name) for name in _METHOD_PARAMETERS}
    arguments = parse_template_arguments(given.pop("template_arg") or [])
    parameters = _parameters(of_method, given.pop("method_parameter") or [])
    settings = Settings(
        **{name: value for name, value in given.items() if name not in ("lr", "resume")},
        learning_rate=lr,
        template_arguments=arguments,
        method_parameters=parameters,
    )
    train(settings, resume)


def _parameters(options: dict[str, float | None], given: list[str]) -> dict[str, float]:
    """A method's, from the options that some of them have, and from `NAME=NUMBER`."""
    found = {name: value for name, value in options.items() if value is not None}
    for item in given:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise RunError(f"--method-parameter takes NAME=NUMBER, got {item!r}")
        if name in found:
            raise RunError(f"--method-parameter {item!r}: {name} is given twice")
        try:
            found[name] = float(value)
        except ValueError:
            raise RunError(f"--method-parameter takes NAME=NUMBER, got {item!r}") from None
    return found


def train(settings: Settings, resume: bool) -> None:
    """Prepare a run, take its steps, and say what was done.

    Args:
        settings: of the run.
        resume: go on from the newest checkpoint in the output directory.

    Raises:
        typer.Exit: it was interrupted.
    """
    quieten_libraries()
    prepared = prepare(settings, resume=resume, note=note)
    for name, count in prepared.truncated().items():
        if count:
            note(f"{count} {name} rows are cut to {settings.max_length} tokens")
    for name, count in prepared.blocks().items():
        note(f"long {name} texts are cut into blocks of {settings.max_length} tokens, {count} rows")
    template = "through the chat template" if prepared.encoding.uses_chat_template else "as it is"
    sizes = {name: len(examples) for name, examples in prepared.sets.items()}
    what = (
        f"{sizes['forget']} rows to forget, {sizes['retain']} to keep"
        if settings.task == "unlearn"
        else f"{sum(sizes.values())} rows to learn"
    )
    say(f"{what}; each prompt goes {template}")
    if prepared.checkpoint is not None:
        say(f"resuming from {prepared.checkpoint}")
    elif resume:
        say(f"there is no checkpoint to resume from in {settings.output}: starting anew")
    try:
        with progress_bar(settings.task) as progress:
            done = execute(prepared, [Bar(progress, settings.task)])
    except KeyboardInterrupt:
        say("interrupted; the same command with --resume goes on", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    say(f"{done['steps']} steps; the model is in {settings.output}")
