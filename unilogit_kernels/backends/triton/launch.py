"""The Triton backend: the launches of all of its kernels."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.triton.divergence import DivergenceLaunches
from unilogit_kernels.backends.triton.geometry import (
    ACCESS,
    on_its_device,
    options_of,
)
from unilogit_kernels.backends.triton.kernels.scale import scale_kernel
from unilogit_kernels.backends.triton.log_odds import LogOddsLaunches
from unilogit_kernels.backends.triton.prepared import Prepared
from unilogit_kernels.backends.triton.settings import Device

SCALE_BLOCK = 4096
"""Elements of a tile of `scale_`: 64 or 128 bytes in flight for each of 128 threads."""


@functools.lru_cache(gpu.GEOMETRIES)
def _scale(count: int, dtype: torch.dtype, is_aligned: bool, device: Device) -> Prepared:
    chosen = device.settings
    programs = device.multiprocessors * chosen.resident_warps // chosen.warps
    return Prepared(
        scale_kernel,
        (min(triton.cdiv(count, SCALE_BLOCK), programs), 1),
        (count,),
        {"BLOCK": SCALE_BLOCK},
        options_of(chosen, chosen.warps),
    )


class TritonKernels(LogOddsLaunches, DivergenceLaunches):
    """The row kernels in Triton."""

    name = "triton"

    @on_its_device
    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """See `RowKernels`."""
        gpu.check_scaled(self.language, values)
        count = values.numel()
        if count:
            is_aligned = values.data_ptr() % ACCESS == 0
            launch = _scale(count, values.dtype, is_aligned, self._device(values))
            self._launch(launch, values, factor)
