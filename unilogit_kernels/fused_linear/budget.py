"""What a fused linear call computes, and the bytes that each part of it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from unilogit_kernels.fused_linear.gemm import GemmDtypes, Needs
from unilogit_kernels.fused_linear.options import MEMORY_BUDGET, LinearOptions, budget_in_bytes
from unilogit_kernels.fused_linear.weight_sum import rows_inside

FLOPS_PER_BYTE = 266
"""Operations of a 16-bit GEMM that a GPU does while it moves a byte: 798 TFLOP/s and 3.0 TB/s, seen
on an H100. Other GPUs' ratios are within 15 % of it, but for the A100's 153."""

CHUNK_TOKENS = 6 * FLOPS_PER_BYTE
"""Tokens of a chunk for which a GPU's default budget has room. From 4 / 6 of them on, reading and
writing float32 sums of the weight's gradient, 8 bytes each, takes no longer than the GEMM that adds
to them, 2 operations for each token; the rest leaves time for its other operands."""

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Most bytes of logits in one vocabulary chunk; on CPU they should stay in the last cache."""

TILE_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
"""Most bytes of logits between their GEMM and the row kernel that reads them: on GPUs they should
stay in the L2 cache, 40 MB on an A100 and 50 MB on an H100."""

MOST_BUDGET = 4 << 30
"""The largest default budget of a GPU."""


class HeadShape(NamedTuple):
    """One lm_head of a fused linear call.

    Attributes:
        h: Hidden size.
        dtypes: Of the GEMMs.
        input_dtype: Of hidden states and weight.
        rank: Of its low-rank term; 0 for none.
    """

    h: int
    dtypes: GemmDtypes
    input_dtype: torch.dtype
    rank: int = 0

    @property
    def casts_weight(self) -> bool:
        """Whether the GEMMs read a copy of the weight in another dtype."""
        return self.input_dtype != self.dtypes.operands


class LinearShape(NamedTuple):
    """What the cut of a fused linear call depends on.

    Attributes:
        n: Tokens that count.
        h: Hidden size.
        vocab_size: Columns.
        dtypes: Of the GEMMs.
        input_dtype: Of hidden states and weight.
        device_type: `"cpu"`, `"cuda"`, ...
        needs: Which gradients the call computes.
        reference: The reference model's lm_head, if there is one: its logits exist beside those of
            the student, tile by tile.
        rank: Of the low-rank term; 0 for none.
    """

    n: int
    h: int
    vocab_size: int
    dtypes: GemmDtypes
    input_dtype: torch.dtype
    device_type: str
    needs: Needs
    reference: HeadShape | None = None
    rank: int = 0

    @property
    def heads(self) -> tuple[HeadShape, ...]:
        """Every lm_head, the student's first."""
        own = HeadShape(self.h, self.dtypes, self.input_dtype, self.rank)
        return (own,) if self.reference is None else (own, self.reference)

    @property
    def logit_sizes(self) -> tuple[int, ...]:
        """Bytes of a logit of each head."""
        return tuple(head.dtypes.logits.itemsize for head in self.heads)

    @property
    def logit_bytes(self) -> int:
        """Bytes of the logits of one token and column, of all heads."""
        return sum(self.logit_sizes)

    @property
    def casts_weight(self) -> bool:
        """Whether GEMMs read a copy of a weight in another dtype."""
        return any(head.casts_weight for head in self.heads)

    @property
    def separate_rows(self) -> bool:
        """Whether gradient rows are narrower than logits, so that they cannot replace them."""
        return self.dtypes.operands != self.dtypes.logits

    @property
    def widens(self) -> bool:
        """Whether sums of the GEMMs' results need a wider dtype than operands or results have."""
        return not self.dtypes.operands == self.dtypes.results == self.dtypes.exact

    @property
    def narrows(self) -> bool:
        """Whether a product is wider than where it goes, so that it exists beside it."""
        return self.dtypes.results.itemsize < self.dtypes.operands.itemsize

    @property
    def trains_inner(self) -> bool:
        """Whether there is a low-rank term whose hidden states' side wants a gradient."""
        return self.needs.inner and self.rank > 0

    @property
    def trains_up(self) -> bool:
        """Whether there is a low-rank term whose vocabulary's side wants a gradient."""
        return self.needs.up and self.rank > 0

    @property
    def sums_hidden(self) -> bool:
        """Whether the hidden states' gradient adds up in a buffer, not in its own memory."""
        return self.needs.hidden and self.dtypes.results != self.dtypes.exact


