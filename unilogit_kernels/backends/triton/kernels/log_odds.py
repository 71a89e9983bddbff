"""The log-odds kernels: statistics of rows, their merge, gradient rows, and all in one pass."""

import triton
import triton.language as tl

from unilogit_kernels.backends.triton.kernels.log_odds_tiles import (
    Slopes,
    gradient_row,
    rest_statistics,
)
from unilogit_kernels.backends.triton.kernels.row_maths import (
    Factors,
    Vocabulary,
    evaluate_objective,
    load_target,
    log_odds,
    with_excess,
)
from unilogit_kernels.backends.triton.kernels.row_parts import (
    ROW_SUM,
    RUNNER_UP,
    TARGET,
    column_of,
    empty_parts,
    load_part,
    merge_parts,
    merge_threads,
    merge_two,
    store_part,
    where_part,
    with_infinite,
)
from unilogit_kernels.backends.triton.kernels.row_walk import (
    UNALIGNED,
    UNSPECIALIZED,
    label_column,
    row_of,
    share_of_row,
)


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
        state: `[rows, n]`, of which what is needed is updated in place where a row is one part.
        parts: None then, else `[rows, n, parts]`, for a state of each part but its label's logit.
    """
    row_index = tl.program_id(0).to(tl.int64)
    state_stride = state_stride.to(tl.int64)
    part = tl.program_id(1)
    count = tl.num_programs(1)
    label = label_column(labels, row_index, first_column, v)
    row = row_of(logits, offset, row_stride, column_stride, row_index)
    factors = Factors(scale, softcap)

    known = empty_parts(LOGITS, WALK)
    state += row_index
    if parts is None:
        # Before the threads meet: the first to leave from there stores it.
        so_far = load_part(state, state_stride, None, LOGITS)
    is_read = True
    if row_weight is not None:
        is_read = tl.load(row_weight + row_index) != 0.0
    if is_read:
        share = share_of_row(row, v, part, count, blocks_per_part, WALK)
        known = rest_statistics(known, row, label, share, factors, first_column, LOGITS, WALK)
    merged, _ = merge_threads(known, LOGITS)
    if parts is None:
        merged = merge_two(so_far, merged, LOGITS)
        merged = with_infinite(merged, so_far, v - (label >= 0), LOGITS)
        store_part(state, state_stride, merged, LOGITS)
        target = load_target(row, label, factors, LOGITS, WALK.strided)
        tl.store(state + TARGET * state_stride, target, mask=label >= 0)
    else:
        plane = tl.num_programs(0).to(tl.int64) * count
        store_part(parts + row_index * count + part, plane, merged, LOGITS)


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
        parts: `[rows, n, count]`, from `log_odds_update_kernel`.
        values: `[n]`, receives `f(d)` where there is an objective.
        slopes: `[n]`, receives `row_weight * f'(d)`.
        MOST_PARTS: A power of two above `count`.
        OBJECTIVE: Its name, or None to leave it at the state.
    """
    row_index = tl.program_id(0).to(tl.int64)
    state_stride = state_stride.to(tl.int64)
    state += row_index
    i = tl.arange(0, MOST_PARTS)
    plane = tl.num_programs(0).to(tl.int64) * count
    known = load_part(parts + row_index * count + i, plane, i < count, LOGITS)
    # The state so far is one part more.
    so_far = load_part(state, state_stride, None, LOGITS)
    merged = merge_parts(where_part(i == count, so_far, known), LOGITS)
    label = label_column(labels, row_index, first_column, v)
    merged = with_infinite(merged, so_far, v - (label >= 0), LOGITS)
    store_part(state, state_stride, merged, LOGITS)

    row = row_of(logits, offset, row_stride, column_stride, row_index)
    target = load_target(row, label, Factors(scale, softcap), LOGITS, STRIDED)
    tl.store(state + TARGET * state_stride, target, mask=label >= 0)
    if OBJECTIVE is not None:
        vocabulary = Vocabulary(uniform_log_odds, softplus_uniform, inverse_vocab)
        d = log_odds(merged.row_max, merged.row_sum, target, label >= 0)
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
    SLOPES: tl.constexpr,
    LOGITS: tl.constexpr,
    WALK: tl.constexpr,
):
    """Gradient rows `[n, v]`; grid `(n, parts of a row)`; `out` may be `logits`.

    Args:
        slopes: `[n]`, `[3, n]` or `[5, n]`: see `RowKernels`.
        SLOPES: How many rows there are.
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
    row_max, row_sum = tl.load(state), tl.load(state + ROW_SUM * state_stride)
    if LOGITS.binary:
        row_sum = with_excess(row_sum, row_max, 1)
    slopes += row_index
    rest = tl.load(slopes)
    at_label, at_runner_up, runner_up, tilt, uniform = None, None, None, None, None
    if SLOPES > 1:
        at_label, at_runner_up = tl.load(slopes + slope_stride), tl.load(slopes + 2 * slope_stride)
        runner_up = column_of(tl.load(state + RUNNER_UP * state_stride)) - first_column
    if SLOPES > 3:
        tilt, uniform = tl.load(slopes + 3 * slope_stride), tl.load(slopes + 4 * slope_stride)
    slope = Slopes(rest, at_label, at_runner_up, runner_up, tilt, uniform)
    factors = Factors(scale, softcap)
    gradient_row(
        row, out_row, label, share, row_max, row_sum, slope, factors, derivative, LOGITS, WALK
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
    """Statistics, objective and gradient of whole rows in one pass; grid `(n,)`.

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
        empty = empty_parts(LOGITS, WALK)
        parts = rest_statistics(empty, row, label, share, factors, 0, LOGITS, WALK)
        merged, row_sum = merge_threads(parts, LOGITS)
        row_max = merged.row_max
        d = log_odds(row_max, merged.row_sum, target, label >= 0)
        vocabulary = Vocabulary(uniform_log_odds, softplus_uniform, inverse_vocab)
        value, slope = evaluate_objective(d, vocabulary, OBJECTIVE)
        slope = weight * slope
    tl.store(values + row_index, value)
    if out is not None:
        slopes = Slopes(slope, None, None, None, None, None)
        gradient_row(
            row, out_row, label, share, row_max, row_sum, slopes, factors, derivative, LOGITS, WALK
        )
