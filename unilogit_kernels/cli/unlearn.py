"""The commands of `unilogit`: what they take, print and exit with."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel

from unilogit_kernels.cli.doctor import main as diagnose
from unilogit_kernels.cli.progress import Bar, progress_bar, quieten_libraries
from unilogit_kernels.unlearning.data import Row, read_rows
from unilogit_kernels.unlearning.encoding import Encoding, parse_template_arguments
from unilogit_kernels.unlearning.errors import (
    INPUT_ERRORS,
    LostProcessError,
    RunError,
    TrainingError,
    check_writable,
    one_line,
    reading,
)
from unilogit_kernels.unlearning.evaluation import evaluate_rows, report_table
from unilogit_kernels.unlearning.limits import check_numbers
from unilogit_kernels.unlearning.loading import check_fits, encode, load_encoding, load_model
from unilogit_kernels.unlearning.processes import (
    check_alone,
    is_first,
    join,
    tells,
    together,
    voice,
)
from unilogit_kernels.unlearning.run import Settings, execute, prepare

app = typer.Typer(
    name="unilogit",
    help="Fused, memory-flat unlearning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_FAILED, _WRONG_INPUT, _INTERRUPTED = 1, 2, 130
_DEBUG = "UNILOGIT_DEBUG"
"""The environment variable that asks for tracebacks."""
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""What typer reports itself: click's ClickException, or typer's own copy of it."""
_METHOD_PARAMETERS = ("alpha", "beta", "beta1", "beta2", "gamma", "delta")
"""Those with an option of their own; `--method-parameter` takes every one."""


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn every error of a command into one line and an exit code.

    What is wrong with what the user gave exits with 2; what went wrong on the way, or in this
    package, with 1. `UNILOGIT_DEBUG=1` adds the traceback.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, _USAGE_ERROR, KeyboardInterrupt):
        raise
    except INPUT_ERRORS as error:
        _report(error, str(error), _WRONG_INPUT)
    except (TrainingError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        _report(error, one_line(error), _FAILED)
    except Exception as error:
        hint = f"this should not happen; {_DEBUG}=1 shows the traceback"
        _report(error, f"{type(error).__name__}: {one_line(error)} ({hint})", _FAILED)


def _report(error: Exception, message: str, code: int) -> None:
    if tells(error):
        speaker = "" if is_first() and not isinstance(error, LostProcessError) else voice()
        _print(f"error: {speaker}{' '.join(message.splitlines())}", err=True)
    if os.environ.get(_DEBUG, "0") != "0":
        traceback.print_exception(error)
    raise typer.Exit(code) from error


def _say(message: str, err: bool = False) -> None:
    """Print a line in the first process."""
    if is_first():
        _print(message, err)


def _print(message: str, err: bool) -> None:
    """Print a line; what the terminal's encoding lacks is escaped."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    typer.echo(message.encode(encoding, "backslashreplace").decode(encoding), err=err)


def _note(message: str) -> None:
    _say(f"note: {message}", err=True)


_MaxLength = Annotated[int, typer.Option(help="Rows are cut after so many tokens.")]
_ChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Put prompts through the tokenizer's chat template. Default: if it has one.",
    ),
]
_TemplateArg = Annotated[
    list[str] | None,
    typer.Option(help="An argument of the chat template, as NAME=VALUE; may be repeated."),
]
_Dtype = Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")]
_AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing-weights",
        help="Take a model whose files lack weights, which are then random, or have others.",
    ),
]


@app.command()
def unlearn(
    model: Annotated[str, typer.Option(help="Directory or Hub id of a causal LM.")],
    forget: Annotated[Path, typer.Option(help="JSONL rows to forget.")],
    retain: Annotated[Path, typer.Option(help="JSONL rows to keep.")],
    output: Annotated[Path, typer.Option(help="Directory for the model.")],
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
    lr: Annotated[
        float, typer.Option(help="Learning rate, constant after the warm-up.")
    ] = Settings.learning_rate,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps over which the learning rate rises.")
    ] = Settings.warmup_steps,
    batch_size: Annotated[
        int, typer.Option(help="Forget rows in a batch; retain rows come on top.")
    ] = Settings.batch_size,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Batches in a step.")
    ] = Settings.gradient_accumulation,
    retain_per_forget: Annotated[
        int, typer.Option(help="Retain rows for each forget row.")
    ] = Settings.retain_per_forget,
    forget_weight: Annotated[
        float, typer.Option(help="Factor of the forget loss.")
    ] = Settings.forget_weight,
    retain_loss: Annotated[
        str, typer.Option(help="Loss of the retain rows: cross_entropy, or kl to the model.")
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
    train_layers: Annotated[
        int | None, typer.Option(help="Train only so many of the top layers.")
    ] = Settings.train_layers,
    memory_budget_mib: Annotated[
        int | None, typer.Option(help="MiB that the losses' buffers may take.")
    ] = Settings.memory_budget_mib,
    logits_dtype: Annotated[
        str | None, typer.Option(help="What logits are rounded to: float32, bfloat16 or float16.")
    ] = Settings.logits_dtype,
    skip_below: Annotated[
        float, typer.Option(help="Tokens of a smaller share of the largest slope get no gradient.")
    ] = Settings.skip_below,
    max_length: _MaxLength = Settings.max_length,
    chat_template: _ChatTemplate = Settings.chat_template,
    template_arg: _TemplateArg = None,
    dtype: _Dtype = Settings.dtype,
    autocast: Annotated[
        bool, typer.Option("--autocast", help="Compute in bfloat16, whatever the weights are.")
    ] = Settings.autocast,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations, save memory.")
    ] = Settings.gradient_checkpointing,
    checkpoint_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints.")
    ] = Settings.checkpoint_steps,
    seed: Annotated[int, typer.Option(help="Of the order of the rows.")] = Settings.seed,
    allow_missing_weights: _AllowMissing = Settings.allow_missing_weights,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")
    ] = False,
) -> None:
    """Make a model forget some rows and keep the others."""
    given = dict(locals())
    options = {name: given.pop(name) for name in _METHOD_PARAMETERS}
    with reporting_errors():
        arguments = parse_template_arguments(given.pop("template_arg") or [])
        parameters = _parameters(options, given.pop("method_parameter") or [])
    settings = Settings(
        **{name: value for name, value in given.items() if name not in ("lr", "resume")},
        learning_rate=lr,
        template_arguments=arguments,
        method_parameters=parameters,
    )
    with reporting_errors():
        _unlearn(settings, resume)


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


def _unlearn(settings: Settings, resume: bool) -> None:
    quieten_libraries()
    prepared = prepare(settings, resume=resume, note=_note)
    for name, count in prepared.truncated().items():
        if count:
            _note(f"{count} {name} rows are cut to {settings.max_length} tokens")
    template = "through the chat template" if prepared.encoding.uses_chat_template else "as it is"
    _say(
        f"{len(prepared.forget)} rows to forget, {len(prepared.retain)} to keep; each prompt goes "
        f"{template}"
    )
    if prepared.checkpoint is not None:
        _say(f"resuming from {prepared.checkpoint}")
    elif resume:
        _say(f"there is no checkpoint to resume from in {settings.output}: starting anew")
    try:
        with progress_bar() as progress:
            done = execute(prepared, [Bar(progress)])
    except KeyboardInterrupt:
        _say("interrupted; the same command with --resume goes on", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    _say(f"{done['steps']} steps; the model is in {settings.output}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Directory or Hub id of a causal LM.")],
    data: Annotated[
        list[str], typer.Option(help="A set of JSONL rows, as NAME=FILE; may be repeated.")
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure and answer to this file.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in one forward.")] = 16,
    max_length: _MaxLength = Settings.max_length,
    chat_template: _ChatTemplate = Settings.chat_template,
    template_arg: _TemplateArg = None,
    dtype: _Dtype = Settings.dtype,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Also answer the prompts greedily.")
    ] = True,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends an answer, \\n a line feed in it; may be repeated."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer. Default: a few more than expected.")
    ] = None,
    allow_missing_weights: _AllowMissing = Settings.allow_missing_weights,
) -> None:
    """Measure how well a model knows sets of rows; `torchrun` shares them among processes."""
    with reporting_errors():
        device = join()
        with reading("evaluate"):
            check_numbers({"batch_size": batch_size, "max_length": max_length})
        if json_file is not None:
            check_writable(json_file, folder=False, option="--json")
        quieten_libraries()
        stops = [text.replace("\\n", "\n") for text in stop or []]
        if "" in stops:
            raise RunError("--stop takes a text that ends an answer, got an empty one")
        arguments = parse_template_arguments(template_arg or [])

        def load() -> tuple[PreTrainedModel, Encoding, dict[str, list[Row]]]:
            sets = _read_sets(data)
            encoding = load_encoding(model, max_length, chat_template, arguments)
            examples = [encode(encoding, rows) for rows in sets.values()]
            loaded = load_model(
                model, dtype, device=device, allow_missing=allow_missing_weights, note=_note
            )
            check_fits(loaded, encoding, examples)
            with reading(f"the model of {model!r} fails on these rows"):
                evaluate_rows(loaded, next(iter(sets.values()))[:1], encoding, generate=generate)
            return loaded, encoding, sets

        loaded, encoding, sets = together(load)
        reports = {
            name: evaluate_rows(
                loaded,
                rows,
                encoding,
                batch_size=batch_size,
                generate=generate,
                stop=stops,
                max_new_tokens=max_new_tokens,
                share_rows=True,
            )
            for name, rows in sets.items()
        }
        for name, report in reports.items():
            if report.unfinished:
                _note(
                    f"{report.unfinished} of {len(report.answers)} answers to {name} did not end "
                    "in time; --max-new-tokens gives them more, --stop ends them"
                )
        if is_first():
            Console().print(report_table("What the model knows", {Path(model).name: reports}))
        if json_file is not None and is_first():
            figures = {name: report.as_dict() for name, report in reports.items()}
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps({"model": model, "sets": figures}, indent=2))
            _say(f"figures and answers are in {json_file}")


def _read_sets(data: list[str]) -> dict[str, list[Row]]:
    sets: dict[str, list[Row]] = {}
    for item in data:
        name, separator, path = item.partition("=")
        if not separator or not name:
            raise RunError(f"--data takes NAME=FILE, got {item!r}")
        if name in sets:
            raise RunError(f"--data names the set {name!r} twice")
        with reading(f"--data {item}"):
            sets[name] = read_rows(path)
    return sets


@app.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
def doctor(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[--json]")] = None,
) -> None:
    """Show versions, devices, which backends can run here, and what each extra gives."""
    with reporting_errors():
        check_alone("doctor")
        diagnose(arguments or [])
