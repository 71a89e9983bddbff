"""Copies of the CUDA sources with a bug in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.backends.cuda import devices
from unilogit_kernels.backends.cuda import sources

WHOLE, SPLIT = devices.SHARES

Problem = Callable[[devices.PtxLauncher], None]


class Bug(NamedTuple):
    """A bug: what replaces what in which source, and how the executor words it.

    Attributes:
        caught: A pattern of the executor's message; None where only the results are wrong.
    """

    header: str
    right: str
    wrong: str
    caught: str | None


def sources_with(bug: Bug, folder: Path) -> Path:
    """Write the sources there, this one place changed."""
    for name in sources.HEADERS:
        text = (sources.directory() / name).read_text()
        if name == bug.header:
            assert text.count(bug.right) == 1, f"{name} has changed: {bug.right!r}"
            text = text.replace(bug.right, bug.wrong)
        (folder / name).write_text(text)
    return folder


class Case(NamedTuple):
    """A bug, what shows it, and how rows are shared among blocks then."""

    bug: Bug
    problem: Problem
    share: str = WHOLE
