"""`unilogit compare`: methods beside each other on one data set, as a plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unilogit_kernels.cli.console import note, say
from unilogit_kernels.cli.progress import quieten_libraries
from unilogit_kernels.cli.report import check_packages, draw

_INTERRUPTED = 130


def compare(
    plan: Annotated[Path, typer.Argument(help="YAML or JSON file: see docs/compare.md.")],
    output: Annotated[
        Path, typer.Option(help="Folder for everything; gone on with where it is begun.")
    ],
    processes: Annotated[
        int, typer.Option(help="Runs at once, each in a process of its own, on a GPU of its own.")
    ] = 1,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run failed cells again; otherwise they stay.")
    ] = False,
) -> None:
    """Run methods beside each other on one data set, as a plan file says, and draw a report.

    What is finished is never run again, so the same command goes on after an
    interruption, and ends with the same report.
    """
    check_packages()
    from unilogit_kernels.unlearning.comparison import compare as run
    from unilogit_kernels.unlearning.comparison import read_plan

    quieten_libraries()
    found = read_plan(plan)
    say(f"{found.count()} cells: {len(found.methods)} methods, {len(found.seeds)} seeds")
    try:
        outcome = run(found, output, processes=processes, retry=retry, note=say)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on with the next cell", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    for name, error in outcome.failed.items():
        note(f"{name} failed: {error}")
    draw(output)
