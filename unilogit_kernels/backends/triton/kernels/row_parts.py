"""Parts of a row: what is known of some of its columns, folded tile by tile, merged, and kept."""

from typing import NamedTuple

import triton
import triton.language as tl

from unilogit_kernels.backends.triton.kernels.row_maths import (
    LOG2_E,
    LOWEST,
    LOWEST_MAXIMUM,
    NEGATIVE_INFINITY,
    binary_shift,
    exponent,
    finite_shift,
    moved_dot,
    ratio,
    rounded_product,
    with_excess,
)
from unilogit_kernels.maths import row_state

NO_COLUMN = tl.constexpr(row_state.NO_COLUMN)

# Rows of a state, which `parts` of rows have too: `[rows, n, parts]`.
ROW_MAX = tl.constexpr(row_state.ROW_MAX)
ROW_SUM = tl.constexpr(row_state.ROW_SUM)
TARGET = tl.constexpr(row_state.TARGET)
RUNNER_UP = tl.constexpr(row_state.RUNNER_UP)
COUNT = tl.constexpr(row_state.COUNT)
LINEAR = tl.constexpr(row_state.LINEAR)
DOT = tl.constexpr(row_state.DOT)
SQUARE = tl.constexpr(row_state.SQUARE)


class Part(NamedTuple):
    """What is known of some columns of a row: the statistics of `row_state` under their names.

    What a kernel does not compute (`Needs`) is some tensor that nobody reads. Of threads and
    programs, `count` and `linear` leave out columns of -inf, as which the label and what is outside
    of a mask are folded; `with_infinite` puts back how many there were.
    """

    row_max: tl.tensor
    row_sum: tl.tensor
    column: tl.tensor
    count: tl.tensor
    linear: tl.tensor
    dot: tl.tensor
    square: tl.tensor


# ---- of the columns so far -----------------------------------------------------------------------


@triton.jit
def empty_parts(LOGITS: tl.constexpr, WALK: tl.constexpr):
    """The part of each thread before it has seen a column."""
    LOWEST_SO_FAR: tl.constexpr = LOWEST_MAXIMUM if LOGITS.binary else NEGATIVE_INFINITY
    lowest = tl.full([WALK.threads], LOWEST_SO_FAR, tl.float32)
    column = tl.full([WALK.threads], NO_COLUMN, tl.int32)
    zero = tl.full([WALK.threads], 0.0, tl.float32)
    return Part(lowest, zero, column, zero, zero, zero, zero)


@triton.jit
def load_part(pointer, stride, mask, LOGITS: tl.constexpr):
    """Parts from memory, where row k of a state is `k * stride` further; empty beside the mask."""
    row_max = _load(pointer + ROW_MAX * stride, mask, NEGATIVE_INFINITY)
    row_sum = _load(pointer + ROW_SUM * stride, mask, 0.0)
    column, count, linear, dot, square = row_sum, row_sum, row_sum, row_sum, row_sum
    if LOGITS.needs.runner_up:
        column = column_of(_load(pointer + RUNNER_UP * stride, mask, 0.0))
    if LOGITS.needs.linear:
        count = _load(pointer + COUNT * stride, mask, 0.0)
        linear = _load(pointer + LINEAR * stride, mask, 0.0)
    if LOGITS.needs.dot:
        dot = _load(pointer + DOT * stride, mask, 0.0)
    if LOGITS.needs.square:
        square = _load(pointer + SQUARE * stride, mask, 0.0)
    return Part(row_max, row_sum, column, count, linear, dot, square)


@triton.jit
def _load(pointer, mask, other):
    return tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=other)


@triton.jit
def store_part(pointer, stride, part, LOGITS: tl.constexpr):
    """The inverse of `load_part`; rows of what was not computed stay as they are."""
    if LOGITS.needs.runner_up:
        tl.store(pointer + RUNNER_UP * stride, bits_of(part.column))
    tl.store(pointer + ROW_MAX * stride, part.row_max)
    tl.store(pointer + ROW_SUM * stride, part.row_sum)
    if LOGITS.needs.linear:
        tl.store(pointer + COUNT * stride, part.count)
        tl.store(pointer + LINEAR * stride, part.linear)
    if LOGITS.needs.dot:
        tl.store(pointer + DOT * stride, part.dot)
    if LOGITS.needs.square:
        tl.store(pointer + SQUARE * stride, part.square)


