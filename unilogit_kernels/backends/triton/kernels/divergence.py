"""The two-row kernels: statistics of pairs of rows, their merge, and gradient rows."""

from typing import NamedTuple

import triton
import triton.language as tl

from unilogit_kernels.backends.triton.kernels.row_maths import (
    LOG2_E,
    NEGATIVE_INFINITY,
    Factors,
    Logits,
    finite_shift,
    load_target,
    moved_dot,
    transformed,
)
from unilogit_kernels.backends.triton.kernels.row_walk import (
    UNALIGNED,
    UNSPECIALIZED,
    Row,
    body_of,
    fold_row,
    label_column,
    load_columns,
    row_of,
    share_of_row,
    store_columns,
    write_row,
    zero_tile,
)


class Pair(NamedTuple):
    """What of two matrices of logits is decided when a kernel is compiled.

    Attributes:
        a: See `Logits`.
        b: See `Logits`.
        student_is_a: Whose curve the gradient goes through.
    """

    a: Logits
    b: Logits
    student_is_a: bool


class PairReading(NamedTuple):
    """What a tile of statistics is computed from."""

    a: Row
    b: Row
    a_factors: Factors
    b_factors: Factors


class PairWriting(NamedTuple):
    """What a tile of a gradient row is computed from: see `RowKernels`.

    Attributes:
        rows: Read.
        out: Written; may be the student's logits.
        a_shift: The finite maximum of row a.
        b_shift: The same of row b.
        alpha: Coefficients, of which the student's constant scale is a factor already.
        beta: See there.
        gamma: See there.
        at_label: See there.
    """

    rows: PairReading
    out: Row
    a_shift: tl.tensor
    b_shift: tl.tensor
    alpha: tl.tensor
    beta: tl.tensor
    gamma: tl.tensor
    at_label: tl.tensor


# ---- tiles ---------------------------------------------------------------------------------------


@triton.jit
def fold_pair_tile(
    parts, rows, columns, inside, label, label_is_near, PAIR: tl.constexpr, WALK: tl.constexpr
):
    """Fold a tile into each thread's maxima, sums and dot product, but for the label's column."""
    a_max, a_sum, a_dot, b_max, b_sum = parts
    A_EVICTION: tl.constexpr = PAIR.a.eviction  # triton 3.6 hands on no string of a tuple
    B_EVICTION: tl.constexpr = PAIR.b.eviction
    a = load_columns(rows.a, columns, inside, A_EVICTION, WALK.strided)
    b = load_columns(rows.b, columns, inside, B_EVICTION, WALK.strided)
    a, _ = transformed(a, rows.a_factors, PAIR.a)
    b, _ = transformed(b, rows.b_factors, PAIR.b)
    if inside is not None:
        a = tl.where(inside, a, NEGATIVE_INFINITY)
        b = tl.where(inside, b, NEGATIVE_INFINITY)
    if label_is_near:
        a = tl.where(columns == label, NEGATIVE_INFINITY, a)
        b = tl.where(columns == label, NEGATIVE_INFINITY, b)
    new_a_max = tl.maximum(a_max, tl.max(tl.max(a, 2), 0))
    new_b_max = tl.maximum(b_max, tl.max(tl.max(b, 2), 0))
    a_shift, b_shift = finite_shift(new_a_max), finite_shift(new_b_max)
    b_move = b_max - b_shift
    a_sum, a_dot = moved_dot(a_sum, a_dot, a_max - a_shift, b_move)
    s = a - a_shift[None, :, None]
    t = b - b_shift[None, :, None]
    p = tl.exp2(s * LOG2_E)
    dots = tl.where(p == 0.0, 0.0, p * (s - t))
    a_sum += tl.sum(tl.sum(p, 2), 0)
    a_dot += tl.sum(tl.sum(dots, 2), 0)
    b_sum = b_sum * tl.exp2(b_move * LOG2_E) + tl.sum(tl.sum(tl.exp2(t * LOG2_E), 2), 0)
    return new_a_max, a_sum, a_dot, new_b_max, b_sum


@triton.jit
def write_pair_tile(
    row, columns, inside, label, label_is_near, PAIR: tl.constexpr, WALK: tl.constexpr
):
    """Write a tile of a gradient row."""
    a = load_columns(row.rows.a, columns, inside, "evict_first", WALK.strided)
    b = load_columns(row.rows.b, columns, inside, "evict_first", WALK.strided)
    a, a_slope = transformed(a, row.rows.a_factors, PAIR.a)
    b, b_slope = transformed(b, row.rows.b_factors, PAIR.b)
    s, t = a - row.a_shift, b - row.b_shift
    p = tl.exp2(s * LOG2_E)
    # Where t is -inf, 0 * inf is not meant.
    gap = tl.where(row.beta == 0.0, 0.0, s - t)
    values = tl.where(p == 0.0, 0.0, p * (row.alpha + row.beta * gap))
    values += row.gamma * tl.exp2(t * LOG2_E)
    if label_is_near:
        values = tl.where(columns == label, row.at_label, values)
    if PAIR.student_is_a:
        if PAIR.a.capped:
            values = values * a_slope
    else:
        if PAIR.b.capped:
            values = values * b_slope
    store_columns(row.out, columns, inside, values, WALK.strided)


