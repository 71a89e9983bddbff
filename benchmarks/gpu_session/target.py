"""What the stages run on: a GPU, or in a rehearsal a CPU that stands in for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.gpu_session.cases import Case
from unilogit_kernels import available_backends
from unilogit_kernels.bench.devices import Cuda, Device
from unilogit_kernels.bench.problems import Shape

SHARES = ("whole rows", "split rows", "one row")
"""How programs may share rows, which decides what is launched: enough rows for a program each, few
that are split, or a single one."""


class Target:
    """The GPU that torch sees.

    Attributes:
        device: Of tensors.
        rehearses: Whether this is a CPU that stands in.
    """

    device = "cuda"
    rehearses = False

    def missing(self) -> str | None:
        """Why there is nothing to run on, or None."""
        if torch.cuda.is_available():
            return None
        return f"torch {torch.__version__} sees no GPU"

    def backends(self) -> dict[str, str | None]:
        """The backends for GPUs, and why one cannot run."""
        reasons = available_backends()
        names = ["triton"] if torch.version.hip else ["triton", "cuda"]
        return {name: reasons[name] for name in names}

    @contextmanager
    def launching(self, backend: str, share: str) -> Iterator[None]:
        """Inside, a backend launches on this device; rows are shared so for `sizes(share)`."""
        yield

    def sizes(self, share: str) -> tuple[int, int]:
        """Rows and columns. The device runs 132 x 8 programs at a time, or about so many."""
        return {"whole rows": (4300, 9001), "split rows": (5, 50_257), "one row": (1, 128_255)}[
            share
        ]

    def timer(self) -> Device:
        """What tells times and memory."""
        return Cuda()

    def shapes(self) -> Sequence[Shape]:
        """What is measured, in order of value."""
        llama, v = 4096, 128_256
        return (
            Shape(8192, v, "bfloat16"),
            Shape(8192, v, "bfloat16", llama),
            Shape(8192, v, "bfloat16", llama, frozen_head=True),
            Shape(4096, v, "float32"),
            Shape(2048, v, "bfloat16", llama),
            Shape(512, 50_257, "bfloat16"),
            Shape(8192, 151_936, "bfloat16", 896),
            Shape(2048, 262_144, "bfloat16", 3584),
            Shape(8, v, "bfloat16"),
            Shape(2048, v, "bfloat16", llama, frozen_head=True),
        )

    def rounds(self, wanted: int) -> int:
        """How often something is timed."""
        return wanted

    def chosen(self, cases: Sequence[Case]) -> Sequence[Case]:
        """Those that are run."""
        return cases