@triton.jit
def where_part(condition, a, b):
    """`a` where the condition holds, else `b`."""
    return Part(
        tl.where(condition, a.row_max, b.row_max),
        tl.where(condition, a.row_sum, b.row_sum),
        tl.where(condition, a.column, b.column),
        tl.where(condition, a.count, b.count),
        tl.where(condition, a.linear, b.linear),
        tl.where(condition, a.dot, b.dot),
        tl.where(condition, a.square, b.square),
    )


# ---- a tile more ---------------------------------------------------------------------------------


@triton.jit
def largest(x, z, LOGITS: tl.constexpr):
    """The largest `z` of each thread in a tile of logits `x`."""
    if LOGITS.packs:
        COUNT: tl.constexpr = x.shape[0] * x.shape[2]
        pairs = tl.reshape(tl.permute(x, (1, 0, 2)), (x.shape[1], COUNT))
        tile_max = tl.max(_larger_halves(pairs).to(tl.float32), 1)
    else:
        tile_max = tl.max(tl.max(z, 2), 0)
    return tile_max


@triton.jit
def _larger_halves(x):
    """Of each thread's numbers the largest two, as one word holds them, of either half of words."""
    if x.shape[1] > 2:
        halves = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
        a, b = tl.split(halves)
        both = tl.inline_asm_elementwise(
            "max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2
        )
        x = _larger_halves(both)
    return x


@triton.jit
def fold(part, z, tile_max, columns, LOGITS: tl.constexpr):
    """Add a tile to the part that each thread keeps.

    Args:
        part: Of each thread.
        z: The tile's logits; -inf where there is no column, and at the label.
        columns: Their columns in the vocabulary.
    """
    column = part.column
    if LOGITS.needs.runner_up:
        column = _fold_column(part.row_max, column, z, tile_max, columns)
    row_max = tl.maximum(part.row_max, tile_max)
    if LOGITS.binary:
        factor, shift = binary_shift(row_max)
        t = exponent(z, factor[None, :, None], shift[None, :, None])
        tile_sum = tl.sum(tl.sum(tl.exp2(t), 2), 0)
        weight = tl.exp2(rounded_product(part.row_max, factor) + shift)
        row_sum = part.row_sum * weight + tile_sum
        folded = Part(row_max, row_sum, column, part.count, part.linear, part.dot, part.square)
    else:
        folded = _fold_moments(part, z, row_max, column, LOGITS)
    return folded


@triton.jit
def _fold_moments(part, z, row_max, column, LOGITS: tl.constexpr):
    count, linear, dot, square = part.count, part.linear, part.dot, part.square
    shift = finite_shift(row_max)
    s = z - shift[None, :, None]
    if LOGITS.needs.linear:
        linear += count * (finite_shift(part.row_max) - shift)
        is_there = z != NEGATIVE_INFINITY
        count += tl.sum(tl.sum(is_there.to(tl.float32), 2), 0)
        linear += tl.sum(tl.sum(tl.where(is_there, s, 0.0), 2), 0)
    terms = tl.exp2(s * LOG2_E)
    move = part.row_max - shift
    weight = tl.exp2(move * LOG2_E)
    tile_sum = tl.sum(tl.sum(terms, 2), 0)
    row_sum = part.row_sum * weight + tile_sum
    if LOGITS.needs.dot:
        old_share, dot = moved_dot(part.row_sum, dot, move, 0.0)
        s = tl.maximum(s, LOWEST)
        tile_dot = tl.sum(tl.sum(terms * s, 2), 0)
        if LOGITS.needs.square:
            tile_mean = ratio(tile_dot, tile_sum)
            gap = s - tile_mean[None, :, None]
            between = ratio(dot, old_share) - tile_mean
            square = square * weight + tl.sum(tl.sum(terms * (gap * gap), 2), 0)
            square += ratio(old_share * tile_sum, row_sum) * (between * between)
        dot += tile_dot
    return Part(row_max, row_sum, column, count, linear, dot, square)


