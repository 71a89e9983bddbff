"""What a run costs: time, and memory at its peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from unilogit_kernels.backends.memory import peak_resident_bytes, start_resident_peak
from unilogit_kernels.unlearning.processes import on_cpu


def seconds() -> float:
    """A clock that only goes forward."""
    return time.perf_counter()


@dataclass
class Peak:
    """Of memory.

    Attributes:
        bytes: of the resident set of this process on a CPU, which includes the libraries; of what
            torch allocated on a GPU. None where the system does not tell.
    """

    bytes: int | None = None


@contextmanager
def peak_of() -> Iterator[Peak]:
    """The peak of memory of what is done within; it is told at the end."""
    found = Peak()
    if on_cpu():
        with suppress(OSError):
            start_resident_peak()
        yield found
        with suppress(OSError):
            found.bytes = peak_resident_bytes()
        return
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    yield found
    found.bytes = torch.accelerator.max_memory_allocated()
