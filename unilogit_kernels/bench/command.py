"""`unilogit bench`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from unilogit_kernels.bench import report
from unilogit_kernels.bench.problems import cpu_shapes, quick_shapes


def bench(
    device: Annotated[str, typer.Option(help="What to measure on: cpu.")] = "cpu",
    entry: Annotated[str, typer.Option(help="logits, linear, or all.")] = "all",
    shape: Annotated[str, typer.Option(help="Only shapes whose title contains this.")] = "",
    only: Annotated[
        list[str] | None, typer.Option(help="Only this provider, beside ours; repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small shapes: shows that everything runs.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds.")] = 7,
    memory: Annotated[bool, typer.Option(help="Peak memory too, in fresh processes.")] = True,
    json: Annotated[
        Path | None, typer.Option(help="Write everything measured here, and Markdown beside it.")
    ] = None,
) -> None:
    """Time this package beside its peers, forward and backward, errors and memory included."""
    if device != "cpu":
        raise typer.BadParameter(f"must be 'cpu', got {device!r}", param_hint="--device")
    if entry not in ("logits", "linear", "all"):
        raise typer.BadParameter(
            f"must be 'logits', 'linear' or 'all', got {entry!r}", param_hint="--entry"
        )
    shapes = quick_shapes() if quick else cpu_shapes()
    chosen = [each for each in shapes if entry in ("all", each.entry) and shape in each.title]
    # Peers warn about themselves on every call.
    warnings.filterwarnings("ignore")
    console = Console()
    measured = report.run(chosen, rounds=rounds, memory=memory, console=console, only=only or ())
    if json is not None:
        report.write(measured, json)
        console.print(f"written: {json} and {json.with_suffix('.md')}")