# ---- rows ----------------------------------------------------------------------------------------


@triton.jit
def merge_pair_parts(parts):
    """The one merge of parts of a pair of rows; NaN spreads through the sums."""
    part_a_max, part_a_sum, part_a_dot, part_b_max, part_b_sum = parts
    a_max, b_max = tl.max(part_a_max, 0), tl.max(part_b_max, 0)
    a_move, b_move = part_a_max - finite_shift(a_max), part_b_max - finite_shift(b_max)
    a_sum, a_dot = moved_dot(part_a_sum, part_a_dot, a_move, b_move)
    b_sum = part_b_sum * tl.exp2(b_move * LOG2_E)
    return a_max, tl.sum(a_sum, 0), tl.sum(a_dot, 0), b_max, tl.sum(b_sum, 0)


@triton.jit
def load_pair_parts(pointer, stride, mask):
    """Maximum, sum, dot product, maximum and sum, `stride` apart; empty parts outside of a mask."""
    a_max = tl.load(pointer, mask=mask, other=NEGATIVE_INFINITY)
    a_sum = tl.load(pointer + stride, mask=mask, other=0.0)
    a_dot = tl.load(pointer + 2 * stride, mask=mask, other=0.0)
    b_max = tl.load(pointer + 3 * stride, mask=mask, other=NEGATIVE_INFINITY)
    b_sum = tl.load(pointer + 4 * stride, mask=mask, other=0.0)
    return a_max, a_sum, a_dot, b_max, b_sum


@triton.jit
def store_pair_part(pointer, stride, part):
    """The inverse of `load_pair_parts`, for one part."""
    tl.store(pointer, part[0])
    tl.store(pointer + stride, part[1])
    tl.store(pointer + 2 * stride, part[2])
    tl.store(pointer + 3 * stride, part[3])
    tl.store(pointer + 4 * stride, part[4])


