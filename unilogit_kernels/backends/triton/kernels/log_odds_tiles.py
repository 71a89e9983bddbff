"""A tile of a row of logits in the log-odds kernels: folded, or written as its gradient."""

from typing import NamedTuple

import triton
import triton.language as tl

from unilogit_kernels.backends.triton.kernels.row_maths import (
    LOG2_E,
    NEGATIVE_INFINITY,
    NO_COLUMN,
    Factors,
    fold,
    fold_column,
    transformed,
)
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
