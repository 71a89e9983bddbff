"""The walk over a row: which columns a program passes, in what tiles, and how it accesses them.

A program walks over a row in three kinds of tiles. The body is full tiles from the row's first
16-byte boundary on, without masks; the tail is what is left of it in whole vectors, in smaller
tiles with one mask per vector; a few columns at both ends that fill no vector come last. So every
access of body and tail is 128 bits wide, however odd the row's length and position are.

A tile has the shape `[unroll, threads, vector]`, of which a thread owns a slice of the middle axis:
maxima and sums over the other two stay in its registers, and threads meet once per row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

ACCESS_BYTES = tl.constexpr(16)


class Walk(NamedTuple):
    """How rows are walked over; decided when a kernel is compiled.

    Attributes:
        threads: Threads of the program.
        vector: Elements in 128 bits of the leading matrix (the output, where there is one).
        unroll: Vectors of a thread in a body tile, so that its loads are in flight together.
        tail_unroll: The same in a tile of the tail.
        alignment: Elements between the leading matrix's 16-byte boundaries, of which the first in
            a row is where its body begins; 1 where accesses are single.
        strided: Whether neighbouring columns are not neighbours in memory.
    """

    threads: int
    vector: int
    unroll: int
    tail_unroll: int
    alignment: int
    strided: bool


class Row(NamedTuple):
    """A row of a matrix in memory.

    Attributes:
        pointer: To a 16-byte boundary.
        start: Elements from there to column 0.
        column_stride: Elements from a column to the next.
    """

    pointer: tl.tensor
    start: tl.tensor
    column_stride: tl.tensor


class Share(NamedTuple):
    """Which columns of a row a program passes: of body tiles some, and maybe tail and ends.

    Attributes:
        peeled: Columns before the first 16-byte boundary.
        first_block: Body tiles from this one on,
        last_block: and before this one.
        tail_start: Column of the tail, counted from the body's first.
        tail_vectors: Whole vectors in the tail.
        ends: Columns that fill no vector, at both ends together.
        right_end: What is added to `peeled` and more to count columns at the right end.
    """

    peeled: tl.tensor
    first_block: tl.tensor
    last_block: tl.tensor
    tail_start: tl.tensor
    tail_vectors: tl.tensor
    ends: tl.tensor
    right_end: tl.tensor


# ---- where ---------------------------------------------------------------------------------------


@triton.jit
def row_of(pointer, offset, row_stride, column_stride, row_index):
    """Row `row_index` of a matrix; its offset is counted in 64 bits."""
    return Row(pointer, offset + row_index * row_stride, column_stride)


@triton.jit
def body_of(row, share, ALIGNMENT: tl.constexpr):
    """The row from its first 16-byte boundary on.

    The division changes nothing; from it the compiler knows that accesses are aligned.
    """
    start = (row.start + share.peeled) // ALIGNMENT * ALIGNMENT
    return Row(row.pointer, start, row.column_stride)


@triton.jit
def share_of_row(leading, v, part, parts, blocks_per_part, WALK: tl.constexpr):
    """What one of the programs that share a row passes. The last part owns tail and ends."""
    beyond = (leading.start % WALK.alignment).to(tl.int32)
    peeled = tl.minimum((WALK.alignment - beyond) % WALK.alignment, v)
    BLOCK: tl.constexpr = WALK.unroll * WALK.threads * WALK.vector
    blocks = (v - peeled) // BLOCK
    first_block = part * blocks_per_part
    last_block = tl.minimum(first_block + blocks_per_part, blocks)
    tail_start = blocks * BLOCK
    tail_vectors = (v - peeled - tail_start) // WALK.vector
    ends = v - tail_start - tail_vectors * WALK.vector
    right_end = v - ends
    is_last = part == parts - 1
    tail_vectors = tl.where(is_last, tail_vectors, 0)
    ends = tl.where(is_last, ends, 0)
    return Share(peeled, first_block, last_block, tail_start, tail_vectors, ends, right_end)


@triton.jit
def tile_lanes(UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Number of each element of a tile, `[UNROLL, THREADS, VECTOR]`, in the order of memory."""
    unroll = tl.arange(0, UNROLL)[:, None, None]
    thread = tl.arange(0, THREADS)[None, :, None]
    return (unroll * THREADS + thread) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def tail_columns(share, first_vector, WALK: tl.constexpr):
    """Columns of a tile of the tail; the mask is one per vector, which keeps accesses whole."""
    lanes = tile_lanes(WALK.tail_unroll, WALK.threads, WALK.vector)
    vectors = first_vector + tile_lanes(WALK.tail_unroll, WALK.threads, 1)
    columns = share.tail_start + first_vector * WALK.vector + lanes
    return columns, vectors < share.tail_vectors


@triton.jit
def end_columns(share, WALK: tl.constexpr):
    """The columns before the first vector and after the last one, and which of them exist."""
    lane = tile_lanes(1, WALK.threads, 1)
    return tl.where(lane < share.peeled, lane, share.right_end + lane), lane < share.ends


# ---- access --------------------------------------------------------------------------------------


@triton.jit
def at_columns(row, columns, STRIDED: tl.constexpr):
    """Pointers to columns; with a stride they may be 2^31 elements away."""
    if STRIDED:
        columns = columns.to(tl.int64) * row.column_stride
    return row.pointer + row.start + columns


