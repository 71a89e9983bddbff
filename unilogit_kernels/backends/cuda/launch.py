"""The CUDA backend: the launches of all of its kernels."""

from __future__ import annotations

import functools
from ctypes import c_int64

import torch
from torch import Tensor

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.cuda import geometry
from unilogit_kernels.backends.cuda.divergence import DivergenceLaunches
from unilogit_kernels.backends.cuda.geometry import TYPES
from unilogit_kernels.backends.cuda.log_odds import LogOddsLaunches
from unilogit_kernels.backends.cuda.prepared import Prepared
from unilogit_kernels.backends.cuda.sources import Kernel


@functools.lru_cache(gpu.GEOMETRIES)
def _scale(count: int, dtype: torch.dtype, multiprocessors: int) -> Prepared:
    vectors = -(-count * dtype.itemsize // 16)
    blocks = min(multiprocessors * geometry.RESIDENT_THREADS, vectors) // geometry.ROW_THREADS
    kernel = Kernel("SCALE", (TYPES[dtype],))
    return Prepared(kernel, (max(1, blocks), 1), geometry.ROW_THREADS, (c_int64(count),))


class CudaKernels(LogOddsLaunches, DivergenceLaunches):
    """The row kernels in CUDA C++."""

    name = "cuda"

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """See `RowKernels`; where the factor is 1, the kernel reads that one number and returns."""
        gpu.check_scaled(self.language, values)
        count = values.numel()
        if count:
            launcher = self._launcher
            launch = _scale(count, values.dtype, launcher.multiprocessors(values))
            launch.through(launcher, values, values, factor)
