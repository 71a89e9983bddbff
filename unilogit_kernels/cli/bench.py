"""`unilogit bench`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from unilogit_kernels.bench import report
from unilogit_kernels.bench.devices import find_device
from unilogit_kernels.bench.measure import ROUNDS, SHAPE_SECONDS, Options
from unilogit_kernels.bench.problems import DTYPES, Shape
from unilogit_kernels.bench.provider import MODES
from unilogit_kernels.bench.suites import SUITES
from unilogit_kernels.unlearning.errors import RunError, check_writable, reading
from unilogit_kernels.unlearning.processes import check_alone

_ENTRIES = ("logits", "linear", "all")
_HEADS = ("trained", "frozen", "all")
_WIDTH, _BRIEF_WIDTH = 180, 100
"""Columns of the tables where the output is no terminal; those of --quick need no more."""
_BRIEF_SECONDS = 5.0
"""Of a shape's rounds with --quick."""


def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    suite: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(SUITES)}; repeatable. Default: targets.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            help="Shows that everything runs, in half a minute: small shapes, nobody who compiles, "
            "no peaks of memory."
        ),
    ] = False,
    entry: Annotated[str, typer.Option(help="logits, linear, or all.")] = "all",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}, or all.")] = "all",
    head: Annotated[str, typer.Option(help="trained, frozen, or all.")] = "all",
    shape: Annotated[str, typer.Option(help="Only shapes whose title contains this.")] = "",
    size: Annotated[
        list[str] | None,
        typer.Option(help="A shape of your own, N,V or N,H,V, in place of a suite; repeatable."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="forward (no gradients), backward or both (default); repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only providers whose name contains this, beside ours; repeatable."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Not the providers whose name contains this; repeatable."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the fast ones, at least.")] = ROUNDS,
    memory: Annotated[
        str | None,
        typer.Option(help="Peak memory of all, ours or none. Default: all; none with --quick."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Time for a shape after which no further round starts. "
            f"Default: {SHAPE_SECONDS:g}; {_BRIEF_SECONDS:g} with --quick."
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write everything here; CSV, Markdown and plots beside it."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Skip what the JSON file holds already.")] = False,
    redraw: Annotated[
        bool, typer.Option(help="Measure nothing: write CSV, Markdown and plots from the JSON.")
    ] = False,
) -> None:
    """Time this package beside its peers, with errors and memory in the same row."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_BRIEF_WIDTH if quick else _WIDTH)
    if redraw:
        if json is None or not json.exists():
            raise typer.BadParameter("needs an existing --json file", param_hint="--redraw")
        with _errors_of("--json"), reading(f"{json} is no report"):
            written = report.read(json)
        _write(written, json, console)
        return
    with _errors_of("--json"):
        check_alone("bench")
        if json is not None:
            check_writable(json, folder=False, option="--json")
        if resume and json is not None and json.exists():
            with reading(f"{json} is no report"):
                report.read(json)
    if seconds is None:
        seconds = _BRIEF_SECONDS if quick else SHAPE_SECONDS
    if not seconds > 0:
        raise typer.BadParameter(f"must be positive, got {seconds}", param_hint="--seconds")
    _one_of(entry, _ENTRIES, "--entry")
    _one_of(head, _HEADS, "--head")
    _one_of(dtype, (*DTYPES, "all"), "--dtype")
    memory = memory or ("none" if quick else "all")
    _one_of(memory, ("all", "ours", "none"), "--memory")
    for chosen_mode in mode or ():
        _one_of(chosen_mode, MODES, "--mode")
    suites = ["quick"] if quick else suite or ["targets"]
    for name in suites:
        _one_of(name, tuple(SUITES), "--suite")
    try:
        found = find_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    everything = [own for each in size or () for own in _own_shapes(each)]
    everything = everything or [s for name in suites for s in SUITES[name](device)]
    shapes = [
        each
        for each in everything
        if entry in ("all", each.entry)
        and dtype in ("all", each.dtype)
        and (each.h is None or head == "all" or each.frozen_head == (head == "frozen"))
        and shape.lower() in each.title.lower()
    ]
    if not shapes:
        raise typer.BadParameter("no shape is left by these choices", param_hint="--shape")
    # Peers warn about themselves on every call.
    warnings.filterwarnings("ignore")
    measured = report.run(
        shapes,
        found,
        [
            Options(rounds, each, memory, seconds, tuple(only or ()), tuple(skip or ()), not quick)
            for each in mode or ["both"]
        ],
        console=console,
        command=" ".join(["unilogit", *sys.argv[1:]]),
        path=json,
        resume=resume,
        brief=quick,
    )
    if json is not None:
        _write(measured, json, console)


@contextmanager
def _errors_of(option: str) -> Iterator[None]:
    """Tell an error in what was given as typer tells its own."""
    try:
        yield
    except RunError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _one_of(value: str, allowed: tuple[str, ...], option: str) -> None:
    if value not in allowed:
        raise typer.BadParameter(
            f"must be one of {', '.join(allowed)}, got {value!r}", param_hint=option
        )


def _own_shapes(size: str) -> list[Shape]:
    try:
        sizes = [int(part) for part in size.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"got {size!r}", param_hint="--size") from error
    if len(sizes) not in (2, 3) or min(sizes) < 2:
        raise typer.BadParameter(f"must be N,V or N,H,V, got {size!r}", param_hint="--size")
    n, *middle, v = sizes
    h = middle[0] if middle else None
    frozen = (False,) if h is None else (False, True)
    return [Shape(n, v, dtype, h, is_frozen) for dtype in DTYPES for is_frozen in frozen]


def _write(measured: report.Report, path: Path, console: Console) -> None:
    written = report.write(measured, path)
    try:
        from unilogit_kernels.bench.plots import write_plots

        written += write_plots(measured, path.with_suffix(""))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        console.print("no plots: run: pip install 'unilogit-kernels[bench]'", markup=False)
    console.print(f"written: {', '.join(map(str, written))}", markup=False)
