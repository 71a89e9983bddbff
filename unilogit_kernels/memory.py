"""Allocation of the large tensors that a call fills and hands on, or uses as scratch."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, in huge pages where the CPU's operating system hands them out on request.

    A large tensor is new memory every time, and its first touch faults once per page: with 4 KiB
    pages this costs several times what writing the gradient does (docs/benchmarks.md).
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= 2 * _HUGE_PAGE:
        advise = _madvise()
        if advise is not None:
            first = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
            last = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE
            advise(first, last - first, _MADV_HUGEPAGE)  # advice: where it fails, nothing is lost
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    result: Callable[[int, int, int], int] = function
    return result
