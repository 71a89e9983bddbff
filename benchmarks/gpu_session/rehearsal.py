"""A CPU that stands in for a GPU: Triton's interpreter, the executor of PTX, and a made-up clock.

Needs what the tests need: numpy and pytest, and nvcc for the kernels in CUDA C++.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.gpu_session.cases import Case, family_of
from benchmarks.gpu_session.target import Target
from unilogit_kernels.bench.devices import Cpu, Device
from unilogit_kernels.bench.problems import Shape

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
_MILLISECONDS = 1000.0
MOST_OF_A_FAMILY = 2
"""Cases of one kernel or check."""
MOST_CUDA = 2
"""A kernel in CUDA C++ takes seconds to compile and to execute, so few of a stage are rehearsed."""


class MadeUpClock(Cpu):
    """Everything takes the same time and no memory."""

    peaks_need_a_process = False

    def time(self, run: Callable[[], T]) -> tuple[float, T]:
        """See `Device.time`."""
        return _MILLISECONDS, run()

    def start_peak(self) -> int:
        """See `Device.start_peak`."""
        return 0

    def peak(self) -> int:
        """See `Device.peak`."""
        return 0


class Rehearsal(Target):
    """See the module."""

    device = "cpu"
    rehearses = True

    def missing(self) -> str | None:
        """Nothing is."""
        return None

    def backends(self) -> dict[str, str | None]:
        """Triton is interpreted; the kernels in CUDA C++ need a compiler."""
        return {"triton": None, "cuda": None if shutil.which("nvcc") else "nvcc is not on PATH"}

    @contextmanager
    def launching(self, backend: str, share: str) -> Iterator[None]:
        """See `Target`; tiles are small, so that few columns take every path."""
        fake = "whole rows" if share == "whole rows" else "split rows"
        with ExitStack() as stack:
            if backend == "triton":
                from tests.backends.triton import small_problems as interpreted

                stack.enter_context(interpreted.small_problems(fake))
            else:
                from tests.backends.cuda import devices

                stack.enter_context(devices.small_problems(fake))
            yield

    def sizes(self, share: str) -> tuple[int, int]:
        """Of small tiles: a body, a tail, and both ends."""
        return {"whole rows": (6, 2053), "split rows": (5, 2301), "one row": (1, 2301)}[share]

    def timer(self) -> Device:
        """See `MadeUpClock`."""
        return MadeUpClock()

    def shapes(self) -> Sequence[Shape]:
        """One of each kind."""
        return (
            Shape(6, 301, "bfloat16"),
            Shape(6, 301, "bfloat16", 16),
            Shape(6, 301, "float32", 16, frozen_head=True),
        )

    def rounds(self, wanted: int) -> int:
        """One shows that it runs."""
        return 1

    def chosen(self, cases: Sequence[Case]) -> Sequence[Case]:
        """Some of each family, few enough for a minute."""
        found: list[Case] = []
        counts: Counter[str] = Counter()
        for case in cases:
            family = family_of(case.name)
            if case.name.startswith("cuda"):
                family, most = "cuda", MOST_CUDA
            else:
                most = 1 if "entry=" in family else MOST_OF_A_FAMILY
            if counts[family] < most:
                counts[family] += 1
                found.append(case)
        return found


@contextmanager
def rehearsal() -> Iterator[Rehearsal]:
    """A CPU on which the stages run."""
    for path in (ROOT, ROOT / "tools/ptxsim/src"):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.backends.triton import interpreter

        interpreter.install()
    yield Rehearsal()