@triton.jit
def _fold_column(row_max, column, z, tile_max, columns):
    """Where each thread's maximum is, with a tile.

    Of equal ones, the lowest column, in whatever order tiles come.
    """
    here = tl.where(z == tile_max[None, :, None], columns, NO_COLUMN)
    first = tl.min(tl.min(here, 2), 0)
    first = tl.where(tile_max == row_max, tl.minimum(first, column), first)
    return tl.where(tile_max < row_max, column, first)


# ---- parts of one row ----------------------------------------------------------------------------


@triton.jit
def merge_parts(part, LOGITS: tl.constexpr):
    """The one merge of parts of a row: threads, programs, and the state of earlier columns.

    NaN spreads through the sum, since a GPU's maximum drops it.
    """
    highest = tl.max(part.row_max, 0)
    shift = finite_shift(highest)
    move = part.row_max - shift
    weight = tl.exp2(move * LOG2_E)
    shares = part.row_sum * weight
    row_sum = tl.sum(shares, 0)
    row_max = tl.where(row_sum != row_sum, float("nan"), highest)
    column, count, linear, dot, square = row_sum, row_sum, row_sum, row_sum, row_sum
    if LOGITS.needs.runner_up:
        column = _merge_columns(part.row_max, part.column, row_max)
    if LOGITS.needs.linear:
        linear = tl.sum(part.linear + part.count * (finite_shift(part.row_max) - shift), 0)
        count = tl.sum(part.count, 0)
    if LOGITS.needs.dot:
        _, dots = moved_dot(part.row_sum, part.dot, move, 0.0)
        dot = tl.sum(dots, 0)
        if LOGITS.needs.square:
            between = ratio(dots, shares) - ratio(dot, row_sum)
            square = tl.sum(weight * part.square + shares * (between * between), 0)
    return Part(row_max, row_sum, column, count, linear, dot, square)


@triton.jit
def merge_threads(part, LOGITS: tl.constexpr):
    """The part of a program, from those that its threads have folded.

    Returns:
        The part, and its sum as a gradient takes it, with the `exponent`s of the part's maximum.
    """
    if LOGITS.binary:
        highest = tl.max(part.row_max, 0)
        factor, shift = binary_shift(highest)
        shares = part.row_sum * tl.exp2(rounded_product(part.row_max, factor) + shift)
        binary_sum = tl.sum(shares, 0)
        row_sum = with_excess(binary_sum, highest, -1)
        # The maximum's own term is no 0.
        row_max = tl.where(row_sum == 0.0, NEGATIVE_INFINITY, highest)
        row_max = tl.where(row_sum != row_sum, float("nan"), row_max)
        column = row_sum
        if LOGITS.needs.runner_up:
            column = _merge_columns(part.row_max, part.column, row_max)
        merged = Part(row_max, row_sum, column, row_sum, row_sum, row_sum, row_sum)
    else:
        merged = merge_parts(part, LOGITS)
        binary_sum = merged.row_sum
    return merged, binary_sum


@triton.jit
def merge_two(a, b, LOGITS: tl.constexpr):
    """`merge_parts` of two that are numbers."""
    return merge_parts(where_part(tl.arange(0, 2) == 0, a, b), LOGITS)


@triton.jit
def with_infinite(part, known, columns, LOGITS: tl.constexpr):
    """The state after a tile of so many columns of the rest, which threads have counted but -inf.

    Args:
        part: The tile's, and what was known before.
        known: What was known before.
        columns: Of the tile.
    """
    count, linear = part.count, part.linear
    if LOGITS.needs.linear:
        count = known.count + columns.to(tl.float32)
        linear = tl.where(part.count < count, NEGATIVE_INFINITY, linear)
    return Part(part.row_max, part.row_sum, part.column, count, linear, part.dot, part.square)


@triton.jit
def _merge_columns(part_max, part_column, row_max):
    column = tl.min(tl.where(part_max == row_max, part_column, NO_COLUMN), 0)
    return tl.where(row_max == NEGATIVE_INFINITY, NO_COLUMN, column)


@triton.jit
def bits_of(column):
    """A column as a state holds it: a float32 counts to 2^24 only."""
    return column.to(tl.float32, bitcast=True)


@triton.jit
def column_of(bits):
    """The inverse of `bits_of`."""
    return bits.to(tl.int32, bitcast=True)
