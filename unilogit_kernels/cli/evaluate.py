"""`unilogit evaluate`: what a model knows, and how far it is from one that never saw the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table
from transformers import PreTrainedModel

from unilogit_kernels.cli import options
from unilogit_kernels.cli.console import note, say
from unilogit_kernels.cli.progress import quieten_libraries, stages_bar
from unilogit_kernels.unlearning.benchmarks import Generation, load_benchmark
from unilogit_kernels.unlearning.data import Row, read_rows
from unilogit_kernels.unlearning.encoding import Encoding, parse_template_arguments
from unilogit_kernels.unlearning.errors import RunError, check_writable, reading
from unilogit_kernels.unlearning.evaluation import evaluate_rows, report_table
from unilogit_kernels.unlearning.limits import check_numbers
from unilogit_kernels.unlearning.loading import check_fits, encode, load_encoding, load_model
from unilogit_kernels.unlearning.measuring import Report, Request, measure, sets_of_rows
from unilogit_kernels.unlearning.processes import is_first, join, together

_INTERRUPTED = 130


def evaluate(
    model: Annotated[str, typer.Option(help="Directory or Hub id of a causal LM.")],
    data: Annotated[
        list[str] | None, typer.Option(help="A set of rows, as NAME=FILE; may be repeated.")
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="A benchmark in place of --data, such as tofu:forget10.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="The folder of its files.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for every metric; gone on with where it is begun.")
    ] = None,
    golden: Annotated[
        str | None,
        typer.Option(help="A model that never saw the rows to forget, or its *_EVAL.json."),
    ] = None,
    starting: Annotated[
        str | None, typer.Option(help="The model before unlearning, or its *_EVAL.json.")
    ] = None,
    convention: Annotated[
        str, typer.Option(help="Where conventions differ: unilogit or openunlearning.")
    ] = Request.convention,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure and answer to this file.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in one forward.")] = Request.batch_size,
    max_length: options.MaxLength = Request.max_length,
    chat_template: options.ChatTemplate = Request.chat_template,
    template_arg: options.TemplateArg = None,
    dtype: options.Dtype = Request.dtype,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Also answer the prompts greedily.")
    ] = Request.generate,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends an answer, \\n a line feed in it; may be repeated."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer. Default: a few more than expected.")
    ] = None,
    allow_missing_weights: options.AllowMissing = Request.allow_missing_weights,
) -> None:
    """Measure how well a model knows sets of rows, and with --output all that they allow.

    `torchrun` shares the rows among processes.
    """
    device = join()
    stops = tuple(text.replace("\\n", "\n") for text in stop or [])
    if "" in stops:
        raise RunError("--stop takes a text that ends an answer, got an empty one")
    common: dict[str, Any] = {
        "model": model,
        "batch_size": batch_size,
        "max_length": max_length,
        "chat_template": chat_template,
        "template_arguments": parse_template_arguments(template_arg or []),
        "dtype": dtype,
        "generate": generate,
        "allow_missing_weights": allow_missing_weights,
    }
    generation = Generation(max_new_tokens, stops)
    if output is None:
        for name, value in (
            ("--benchmark", benchmark),
            ("--golden", golden),
            ("--starting", starting),
        ):
            if value is not None:
                raise RunError(f"{name} needs a folder for results: pass --output")
        request = Request(sets=(), output=Path(), **common)
        sets = together(lambda: _read_sets(data))
        _look(request, sets, generation, json_file, device)
        return
    if json_file is not None:
        raise RunError("--json goes without --output, which has files of its own")
    compared: dict[str, Any] = {
        "output": output,
        "golden": golden,
        "starting": starting,
        "convention": convention,
    }
    with reading("--benchmark" if benchmark else "--data"):
        asked = together(lambda: _asked(data, benchmark, data_dir, generation))
    _measure(Request(**common, **compared, **asked), device)


def _asked(
    data: list[str] | None, benchmark: str | None, data_dir: Path | None, generation: Generation
) -> dict[str, Any]:
    """What is to be measured: `sets`, and of a benchmark its name and what it lacks."""
    if benchmark is None:
        return {"sets": sets_of_rows(_read_sets(data), generation)}
    if data:
        raise RunError("--benchmark and --data exclude each other: pass one of them")
    if data_dir is None:
        raise RunError("--benchmark needs the folder of its files: pass --data-dir")
    if generation != Generation():
        raise RunError("--benchmark says itself how answers end: leave out --stop and the like")
    found = load_benchmark(benchmark, data_dir)
    return {"sets": found.sets, "benchmark": benchmark, "lacking": found.missing}


def _read_sets(data: list[str] | None) -> dict[str, list[Row]]:
    if not data:
        raise RunError("--data names no set of rows, and --benchmark no benchmark: pass one")
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


def _look(
    request: Request,
    sets: Mapping[str, Sequence[Row]],
    how: Generation,
    json_file: Path | None,
    device: torch.device,
) -> None:
    """A quick look: probability, ROUGE-L and key recall of each set, with no files but one."""
    model = request.model
    with reading("evaluate"):
        check_numbers(vars(request))
    if json_file is not None:
        check_writable(json_file, folder=False, option="--json")
    quieten_libraries()
    arguments, some = dict(request.template_arguments), next(iter(sets.values()))[:1]

    def load() -> tuple[PreTrainedModel, Encoding]:
        encoding = load_encoding(model, request.max_length, request.chat_template, arguments)
        examples = [encode(encoding, rows) for rows in sets.values()]
        loaded = load_model(
            model,
            request.dtype,
            device=device,
            allow_missing=request.allow_missing_weights,
            note=note,
        )
        check_fits(loaded, encoding, examples)
        with reading(f"the model of {model!r} fails on these rows"):
            evaluate_rows(loaded, some, encoding, generate=request.generate)
        return loaded, encoding

    loaded, encoding = together(load)
    reports = {
        name: evaluate_rows(
            loaded,
            rows,
            encoding,
            batch_size=request.batch_size,
            generate=request.generate,
            stop=how.stop,
            max_new_tokens=how.max_new_tokens,
            share_rows=True,
        )
        for name, rows in sets.items()
    }
    for name, report in reports.items():
        if report.unfinished:
            note(
                f"{report.unfinished} of {len(report.answers)} answers to {name} did not end "
                "in time; --max-new-tokens gives them more, --stop ends them"
            )
    if not is_first():
        return
    Console().print(report_table("What the model knows", {Path(model).name: reports}))
    if json_file is not None:
        figures = {name: report.as_dict() for name, report in reports.items()}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"model": model, "sets": figures}, indent=2))
        say(f"figures and answers are in {json_file}")


def _measure(request: Request, device: torch.device) -> None:
    quieten_libraries()
    try:
        with stages_bar() as progress:
            report = measure(request, _Stages(progress), device)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on with the next set", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    if is_first():
        Console().print(_table(report))
    for name, lacking in report.missing.items():
        note(f"not computed: {name}, for want of {lacking}")
    say(f"results and what they were computed from are in {request.output}")


class _Stages:
    """Shows the stages of an evaluation.

    Args:
        progress: where.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        """Show a stage in place of the one before."""
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(what, total=total)

    def advance(self, done: int) -> None:
        """Show how far it is."""
        if self.task is not None:
            self.progress.advance(self.task, done)

    def note(self, message: str) -> None:
        """Print a line."""
        note(message)


def _table(report: Report) -> Table:
    """One line for each metric, one column for each model; 95 % intervals in brackets."""
    table = Table(title="Aggregates, with 95 % intervals over rows")
    table.add_column("metric", no_wrap=True)
    for column in report.columns:
        table.add_column(column, justify="right")
    names = dict.fromkeys(name for found in report.columns.values() for name in found)
    for name in names:
        cells = (_cell(found.get(name)) for found in report.columns.values())
        table.add_row(escape(name), *cells)
    return table


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    low, high = estimate.get("low"), estimate.get("high")
    if low is None or high is None:
        return _number(estimate["value"])
    return escape(f"{_number(estimate['value'])} [{_number(low)},\u00a0{_number(high)}]")


def _number(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"
