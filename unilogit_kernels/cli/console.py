"""What commands print, and how their errors become one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

_FAILED, _WRONG_INPUT = 1, 2
_DEBUG = "UNILOGIT_DEBUG"
"""The environment variable that asks for tracebacks."""
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""What typer reports itself: click's ClickException, or typer's own copy of it."""


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
    except Exception as error:
        message, code = _told(error)
        _tell(error, " ".join(message.splitlines()))
        if os.environ.get(_DEBUG, "0") != "0":
            traceback.print_exception(error)
        raise typer.Exit(code) from error


def _told(error: Exception) -> tuple[str, int]:
    """The message of an error, and the exit code."""
    import torch

    from unilogit_kernels.unlearning.errors import INPUT_ERRORS, TrainingError, one_line

    if isinstance(error, INPUT_ERRORS):
        return str(error), _WRONG_INPUT
    if isinstance(error, (TrainingError, OSError, MemoryError, torch.OutOfMemoryError)):
        return one_line(error), _FAILED
    hint = f"this should not happen; {_DEBUG}=1 shows the traceback"
    return f"{type(error).__name__}: {one_line(error)} ({hint})", _FAILED


def _tell(error: Exception, message: str) -> None:
    """Print an error, of several processes in the one that has to."""
    from unilogit_kernels.unlearning.errors import LostProcessError
    from unilogit_kernels.unlearning.processes import is_first, tells, voice

    if tells(error):
        speaker = "" if is_first() and not isinstance(error, LostProcessError) else voice()
        _print(f"error: {speaker}{message}", err=True)


def say(message: str, err: bool = False) -> None:
    """Print a line in the first process."""
    from unilogit_kernels.unlearning.processes import is_first

    if is_first():
        _print(message, err)


def _print(message: str, err: bool) -> None:
    """Print a line; what the terminal's encoding lacks is escaped."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    typer.echo(message.encode(encoding, "backslashreplace").decode(encoding), err=err)


def note(message: str) -> None:
    """Tell on standard error what a user may want to know."""
    say(f"note: {message}", err=True)
