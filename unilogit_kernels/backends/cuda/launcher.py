"""The seam between the launch functions and what runs a kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from unilogit_kernels.backends.cuda.sources import Kernel

Argument = Tensor | ctypes.c_int32 | ctypes.c_int64 | ctypes.c_float | None
"""Of a kernel: a tensor or None for a pointer, a number of the type that the kernel declares."""


class Launcher(Protocol):
    """What runs kernels: a GPU's driver, or for tests something that runs them on a CPU."""

    def multiprocessors(self, tensor: Tensor) -> int:
        """How many the tensor's device has."""

    def cache_bytes(self, tensor: Tensor) -> int:
        """Size of the cache that they share."""

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Argument],
        device_of: Tensor,
    ) -> None:
        """Run a kernel on the device of a tensor, in order with what torch does there."""
