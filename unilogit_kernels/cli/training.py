"""What `unilogit unlearn` and `unilogit finetune` do, print and exit with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from unilogit_kernels.cli.console import note, say
from unilogit_kernels.cli.progress import Bar, progress_bar, quieten_libraries
from unilogit_kernels.unlearning.coarse_weights import CoarseWeightsWarning
from unilogit_kernels.unlearning.evaluation import report_table
from unilogit_kernels.unlearning.processes import is_first
from unilogit_kernels.unlearning.run import Settings, execute, prepare

_INTERRUPTED = 130


@contextmanager
def _noting_coarse_weights() -> Iterator[None]:
    """Tell in a line of our own that steps are lost; other warnings go where they go."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, CoarseWeightsWarning):
                note(str(message))
            else:
                usual(message, category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


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
        with progress_bar(settings.task) as progress, _noting_coarse_weights():
            done = execute(prepared, [Bar(progress, settings.task)])
    except KeyboardInterrupt:
        say("interrupted; the same command with --resume goes on", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    if done.ended is not None:
        say(f"stopped: {done.ended}")
    if done.outcome is not None and is_first():
        reports = {"before": done.outcome.before, "after": done.outcome.after}
        Console().print(report_table("Before and after", reports))
        say(done.outcome.sentence)
    say(f"{done.steps} steps; the model is in {settings.output}")
