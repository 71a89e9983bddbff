"""Copies of the CUDA sources with a bug in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from ptxsim import KernelFaultError

from cuda_kernels import devices
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

    def check_caught(self, folder: Path) -> None:
        """With two warps to a block of whole rows, one to a block of parts."""
        with devices.small_problems(self.share) as device, devices.block_sizes(64, 32, 128):
            device.headers = sources_with(self.bug, folder)
            with pytest.raises((KernelFaultError, AssertionError), match=self.bug.caught):
                self.problem(device)


def check_problems_without_a_bug(cases: dict[str, Case], share: str) -> None:
    """What shows the bugs passes where there is none."""
    for problem in dict.fromkeys(case.problem for case in cases.values()):
        with devices.small_problems(share) as device, devices.block_sizes(64, 32, 128):
            problem(device)
