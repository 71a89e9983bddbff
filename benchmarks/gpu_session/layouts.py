"""Matrices on a device in every layout that a caller may bring, with NaN around them."""

from __future__ import annotations

import math

import torch
import torch.utils.dlpack
from torch import Tensor

LAYOUTS = ("contiguous", "odd", "unaligned storage", "strided", "transposed")
"""`odd`: rows of odd distance that begin anywhere. `unaligned storage`, as from DLPack, has no
16-byte boundary before its first row. Of the last two, columns are apart."""

_ODD_MARGIN, _ODD_START, _APART = 7, 3, 3


def place(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A copy of `values` `[n, v]` in a layout, and the memory that it lies in, else NaN."""
    n, v = values.shape
    row, column, start = {
        "contiguous": (v, 1, 0),
        "odd": (v + _ODD_MARGIN, 1, _ODD_START),
        "unaligned storage": (v, 1, 1),
        "strided": (_APART * v, _APART, 1),
        "transposed": (1, n, 0),
    }[layout]
    room = max(n * v, n * row) + 32
    memory = torch.full((start + room,), math.nan, dtype=values.dtype, device=values.device)
    inside = memory
    if layout == "unaligned storage":
        inside, start = torch.utils.dlpack.from_dlpack(memory[start:]), 0
    view = inside.as_strided((n, v), (row, column), inside.storage_offset() + start)
    return view.copy_(values), memory


def assert_only_written(view: Tensor, memory: Tensor) -> None:
    """What lies around a matrix is still NaN. Overwrites the matrix."""
    view.fill_(0.0)
    written = memory.numel() - int(memory.isnan().sum())
    assert written == view.numel(), f"{written - view.numel()} elements outside were written"
