"""Matrices in every layout that a caller may bring, and what lies around them."""

from __future__ import annotations

import math

import torch
import torch.utils.dlpack
from torch import Tensor

LAYOUTS = (
    "contiguous",
    "unaligned",
    "unaligned storage",
    "padded rows",
    "inner stride",
    "transposed",
)
"""Of rows of an odd length, each begins at 16-byte boundaries of its own; of the last two, columns
are apart. Storage that is unaligned itself, as from DLPack, has no boundary before its first row.
"""

FEW_LAYOUTS = ("contiguous", "odd", "unaligned storage", "inner stride", "transposed")
"""The same in fewer: `odd` are padded rows of an unaligned matrix."""

CANARY = 1234.0
"""To be overwritten; exact in every dtype."""

_PADDING = 3


def place(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A copy of `values` `[n, v]` in a layout, and the memory that it lies in, else NaN."""
    n, v = values.shape
    row, column, start = {
        "contiguous": (v, 1, 32),
        "unaligned": (v, 1, 1),
        "unaligned storage": (v, 1, 1),
        "padded rows": (v + _PADDING, 1, 32),
        "odd": (v + _PADDING, 1, 1),
        "inner stride": (2 * v, 2, 32),
        "transposed": (1, n, 32),
    }[layout]
    room = start + max(n * v, n * row) + 32
    memory = torch.full((room,), math.nan, dtype=values.dtype, device=values.device)
    inside = memory
    if layout == "unaligned storage":
        inside, start = torch.utils.dlpack.from_dlpack(memory[start:]), 0
    # Counted from where the storage begins, which for one from DLPack is where the view does.
    view = inside.as_strided((n, v), (row, column), inside.storage_offset() + start)
    return view.copy_(values), memory


def assert_only_written(view: Tensor, memory: Tensor) -> None:
    """What lies around a matrix is still NaN. Overwrites the matrix."""
    view.fill_(0.0)
    written = memory.numel() - int(memory.isnan().sum())
    assert written == view.numel(), f"{written - view.numel()} elements outside were written"
