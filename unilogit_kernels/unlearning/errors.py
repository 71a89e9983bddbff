"""Errors in what the user gave, each of them one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unilogit_kernels.huggingface.head import UnsupportedHeadError
from unilogit_kernels.unlearning.data import DataError

_LONGEST = 400
"""Characters of another library's message that are passed on: some print whole files."""


class RunError(ValueError):
    """A run cannot start, or cannot go on, as it was asked for."""


class TrainingError(RuntimeError):
    """A run ended before its last step, through no fault of its inputs that could be seen."""


class LostProcessError(TrainingError):
    """Another process of the run has ended, or does not answer."""


INPUT_ERRORS = (RunError, DataError, UnsupportedHeadError)
"""What is raised where inputs do not fit: the message is all that a user needs."""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, cut where it is long; its type where it has none."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, (KeyError, IndexError)):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Everything that goes wrong while an input is read, checked or tried is the input's fault.

    Libraries that read models, tokenizers, templates and checkpoints raise whatever they come
    across, so no list of types would be complete; those written in Rust panic, which is no
    `Exception`. Only what stands for itself (`INPUT_ERRORS`) and what ends a process passes as it
    is.

    Args:
        what: the start of the message: which input cannot be used, and for what.

    Raises:
        RunError: in place of any other error.
    """
    try:
        yield
    except (*INPUT_ERRORS, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RunError(f"{what}: {one_line(error)}") from error


def check_writable(path: Path, *, folder: bool, option: str) -> None:
    """See that a file or folder can be written, without writing anything.

    Args:
        path: of a file or folder, which need not exist, as its parents need not.
        folder: whether it is to be a folder.
        option: the option that named it, for the message.

    Raises:
        RunError: it cannot.
    """
    with reading(f"{option} {path}"):
        if path.exists() and path.is_dir() != folder:
            raise RunError(f"{option} {path}: is {'not ' if folder else ''}a directory")
        above = path if folder else path.parent
        while not above.exists() and above != above.parent:
            if above.is_symlink():
                raise RunError(f"{option} {path}: {above} is a link to nothing")
            above = above.parent
        if not above.is_dir():
            raise RunError(f"{option} {path}: cannot be made, since {above} is a file")
        existing = path if path.is_file() else above
        if not os.access(existing, os.W_OK):
            raise RunError(f"{option} {path}: {existing} may not be written to")
        # A name that is too long, or holds what no name may, is told by the file system alone.
        for name in path.absolute().parts[1:]:
            with suppress(FileNotFoundError):
                (above / name).lstat()
