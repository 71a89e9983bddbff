"""The Triton backend: the launches of all of its kernels."""

from __future__ import annotations

import triton
from torch import Tensor

from unilogit_kernels.backends.triton import settings
from unilogit_kernels.backends.triton.divergence import DivergenceLaunches
from unilogit_kernels.backends.triton.geometry import on_its_device, options_of
from unilogit_kernels.backends.triton.kernels.scale import scale_kernel
from unilogit_kernels.backends.triton.log_odds import LogOddsLaunches

SCALE_BLOCK = 4096
"""Elements of a tile of `scale_`: 64 or 128 bytes in flight for each of 128 threads."""


class TritonKernels(LogOddsLaunches, DivergenceLaunches):
    """The row kernels in Triton."""

    name = "triton"
    language = "Triton"

    @on_its_device
    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """See `RowKernels`."""
        if self.is_empty(values):
            return
        chosen = settings.current_settings()
        multiprocessors, _ = settings.sizes(values, chosen)
        programs = multiprocessors * chosen.resident_warps // chosen.warps
        scale_kernel[(min(triton.cdiv(values.numel(), SCALE_BLOCK), programs),)](
            values,
            factor,
            values.numel(),
            BLOCK=SCALE_BLOCK,
            **options_of(chosen, chosen.warps),
        )