@triton.jit
def store_targets(state, stride, label, rows, PAIR: tl.constexpr, STRIDED: tl.constexpr):
    """The labels' logits, if the label is among these columns."""
    a_target = load_target(rows.a, label, rows.a_factors, PAIR.a, STRIDED)
    b_target = load_target(rows.b, label, rows.b_factors, PAIR.b, STRIDED)
    tl.store(state + 5 * stride, a_target, mask=label >= 0)
    tl.store(state + 6 * stride, b_target, mask=label >= 0)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def divergence_update_kernel(
    a,
    b,
    labels,
    state,
    parts,
    a_offset,
    a_row_stride,
    a_column_stride,
    b_offset,
    b_row_stride,
    b_column_stride,
    state_stride,
    first_column,
    v,
    blocks_per_part,
    a_scale,
    a_softcap,
    b_scale,
    b_softcap,
    B_LEADS: tl.constexpr,
    PAIR: tl.constexpr,
    WALK: tl.constexpr,
):
    """Statistics of pairs of rows `[n, v]`; grid `(n, parts of a row)`.

    Args:
        state: `[7, n]`, updated in place where a row is one part.
        parts: None then, else `[5, n, parts]`.
        B_LEADS: Whether the rows of b, and not those of a, decide where a body begins.
    """
    row_index = tl.program_id(0).to(tl.int64)
    state_stride = state_stride.to(tl.int64)
    part = tl.program_id(1)
    count = tl.num_programs(1)
    label = label_column(labels, row_index, first_column, v)
    a_row = row_of(a, a_offset, a_row_stride, a_column_stride, row_index)
    b_row = row_of(b, b_offset, b_row_stride, b_column_stride, row_index)
    a_factors, b_factors = Factors(a_scale, a_softcap), Factors(b_scale, b_softcap)
    rows = PairReading(a_row, b_row, a_factors, b_factors)
    if B_LEADS:
        share = share_of_row(b_row, v, part, count, blocks_per_part, WALK)
    else:
        share = share_of_row(a_row, v, part, count, blocks_per_part, WALK)
    a_body = body_of(a_row, share, PAIR.a.alignment)
    b_body = body_of(b_row, share, PAIR.b.alignment)
    body = PairReading(a_body, b_body, a_factors, b_factors)
    state += row_index
    thread = tl.arange(0, WALK.threads)
    # What is known of the row so far, if this is all of it, is where the first thread begins.
    seen = load_pair_parts(state + thread * 0, state_stride, tl.where(thread == 0, count, 0) == 1)
    seen = fold_row(seen, rows, body, label, share, fold_pair_tile, PAIR, WALK)
    whole = merge_pair_parts(seen)
    if parts is None:
        store_pair_part(state, state_stride, whole)
        store_targets(state, state_stride, label, rows, PAIR, WALK.strided)
    else:
        store_pair_part(
            parts + row_index * count + part, tl.num_programs(0).to(tl.int64) * count, whole
        )


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def merge_pair_parts_kernel(
    parts,
    a,
    b,
    labels,
    state,
    count,
    a_offset,
    a_row_stride,
    a_column_stride,
    b_offset,
    b_row_stride,
    b_column_stride,
    state_stride,
    first_column,
    v,
    a_scale,
    a_softcap,
    b_scale,
    b_softcap,
    MOST_PARTS: tl.constexpr,
    PAIR: tl.constexpr,
    STRIDED: tl.constexpr,
):
    """Merge the parts of each pair, in one fixed order, into `state`; grid `(n,)`, one warp each.

    Args:
        parts: `[5, n, count]` from `divergence_update_kernel`.
        MOST_PARTS: A power of two, at least `count`.
    """
    row_index = tl.program_id(0).to(tl.int64)
    state_stride = state_stride.to(tl.int64)
    state += row_index
    i = tl.arange(0, MOST_PARTS)
    stride = tl.num_programs(0).to(tl.int64) * count
    part = merge_pair_parts(load_pair_parts(parts + row_index * count + i, stride, i < count))
    # The state so far is one part more.
    both = load_pair_parts(state + tl.arange(0, 2) * 0, state_stride, tl.arange(0, 2) == 0)
    is_new = tl.arange(0, 2) == 1
    whole = merge_pair_parts(
        (
            tl.where(is_new, part[0], both[0]),
            tl.where(is_new, part[1], both[1]),
            tl.where(is_new, part[2], both[2]),
            tl.where(is_new, part[3], both[3]),
            tl.where(is_new, part[4], both[4]),
        )
    )
    store_pair_part(state, state_stride, whole)
    label = label_column(labels, row_index, first_column, v)
    a_row = row_of(a, a_offset, a_row_stride, a_column_stride, row_index)
    b_row = row_of(b, b_offset, b_row_stride, b_column_stride, row_index)
    rows = PairReading(a_row, b_row, Factors(a_scale, a_softcap), Factors(b_scale, b_softcap))
    store_targets(state, state_stride, label, rows, PAIR, STRIDED)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def divergence_gradient_kernel(
    a,
    b,
    labels,
    state,
    coefficients,
    out,
    a_offset,
    a_row_stride,
    a_column_stride,
    b_offset,
    b_row_stride,
    b_column_stride,
    out_offset,
    out_row_stride,
    out_column_stride,
    state_stride,
    coefficient_stride,
    first_column,
    v,
    blocks_per_part,
    a_scale,
    a_softcap,
    b_scale,
    b_softcap,
    derivative,
    PAIR: tl.constexpr,
    WALK: tl.constexpr,
):
    """Gradient rows `[n, v]` of coefficients `[4, n]`; grid `(n, parts of a row)`.

    To be compiled without fused multiply-adds: see `RowKernels.divergence_gradient`.
    """
    row_index = tl.program_id(0).to(tl.int64)
    state_stride = state_stride.to(tl.int64)
    coefficient_stride = coefficient_stride.to(tl.int64)
    part, count = tl.program_id(1), tl.num_programs(1)
    label = label_column(labels, row_index, first_column, v)
    a_row = row_of(a, a_offset, a_row_stride, a_column_stride, row_index)
    b_row = row_of(b, b_offset, b_row_stride, b_column_stride, row_index)
    out_row = row_of(out, out_offset, out_row_stride, out_column_stride, row_index)
    share = share_of_row(out_row, v, part, count, blocks_per_part, WALK)
    out_body = body_of(out_row, share, WALK.alignment)
    coefficients += row_index
    alpha = tl.load(coefficients)
    beta = tl.load(coefficients + coefficient_stride)
    gamma = tl.load(coefficients + 2 * coefficient_stride)
    at_label = tl.load(coefficients + 3 * coefficient_stride)
    if (alpha == 0.0) & (beta == 0.0) & (gamma == 0.0) & (at_label == 0.0):
        write_row(out_row, out_body, label, share, zero_tile, None, WALK)
    else:
        a_factors, b_factors = Factors(a_scale, a_softcap), Factors(b_scale, b_softcap)
        a_body = body_of(a_row, share, PAIR.a.alignment)
        b_body = body_of(b_row, share, PAIR.b.alignment)
        a_shift = finite_shift(tl.load(state + row_index))
        b_shift = finite_shift(tl.load(state + row_index + 3 * state_stride))
        alpha, beta, gamma = alpha * derivative, beta * derivative, gamma * derivative
        at_label = at_label * derivative
        whole = PairWriting(
            PairReading(a_row, b_row, a_factors, b_factors),
            out_row,
            a_shift,
            b_shift,
            alpha,
            beta,
            gamma,
            at_label,
        )
        body = PairWriting(
            PairReading(a_body, b_body, a_factors, b_factors),
            out_body,
            a_shift,
            b_shift,
            alpha,
            beta,
            gamma,
            at_label,
        )
        write_row(whole, body, label, share, write_pair_tile, PAIR, WALK)
