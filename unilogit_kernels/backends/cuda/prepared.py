"""Launches that are laid out once: grids and numbers follow from sizes and strides alone."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends.cuda.driver import current
from unilogit_kernels.backends.cuda.launcher import Launcher
from unilogit_kernels.backends.cuda.sources import Kernel
from unilogit_kernels.backends.gpu import GpuKernels


class Prepared(NamedTuple):
    """A launch but for its pointers, which come first among a kernel's arguments.

    Attributes:
        kernel: The kernel.
        grid: Blocks along x and y.
        threads: Of a block.
        numbers: The other arguments.
    """

    kernel: Kernel
    grid: tuple[int, int]
    threads: int
    numbers: tuple[c_float | c_int32 | c_int64, ...]

    def through(self, launcher: Launcher, device_of: Tensor, *pointers: Tensor | None) -> None:
        """Launch on the device of a tensor."""
        arguments = (*pointers, *self.numbers)
        launcher.launch(self.kernel, self.grid, self.threads, arguments, device_of)


class Update(NamedTuple):
    """Statistics of rows: in one launch, or in parts that another one merges.

    Attributes:
        fold: The first launch.
        parts: Shape of what it leaves, but for the rows; None where the state is updated at once.
        merge: The second launch; None then.
    """

    fold: Prepared
    parts: tuple[int, int] | None = None
    merge: Prepared | None = None


class Device(NamedTuple):
    """What launches are laid out for.

    Attributes:
        multiprocessors: How many it has.
        cache_bytes: Of the cache that they share.
    """

    multiprocessors: int
    cache_bytes: int

    @staticmethod
    def of(launcher: Launcher, tensor: Tensor) -> Device:
        """The device of a tensor."""
        return Device(launcher.multiprocessors(tensor), launcher.cache_bytes(tensor))


class Matrix(NamedTuple):
    """What launches take of a matrix beside its base, and `n` and `v`.

    Attributes:
        dtype: Of its elements.
        row_stride: From a row to the next.
        column_stride: From a column to the next.
    """

    dtype: torch.dtype
    row_stride: int
    column_stride: int

    @staticmethod
    def of(tensor: Tensor) -> Matrix:
        """That of a tensor."""
        return Matrix(tensor.dtype, *tensor.stride())

    @property
    def strides(self) -> tuple[c_int64, c_int64]:
        """As kernels take them."""
        return c_int64(self.row_stride), c_int64(self.column_stride)


class CudaLaunches(GpuKernels):
    """What launches prepared kernels.

    Args:
        launcher: Runs them; default: the GPU's driver, or whatever a test put in its place.
    """

    language = "CUDA"

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._own_launcher = launcher

    @property
    def _launcher(self) -> Launcher:
        return self._own_launcher or current()