def budget_of(shape: LinearShape, options: LinearOptions) -> int:
    """Bytes for buffers: as the caller set them, or the device's default.

    On a GPU that is what the sums of the weight's gradient and a chunk of `CHUNK_TOKENS` take,
    between `MEMORY_BUDGET` and `MOST_BUDGET`, however many tokens there are.
    """
    given = budget_in_bytes(options)
    if given:
        return given
    least = per_device(MEMORY_BUDGET, shape.device_type)
    if shape.device_type == "cpu":
        return least
    chunk = CHUNK_TOKENS * shape.vocab_size * row_bytes(shape)
    return min(max(least, weight_sum_bytes(shape) + chunk), MOST_BUDGET)


def row_bytes(shape: LinearShape) -> int:
    """Bytes of one token and column in a token chunk, the gradient included."""
    narrow = shape.dtypes.operands.itemsize if shape.separate_rows else 0
    return shape.logit_bytes + narrow


def per_device(table: dict[str, int], device_type: str) -> int:
    """The entry of a device type; what is not named is taken for a GPU."""
    return table.get(device_type, table["cuda"])


def aligned_size(size: int, step: int) -> int:
    """The largest multiple of `step` up to `size`, or `size` itself where that would be 0."""
    return size - size % step if size > step else size


def weight_sum_bytes(shape: LinearShape) -> int:
    """Bytes in which the weight's gradient adds up over token chunks, beside its own memory.

    That holds as many of the sums as fit (`WeightSum`). Where the GEMM cannot add to a wider sum,
    its product is a tensor of its own; so is that of a low-rank term, whose gradient is its sum.
    """
    total = shape.vocab_size * shape.rank * product_bytes(shape) if shape.trains_up else 0
    if not shape.needs.weight or shape.dtypes.results == shape.dtypes.exact:
        return total
    beside = shape.vocab_size - rows_inside(shape.vocab_size, shape.dtypes)
    return total + beside * shape.h * (shape.dtypes.exact.itemsize + product_bytes(shape))


def vector_bytes(shape: LinearShape) -> int:
    """Bytes of states, log-odds, slopes, and of what comes and goes while they are computed."""
    return 16 * shape.n * shape.dtypes.exact.itemsize


def hidden_copy_bytes(shape: LinearShape, tokens: int) -> int:
    """Bytes of so many tokens' hidden states that the GEMMs read in another dtype."""
    return tokens * cast_bytes(shape)


def hidden_sum_bytes(shape: LinearShape) -> int:
    """Bytes in which the hidden states' gradient adds up, beside its own memory."""
    total = shape.n * shape.rank * product_bytes(shape) if shape.trains_inner else 0
    if not shape.sums_hidden:
        return total
    return total + shape.n * shape.h * (shape.dtypes.exact.itemsize + product_bytes(shape))


def product_bytes(shape: LinearShape) -> int:
    """Bytes of an entry of a product that is added to a wider sum, where no GEMM can do that."""
    dtypes = shape.dtypes
    if dtypes.operands == dtypes.exact or dtypes.wider:
        return 0
    return dtypes.operands.itemsize


def _weight_bytes(shape: LinearShape, *, adds_up: bool) -> int:
    """Bytes that one more column of a chunk costs beside its logits: copies of weight rows."""
    wide = shape.narrows or (adds_up and shape.widens)
    total = shape.dtypes.exact.itemsize if wide and shape.needs.weight else 0
    return cast_bytes(shape) + shape.h * total


def cast_bytes(shape: LinearShape) -> int:
    """Bytes of a row of each weight, or of hidden states, that GEMMs read in another dtype."""
    return sum((h.h + h.rank) * h.dtypes.operands.itemsize for h in shape.heads if h.casts_weight)


def saved_token_count(shape: LinearShape, *, rows: bool) -> int:
    """How many tokens fit, a column's entries into the memory of that column's gradient.

    Args:
        shape: What is computed.
        rows: Whether the entries are finished gradient rows; else the logits of all heads.
    """
    gradient_bytes = shape.h * shape.dtypes.results.itemsize
    sizes = (shape.dtypes.operands.itemsize,) if rows else shape.logit_sizes
    return 0 if gradient_bytes % max(sizes) else min(shape.n, gradient_bytes // sum(sizes))


def saved_capacity(shape: LinearShape, options: LinearOptions) -> int:
    """How many logits of each head a forward may keep for its backward: what the budget leaves.

    Never all of them: the last chunk of columns is always projected again. It is arithmetic of
    sizes alone, so that a compiler can trace it for an `n` that it does not know.
    """
    budget = budget_in_bytes(options) or per_device(MEMORY_BUDGET, shape.device_type)
    buffers = per_device(CHUNK_BYTES, shape.device_type) + per_device(TILE_BYTES, shape.device_type)
    room = torch.sym_max(0, budget - buffers - hidden_sum_bytes(shape))
    capacity = torch.sym_min(room // shape.logit_bytes, shape.n * (shape.vocab_size - 1))
    return int(capacity) if isinstance(capacity, int) else capacity
