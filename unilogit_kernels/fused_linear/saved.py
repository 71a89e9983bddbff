"""Where one pass of a vocabulary chunk saves what spares the next pass a GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Saved(Protocol):
    """Tiles that outlive their chunk.

    Attributes:
        finished: Whether they are gradient rows rather than logits.
        in_gradient: Whether their memory is the weight's gradient, which is written chunk by chunk.
        tokens: How many leading tokens may be saved.
        parts: These, as they lie together.
    """

    finished: bool
    in_gradient: bool
    tokens: int

    @property
    def parts(self) -> list[slice]:
        """See above."""

    def place(self, tokens: slice, columns: slice) -> list[Tensor] | None:
        """The memory of tiles `[tokens, columns]`, None where there is no room for them.

        A tile of gradient rows, or a tile of each model's logits. The tokens are of one part.
        """


class SavedInGradient:
    """In the memory of a weight gradient that is not written yet.

    Columns `[a, b)` of the vocabulary own rows `[a, b)` of the gradient, `(b - a) * h` elements,
    which hold what is saved of these columns for up to `h` tokens (`h / 2` where float32 logits, or
    the logits of two models, are saved in a 16-bit gradient). Tiles of several models lie one after
    the other, the widest dtype first, so that each is aligned.

    Args:
        weight_gradient: `[V, h]`, contiguous.
        dtypes: Of what is saved: of gradient rows, or of each model's logits.
        tokens: How many leading tokens are saved.
        finished: See `Saved`.
    """

    in_gradient = True

    def __init__(
        self,
        weight_gradient: Tensor,
        dtypes: Sequence[torch.dtype],
        tokens: int,
        *,
        finished: bool,
    ) -> None:
        self.finished = finished
        self.tokens = tokens
        self._gradient, self._dtypes = weight_gradient, dtypes

    @property
    def parts(self) -> list[slice]:
        """See `Saved`."""
        return [slice(0, self.tokens)]

    def place(self, tokens: slice, columns: slice) -> list[Tensor] | None:
        """See `Saved.place`."""
        if tokens.stop > self.tokens:
            return None
        v = columns.stop - columns.start
        memory = self._gradient[columns].view(-1)
        tiles: dict[int, Tensor] = {}
        first_byte = 0
        for i, dtype in sorted(enumerate(self._dtypes), key=lambda each: -each[1].itemsize):
            first = first_byte // dtype.itemsize
            tile = memory.view(dtype)[first : first + self.tokens * v].view(self.tokens, v)
            tiles[i] = tile[tokens]
            first_byte += self.tokens * v * dtype.itemsize
        return [tiles[i] for i in range(len(tiles))]


class SavedBeside:
    """In flat tensors of their own, whole chunks of columns from the first one on.

    Args:
        memories: 1-d, one of each model's logits, or one of gradient rows; as many chunks are saved
            as fit.
        tokens: How many tokens there are.
        finished: See `Saved`.
    """

    in_gradient = False

    def __init__(self, memories: Sequence[Tensor], tokens: int, *, finished: bool = False) -> None:
        self.finished = finished
        self.tokens = tokens
        self._memories = memories

    @property
    def parts(self) -> list[slice]:
        """See `Saved`."""
        return [slice(0, self.tokens)]

    def place(self, tokens: slice, columns: slice) -> list[Tensor] | None:
        """See `Saved.place`."""
        first, last = columns.start * self.tokens, columns.stop * self.tokens
        if last > self._memories[0].numel():
            return None
        return [memory[first:last].view(self.tokens, -1)[tokens] for memory in self._memories]


class SavedInBoth:
    """Gradient rows of the first tokens in the weight's gradient, of some more beside it.

    Args:
        in_gradient: The first ones.
        beside: Those after them.
    """

    finished, in_gradient = True, True

    def __init__(self, in_gradient: SavedInGradient, beside: SavedBeside) -> None:
        self._first, self._second = in_gradient, beside
        self.tokens = in_gradient.tokens + beside.tokens

    @property
    def parts(self) -> list[slice]:
        """See `Saved`."""
        return [slice(0, self._first.tokens), slice(self._first.tokens, self.tokens)]

    def place(self, tokens: slice, columns: slice) -> list[Tensor] | None:
        """See `Saved.place`."""
        border = self._first.tokens
        if tokens.stop <= border:
            return self._first.place(tokens, columns)
        if tokens.stop > self.tokens:
            return None
        assert tokens.start >= border
        return self._second.place(slice(tokens.start - border, tokens.stop - border), columns)
