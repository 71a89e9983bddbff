"""Matrices in every layout that a caller may bring, and what lies around them."""

from __future__ import annotations

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

CANARY = 1234.0
"""Fills what lies around a tensor; exact in every dtype."""


def place(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A copy of `values` in a layout, and the memory around it, filled with canaries."""
    n, v = values.shape
    shape = {"padded rows": (n, v + 3), "inner stride": (n, 2 * v), "transposed": (v, n)}.get(
        layout, (n, v)
    )
    offset = 1 if layout.startswith("unaligned") else 32
    memory = torch.full((shape[0] * shape[1] + 64,), CANARY, dtype=values.dtype)
    inside = memory[offset : offset + shape[0] * shape[1]]
    if layout == "unaligned storage":
        inside = torch.utils.dlpack.from_dlpack(inside)  # whose storage begins where the view does
    inside = inside.view(shape)
    view = {
        "padded rows": inside[:, :v],
        "inner stride": inside[:, ::2],
        "transposed": inside.t(),
    }.get(layout, inside)
    view.copy_(values)
    return view, memory


def assert_only_written(view: Tensor, memory: Tensor) -> None:
    """Everything of `memory` outside of `view` is still a canary."""
    view.fill_(CANARY)
    assert bool((memory == CANARY).all()), "written outside of the tensor"
