"""The log-odds kernels: statistics of rows, their merge, gradient rows, and all in one visit."""

from typing import NamedTuple

import triton
import triton.language as tl

from unilogit_kernels.backends.triton.kernels.row_maths import (
    LOG2_E,
    NEGATIVE_INFINITY,
    NO_COLUMN,
    Factors,
    Vocabulary,
    bits_of,
    column_of,
    evaluate_objective,
    fold,
    fold_column,
    load_target,
    log_odds,
    merge_columns,
    merge_parts,
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


class Reading(NamedTuple):
    """What a tile of statistics is computed from.

    Attributes:
        logits: Read.
        factors: Of the logits.
        first_column: Of the vocabulary, at column 0.
    """

    logits: Row
    factors: Factors
    first_column: tl.tensor


class Entries(NamedTuple):
    """Entries of a gradient row that are not as the rest's, but for dz/dx.

    Attributes:
        at_label: The label's.
        at_runner_up: The runner-up's.
        runner_up: Its column.
    """

    at_label: tl.tensor
    at_runner_up: tl.tensor
    runner_up: tl.tensor


class Writing(NamedTuple):
    """What a tile of a gradient row is computed from.

    Attributes:
        logits: Read.
        out: Written; may be the logits.
        factors: Of the logits.
        row_max: The row is `coefficient * exp(z - row_max)` times dz/dx without its constant
            factor, which is in the coefficient,
        coefficient: see there,
        entries: but at the label, and maybe the runner-up, instead of the product of coefficient
            and exponential these, times the constant factor.
    """

    logits: Row
    out: Row
    factors: Factors
    row_max: tl.tensor
    coefficient: tl.tensor
    entries: Entries


# ---- tiles ---------------------------------------------------------------------------------------


@triton.jit
def fold_tile(
    parts, row, columns, inside, label, label_is_near, LOGITS: tl.constexpr, WALK: tl.constexpr
):
    """Fold a tile into each thread's parts, but for the label's column."""
    x = load_columns(row.logits, columns, inside, LOGITS.eviction, WALK.strided)
    z, _ = transformed(x, row.factors, LOGITS)
    if inside is not None:
        z = tl.where(inside, z, NEGATIVE_INFINITY)
    if label_is_near:
        z = tl.where(columns == label, NEGATIVE_INFINITY, z)
    part_max, part_sum, part_column = parts
    if LOGITS.runner_up:
        part_column = fold_column(part_max, part_column, z, row.first_column + columns)
    part_max, part_sum = fold(part_max, part_sum, z)
    return part_max, part_sum, part_column


@triton.jit
def write_tile(
    row, columns, inside, label, label_is_near, LOGITS: tl.constexpr, WALK: tl.constexpr
):
    """Write a tile of a gradient row."""
    # Nobody reads these logits again: they may leave the cache first.
    x = load_columns(row.logits, columns, inside, "evict_first", WALK.strided)
    z, slope = transformed(x, row.factors, LOGITS)
    values = row.coefficient * tl.exp2((z - row.row_max) * LOG2_E)
    if label_is_near:
        values = tl.where(columns == label, row.entries.at_label, values)
    if LOGITS.runner_up:
        values = tl.where(columns == row.entries.runner_up, row.entries.at_runner_up, values)
    if LOGITS.capped:
        values = values * slope
    store_columns(row.out, columns, inside, values, WALK.strided)


# ---- rows ----------------------------------------------------------------------------------------


@triton.jit
def empty_parts(WALK: tl.constexpr):
    """Each thread's maximum and sum, and where the maximum is, before it has seen a column."""
    part_max = tl.full([WALK.threads], NEGATIVE_INFINITY, tl.float32)
    part_column = tl.full([WALK.threads], NO_COLUMN, tl.int32)
    return part_max, tl.full([WALK.threads], 0.0, tl.float32), part_column


@triton.jit
def rest_statistics(
    parts, logits, label, share, factors, first_column, LOGITS: tl.constexpr, WALK: tl.constexpr
):
    """Fold a program's share of a row into each thread's parts, but for the label's column."""
    whole = Reading(logits, factors, first_column)
    body_logits = body_of(logits, share, LOGITS.alignment)
    body = Reading(body_logits, factors, first_column + share.peeled)
    return fold_row(parts, whole, body, label, share, fold_tile, LOGITS, WALK)


@triton.jit
def gradient_row(
    logits,
    out,
    label,
    share,
    row_max,
    row_sum,
    slope,
    entries,
    factors,
    derivative,
    LOGITS: tl.constexpr,
    WALK: tl.constexpr,
):
    """Write the gradient row of a slope; that of 0 is exactly 0, whatever its logits hold.

    Args:
        slope: Of the rest, and of the label where there are no entries.
        entries: None where the runner-up is as the rest.
    """
    at_label = slope * derivative
    coefficient = -at_label / row_sum
    if entries is None:
        in_whole = Entries(at_label, 0.0, -1)
        in_body = in_whole
        size = tl.abs(slope)
    else:
        size = tl.abs(slope) + tl.abs(entries.at_label) + tl.abs(entries.at_runner_up)
        at_label = entries.at_label * derivative
        at_runner_up = entries.at_runner_up * derivative
        in_whole = Entries(at_label, at_runner_up, entries.runner_up)
        in_body = Entries(at_label, at_runner_up, entries.runner_up - share.peeled)
    whole = Writing(logits, out, factors, row_max, coefficient, in_whole)
    body_logits = body_of(logits, share, LOGITS.alignment)
    body_out = body_of(out, share, WALK.alignment)
    body = Writing(body_logits, body_out, factors, row_max, coefficient, in_body)
    if size == 0.0:
        write_row(out, body_out, label, share, zero_tile, None, WALK)
    else:
        write_row(whole, body, label, share, write_tile, LOGITS, WALK)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def log_odds_update_kernel(
    logits,
    labels,
    row_weight,
    state,
    parts,
    offset,
    row_stride,
    column_stride,
    state_stride,
    first_column,
    v,
    blocks_per_part,
    scale,
    softcap,
    LOGITS: tl.constexpr,
    WALK: tl.constexpr,
):
    """Statistics of `[n, v]` logits; grid `(n, parts of a row)`.

    Args:
        row_weight: None, or `[n]`: a row of weight 0 is not read, and its parts are empty.
        state: `[3, n]`, `[4, n]` with the runner-up, updated in place where a row is one part.
        parts: None then, else `[2, n, parts]`: maximum and sum of each part; a third with the
            runner-up, its column's bits.
    """
    row_index = tl.program_id(0).to(tl.int64)
    state_stride = state_stride.to(tl.int64)
    part = tl.program_id(1)
    count = tl.num_programs(1)
    label = label_column(labels, row_index, first_column, v)
    row = row_of(logits, offset, row_stride, column_stride, row_index)
    factors = Factors(scale, softcap)

    part_max, part_sum, part_column = empty_parts(WALK)
    state += row_index
    if parts is None:
        # What is known of the row so far is where the first thread begins.
        is_first = tl.arange(0, WALK.threads) == 0
        part_max = tl.where(is_first, tl.load(state), part_max)
        part_sum = tl.where(is_first, tl.load(state + state_stride), part_sum)
        if LOGITS.runner_up:
            so_far = column_of(tl.load(state + 3 * state_stride))
            part_column = tl.where(is_first, so_far, part_column)
    is_read = True
    if row_weight is not None:
        is_read = tl.load(row_weight + row_index) != 0.0
    if is_read:
        share = share_of_row(row, v, part, count, blocks_per_part, WALK)
        part_max, part_sum, part_column = rest_statistics(
            (part_max, part_sum, part_column),
            row,
            label,
            share,
            factors,
            first_column,
            LOGITS,
            WALK,
        )
    row_max, row_sum = merge_parts(part_max, part_sum)
    if LOGITS.runner_up:
        column = bits_of(merge_columns(part_max, part_column, row_max))
        if parts is None:
            tl.store(state + 3 * state_stride, column)
        else:
            plane = tl.num_programs(0).to(tl.int64) * count
            tl.store(parts + 2 * plane + row_index * count + part, column)
    if parts is None:
        tl.store(state, row_max)
        tl.store(state + state_stride, row_sum)
        target = load_target(row, label, factors, LOGITS, WALK.strided)
        tl.store(state + 2 * state_stride, target, mask=label >= 0)
    else:
        parts += row_index * count + part
        tl.store(parts, row_max)
        tl.store(parts + tl.num_programs(0).to(tl.int64) * count, row_sum)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def merge_parts_kernel(
    parts,
    logits,
    labels,
    row_weight,
    state,
    values,
    slopes,
    count,
    offset,
    row_stride,
    column_stride,
    state_stride,
    first_column,
    v,
    scale,
    softcap,
    uniform_log_odds,
    softplus_uniform,
    inverse_vocab,
    MOST_PARTS: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    LOGITS: tl.constexpr,
    STRIDED: tl.constexpr,
):
    """Merge the parts of each row, in one fixed order, into `state`; grid `(n,)`, one warp each.

    With several warps, one could store the state before another has loaded it.

    Args:
        parts: `[2, n, count]`, `[3, n, count]` with the runner-up, from `log_odds_update_kernel`.
        values: `[n]`, receives `f(d)` where there is an objective.
        slopes: `[n]`, receives `row_weight * f'(d)`.
        MOST_PARTS: A power of two above `count`.
        OBJECTIVE: Its name, or None to leave it at the state.
    """
    row_index = tl.program_id(0).to(tl.int64)
    state_stride = state_stride.to(tl.int64)
    state += row_index
    i = tl.arange(0, MOST_PARTS)
    is_part = i < count
    parts += row_index * count + i
    part_max = tl.load(parts, mask=is_part, other=NEGATIVE_INFINITY)
    parts += tl.num_programs(0).to(tl.int64) * count
    part_sum = tl.load(parts, mask=is_part, other=0.0)
    # The state so far is one part more.
    part_max = tl.where(i == count, tl.load(state), part_max)
    part_sum = tl.where(i == count, tl.load(state + state_stride), part_sum)
    row_max, row_sum = merge_parts(part_max, part_sum)
    if LOGITS.runner_up:
        parts += tl.num_programs(0).to(tl.int64) * count
        part_column = column_of(tl.load(parts, mask=is_part, other=0.0))
        so_far = column_of(tl.load(state + 3 * state_stride))
        part_column = tl.where(i == count, so_far, part_column)
        column = merge_columns(part_max, part_column, row_max)
        tl.store(state + 3 * state_stride, bits_of(column))
    tl.store(state, row_max)
    tl.store(state + state_stride, row_sum)

    label = label_column(labels, row_index, first_column, v)
    row = row_of(logits, offset, row_stride, column_stride, row_index)
    target = load_target(row, label, Factors(scale, softcap), LOGITS, STRIDED)
    tl.store(state + 2 * state_stride, target, mask=label >= 0)
    if OBJECTIVE is not None:
        vocabulary = Vocabulary(uniform_log_odds, softplus_uniform, inverse_vocab)
        d = log_odds(row_max, row_sum, target, label >= 0)
        value, slope = evaluate_objective(d, vocabulary, OBJECTIVE)
        weight = tl.load(row_weight + row_index)
        tl.store(values + row_index, tl.where(weight == 0.0, 0.0, value))
        tl.store(slopes + row_index, tl.where(weight == 0.0, 0.0, weight * slope))


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def log_odds_gradient_kernel(
    logits,
    labels,
    state,
    slopes,
    out,
    offset,
    row_stride,
    column_stride,
    out_offset,
    out_row_stride,
    out_column_stride,
    state_stride,
    slope_stride,
    first_column,
    v,
    blocks_per_part,
    scale,
    softcap,
    derivative,
    LOGITS: tl.constexpr,
    WALK: tl.constexpr,
):
    """Gradient rows `[n, v]`; grid `(n, parts of a row)`; `out` may be `logits`.

    Args:
        slopes: `[n]`; with the runner-up `[3, n]`, see `row_state.row_slopes`.
    """
    row_index = tl.program_id(0).to(tl.int64)
    state_stride = state_stride.to(tl.int64)
    slope_stride = slope_stride.to(tl.int64)
    row = row_of(logits, offset, row_stride, column_stride, row_index)
    out_row = row_of(out, out_offset, out_row_stride, out_column_stride, row_index)
    label = label_column(labels, row_index, first_column, v)
    part, count = tl.program_id(1), tl.num_programs(1)
    share = share_of_row(out_row, v, part, count, blocks_per_part, WALK)
    state += row_index
    row_max, row_sum = tl.load(state), tl.load(state + state_stride)
    slopes += row_index
    slope = tl.load(slopes)
    entries = None
    if LOGITS.runner_up:
        at_label, at_runner_up = tl.load(slopes + slope_stride), tl.load(slopes + 2 * slope_stride)
        column = column_of(tl.load(state + 3 * state_stride)) - first_column
        entries = Entries(at_label, at_runner_up, column)
    factors = Factors(scale, softcap)
    gradient_row(
        row,
        out_row,
        label,
        share,
        row_max,
        row_sum,
        slope,
        entries,
        factors,
        derivative,
        LOGITS,
        WALK,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def log_odds_sweep_kernel(
    logits,
    labels,
    row_weight,
    out,
    values,
    offset,
    row_stride,
    column_stride,
    out_offset,
    out_row_stride,
    out_column_stride,
    v,
    scale,
    softcap,
    derivative,
    uniform_log_odds,
    softplus_uniform,
    inverse_vocab,
    OBJECTIVE: tl.constexpr,
    LOGITS: tl.constexpr,
    WALK: tl.constexpr,
):
    """Statistics, objective and gradient of whole rows in one visit; grid `(n,)`.

    Args:
        row_weight: `[n]`; a row of weight 0 is not read.
        out: `[n, v]`, may be `logits`; None for the values alone.
        values: `[n]`, receives `f(d)`.
    """
    row_index = tl.program_id(0).to(tl.int64)
    label = label_column(labels, row_index, 0, v)
    row = row_of(logits, offset, row_stride, column_stride, row_index)
    if out is None:
        out_row = row
    else:
        out_row = row_of(out, out_offset, out_row_stride, out_column_stride, row_index)
    factors = Factors(scale, softcap)
    share = share_of_row(out_row, v, 0, 1, v, WALK)
    weight = tl.load(row_weight + row_index)
    row_max, row_sum, value, slope = 0.0, 1.0, 0.0, 0.0
    if weight != 0.0:
        target = load_target(row, label, factors, LOGITS, WALK.strided)
        part_max, part_sum, _ = rest_statistics(
            empty_parts(WALK), row, label, share, factors, 0, LOGITS, WALK
        )
        row_max, row_sum = merge_parts(part_max, part_sum)
        d = log_odds(row_max, row_sum, target, label >= 0)
        vocabulary = Vocabulary(uniform_log_odds, softplus_uniform, inverse_vocab)
        value, slope = evaluate_objective(d, vocabulary, OBJECTIVE)
        slope = weight * slope
    tl.store(values + row_index, value)
    if out is not None:
        gradient_row(
            row,
            out_row,
            label,
            share,
            row_max,
            row_sum,
            slope,
            None,
            factors,
            derivative,
            LOGITS,
            WALK,
        )
