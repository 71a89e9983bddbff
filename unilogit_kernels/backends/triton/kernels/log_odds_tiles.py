"""A tile of a row of logits in the log-odds kernels: folded, or written as its gradient."""

from typing import NamedTuple

import triton
import triton.language as tl

from unilogit_kernels.backends.triton.kernels.row_maths import (
    LOG2_E,
    LOWEST,
    NEGATIVE_INFINITY,
    Factors,
    binary_shift,
    exponent,
    finite_shift,
    transformed,
    widened,
)
from unilogit_kernels.backends.triton.kernels.row_parts import fold, largest
from unilogit_kernels.backends.triton.kernels.row_walk import (
    Row,
    body_of,
    fold_row,
    load_columns,
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


class Slopes(NamedTuple):
    """What a gradient row is a multiple or a sum of: see `RowKernels` and `statistics.row_slopes`.

    Attributes:
        rest: The slope of the rest; of the label too where it has no entry of its own.
        at_label: The label's entry, but for dz/dx; or None.
        at_runner_up: The runner-up's; or None.
        runner_up: The runner-up's column; or None.
        tilt: What the logits less their maximum are multiplied by; or None.
        uniform: What is added everywhere; or None.
    """

    rest: tl.tensor
    at_label: tl.tensor
    at_runner_up: tl.tensor
    runner_up: tl.tensor
    tilt: tl.tensor
    uniform: tl.tensor


class Writing(NamedTuple):
    """What a tile of a gradient row is computed from.

    Attributes:
        logits: Read.
        out: Written; may be the logits.
        factors: Of the logits.
        row_max: With `s = z - row_max`, the row is `uniform + (rest + tilt s) exp(s)` times dz/dx
            without its constant factor, which is in the slopes,
        slopes: see there; but at the label and the runner-up, which have entries.
    """

    logits: Row
    out: Row
    factors: Factors
    row_max: tl.tensor
    slopes: Slopes


@triton.jit
def fold_tile(
    parts, row, columns, inside, label, label_is_near, LOGITS: tl.constexpr, WALK: tl.constexpr
):
    """Fold a tile into each thread's parts, but for the label's column."""
    EVICTION: tl.constexpr = LOGITS.eviction  # triton 3.6 hands on no string of a tuple
    if LOGITS.scaled or LOGITS.capped:
        x = load_columns(row.logits, columns, inside, EVICTION, WALK.strided)
        z, _ = transformed(x, row.factors, LOGITS)
        if inside is not None:
            z = tl.where(inside, z, NEGATIVE_INFINITY)
    else:
        x = load_columns(row.logits, columns, inside, EVICTION, WALK.strided, NEGATIVE_INFINITY)
        z = widened(x)
    if label_is_near:
        z = tl.where(columns == label, NEGATIVE_INFINITY, z)
        tile_max = tl.max(tl.max(z, 2), 0)
    else:
        tile_max = largest(x, z, LOGITS)
    return fold(parts, z, tile_max, row.first_column + columns, LOGITS)


@triton.jit
def write_tile(
    row, columns, inside, label, label_is_near, LOGITS: tl.constexpr, WALK: tl.constexpr
):
    """Write a tile of a gradient row."""
    # Nobody reads these logits again: they may leave the cache first.
    x = load_columns(row.logits, columns, inside, "evict_first", WALK.strided)
    z, slope = transformed(x, row.factors, LOGITS)
    slopes = row.slopes
    s = z - row.row_max
    if LOGITS.binary:
        factor, shift = binary_shift(row.row_max)
        terms = tl.exp2(exponent(z, factor, shift))
    else:
        terms = tl.exp2(s * LOG2_E)
    if slopes.tilt is None:
        values = slopes.rest * terms
    else:
        tilted = slopes.rest + slopes.tilt * tl.maximum(s, LOWEST)
        values = slopes.uniform + terms * tilted
    if label_is_near:
        values = tl.where(columns == label, slopes.at_label, values)
    if slopes.runner_up is not None:
        values = tl.where(columns == slopes.runner_up, slopes.at_runner_up, values)
    if LOGITS.capped:
        values = values * slope
    store_columns(row.out, columns, inside, values, WALK.strided)


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
    slopes,
    factors,
    derivative,
    LOGITS: tl.constexpr,
    WALK: tl.constexpr,
):
    """Write the gradient row of slopes; that of zeros is exactly 0, whatever its logits hold.

    Args:
        row_sum: See `merge_threads`.
    """
    size = tl.abs(slopes.rest)
    rest = slopes.rest * derivative
    at_label, at_runner_up, runner_up_in_body = rest, None, None
    if slopes.at_label is not None:
        size = size + tl.abs(slopes.at_label) + tl.abs(slopes.at_runner_up)
        at_label = slopes.at_label * derivative
        at_runner_up = slopes.at_runner_up * derivative
        runner_up_in_body = slopes.runner_up - share.peeled
    tilt, uniform = None, None
    if slopes.tilt is not None:
        size = size + tl.abs(slopes.tilt) + tl.abs(slopes.uniform)
        # A row of nothing but -inf has neither a maximum nor a sum.
        row_max, row_sum = finite_shift(row_max), tl.where(row_sum == 0.0, 1.0, row_sum)
        tilt = -slopes.tilt * derivative / row_sum
        uniform = slopes.uniform * derivative
    rest = -rest / row_sum
    in_whole = Slopes(rest, at_label, at_runner_up, slopes.runner_up, tilt, uniform)
    in_body = Slopes(rest, at_label, at_runner_up, runner_up_in_body, tilt, uniform)
    whole = Writing(logits, out, factors, row_max, in_whole)
    body_logits = body_of(logits, share, LOGITS.alignment)
    body_out = body_of(out, share, WALK.alignment)
    body = Writing(body_logits, body_out, factors, row_max, in_body)
    if size == 0.0:
        write_row(out, body_out, label, share, zero_tile, None, WALK)
    else:
        write_row(whole, body, label, share, write_tile, LOGITS, WALK)
