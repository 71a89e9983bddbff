"""Where one visit of a vocabulary chunk keeps what spares the next visit a GEMM."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Kept(Protocol):
    """Tiles that outlive their chunk.

    Attributes:
        finished: Whether they are gradient rows rather than logits.
        in_gradient: Whether their memory is the weight's gradient, which is written chunk by chunk.
        tokens: How many leading tokens may be kept.
    """

    finished: bool
    in_gradient: bool
    tokens: int

    def place(self, tokens: slice, columns: slice) -> Tensor | None:
        """The memory of a tile, `[tokens, columns]`, or None where there is no room for it."""


class KeptInGradient:
    """In the memory of a weight gradient that is not written yet.

    Columns `[a, b)` of the vocabulary own rows `[a, b)` of the gradient, `(b - a) * h` elements,
    which hold what is kept of these columns for up to `h` tokens (`h / 2` where float32 logits are
    kept in a 16-bit gradient).

    Args:
        weight_gradient: `[V, h]`, contiguous.
        dtype: Of what is kept.
        tokens: How many leading tokens are kept.
        finished: See `Kept`.
    """

    in_gradient = True

    def __init__(
        self, weight_gradient: Tensor, dtype: torch.dtype, tokens: int, *, finished: bool
    ) -> None:
        self.finished = finished
        self.tokens = tokens
        self._gradient, self._dtype = weight_gradient, dtype

    def place(self, tokens: slice, columns: slice) -> Tensor | None:
        """See `Kept.place`."""
        if tokens.stop > self.tokens:
            return None
        v = columns.stop - columns.start
        memory = self._gradient[columns].view(-1).view(self._dtype)
        return memory[: self.tokens * v].view(self.tokens, v)[tokens]


class KeptLogits:
    """Logits in a flat tensor of their own, whole chunks of columns from the first one on.

    Args:
        memory: 1-d; as many chunks are kept as fit.
        tokens: How many tokens there are.
    """

    finished = False
    in_gradient = False

    def __init__(self, memory: Tensor, tokens: int) -> None:
        self.tokens = tokens
        self._memory = memory

    def place(self, tokens: slice, columns: slice) -> Tensor | None:
        """See `Kept.place`."""
        first, last = columns.start * self.tokens, columns.stop * self.tokens
        if last > self._memory.numel():
            return None
        return self._memory[first:last].view(self.tokens, -1)[tokens]