@triton.jit
def load_columns(
    row, columns, inside, EVICTION: tl.constexpr, STRIDED: tl.constexpr, OUTSIDE: tl.constexpr = 0.0
):
    """A tile of a row, in its dtype, and a number where it is not `inside`; None: all of it is."""
    pointers = at_columns(row, columns, STRIDED)
    if inside is None:
        x = tl.load(pointers, eviction_policy=EVICTION)
    else:
        x = tl.load(pointers, mask=inside, other=OUTSIDE, eviction_policy=EVICTION)
    return x


@triton.jit
def store_columns(row, columns, inside, values, STRIDED: tl.constexpr):
    """Write a tile of a row, rounded to its dtype."""
    pointers = at_columns(row, columns, STRIDED)
    tl.store(pointers, values.to(row.pointer.dtype.element_ty), mask=inside)


@triton.jit
def zero_tile(row, columns, inside, label, label_is_near, KIND: tl.constexpr, WALK: tl.constexpr):
    """Write zeros; nothing is read."""
    store_columns(row, columns, inside, tl.full(columns.shape, 0.0, tl.float32), WALK.strided)


# ---- passes --------------------------------------------------------------------------------------


@triton.jit
def fold_row(
    parts, whole, body, label, share, FOLD: tl.constexpr, KIND: tl.constexpr, WALK: tl.constexpr
):
    """Fold a program's share of a row, from its start to its end, into each thread's `parts`.

    Args:
        parts: A tuple of `[threads]`.
        whole: What `FOLD` needs of the row, at column 0.
        body: The same at the first 16-byte boundary.
        label: Column of the label, or a number that is no column.
        FOLD: `parts = FOLD(parts, row, columns, inside, label, label_is_near, KIND, WALK)`.
        KIND: Handed on to `FOLD`.
    """
    BLOCK: tl.constexpr = WALK.unroll * WALK.threads * WALK.vector
    lanes = tile_lanes(WALK.unroll, WALK.threads, WALK.vector)
    label_in_body = label - share.peeled
    for block in range(share.first_block, share.last_block):
        # One tile of the row holds the label: only there is it looked for column by column.
        is_near = label_in_body // BLOCK == block
        columns = block * BLOCK + lanes
        parts = FOLD(parts, body, columns, None, label_in_body, is_near, KIND, WALK)
    for first_vector in range(0, share.tail_vectors, WALK.tail_unroll * WALK.threads):
        columns, inside = tail_columns(share, first_vector, WALK)
        is_near = label_in_body >= share.tail_start
        parts = FOLD(parts, body, columns, inside, label_in_body, is_near, KIND, WALK)
    if share.ends > 0:
        columns, inside = end_columns(share, WALK)
        parts = FOLD(parts, whole, columns, inside, label, True, KIND, WALK)
    return parts


@triton.jit
def write_row(
    whole, body, label, share, WRITE: tl.constexpr, KIND: tl.constexpr, WALK: tl.constexpr
):
    """Write a program's share of a row, tile by tile.

    From its end to its start: what an earlier pass read last is still in the cache.

    Args:
        whole: What `WRITE` needs of the row, at column 0.
        body: The same at the first 16-byte boundary.
        label: Column of the label, or a number that is no column.
        WRITE: `WRITE(row, columns, inside, label, label_is_near, KIND, WALK)`.
        KIND: Handed on to `WRITE`.
    """
    BLOCK: tl.constexpr = WALK.unroll * WALK.threads * WALK.vector
    label_in_body = label - share.peeled
    if share.ends > 0:
        columns, inside = end_columns(share, WALK)
        WRITE(whole, columns, inside, label, True, KIND, WALK)
    for first_vector in range(0, share.tail_vectors, WALK.tail_unroll * WALK.threads):
        columns, inside = tail_columns(share, first_vector, WALK)
        WRITE(body, columns, inside, label_in_body, True, KIND, WALK)
    lanes = tile_lanes(WALK.unroll, WALK.threads, WALK.vector)
    for step in range(share.first_block, share.last_block):
        block = share.first_block + share.last_block - 1 - step
        is_near = label_in_body // BLOCK == block
        WRITE(body, block * BLOCK + lanes, None, label_in_body, is_near, KIND, WALK)


# ---- labels --------------------------------------------------------------------------------------


@triton.jit
def label_column(labels, row_index, first_column, v):
    """A label's column among these `v`, or -1: no label becomes a pointer unchecked."""
    column = tl.load(labels + row_index) - first_column
    return tl.where((column >= 0) & (column < v), column, -1).to(tl.int32)


# ---- arguments -----------------------------------------------------------------------------------

UNSPECIALIZED = [
    "offset", "row_stride", "column_stride", "out_offset", "out_row_stride", "out_column_stride",
    "a_offset", "a_row_stride", "a_column_stride", "b_offset", "b_row_stride", "b_column_stride",
    "state_stride", "slope_stride", "coefficient_stride", "first_column", "v", "blocks_per_part",
    "count",
]  # fmt: skip
"""Numbers whose value Triton must not compile for: what matters of them is in a `Walk`."""

UNALIGNED = ["labels", "row_weight", "state", "parts", "values", "slopes", "coefficients"]
"""Pointers that are accessed one element at a time, so that their alignment is of no matter."""
