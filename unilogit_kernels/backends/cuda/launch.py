"""The CUDA backend: the launches of all of its kernels."""

from __future__ import annotations

from ctypes import c_int64

from torch import Tensor

from unilogit_kernels.backends.cuda import geometry
from unilogit_kernels.backends.cuda.divergence import DivergenceLaunches
from unilogit_kernels.backends.cuda.driver import current
from unilogit_kernels.backends.cuda.geometry import TYPES
from unilogit_kernels.backends.cuda.log_odds import LogOddsLaunches
from unilogit_kernels.backends.cuda.sources import Kernel


class CudaKernels(LogOddsLaunches, DivergenceLaunches):
    """The row kernels in CUDA C++."""

    name = "cuda"
    language = "CUDA"

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """See `RowKernels`; where the factor is 1, the kernel reads that one number and returns."""
        if self.is_empty(values):
            return
        launcher = current()
        vectors = -(-values.nbytes // 16)
        resident = launcher.multiprocessors(values) * geometry.RESIDENT_THREADS
        blocks = min(resident, vectors) // geometry.ROW_THREADS
        launcher.launch(
            Kernel("SCALE", (TYPES[values.dtype],)),
            (max(1, blocks), 1),
            geometry.ROW_THREADS,
            [values, factor, c_int64(values.numel())],
            values,
        )
