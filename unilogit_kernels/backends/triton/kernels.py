"""Row kernels in Triton: running statistics, gradient rows, both in one visit, and a scale.

A program walks over a row in three kinds of tiles. The body is full tiles from the row's first
16-byte boundary on, without masks; the tail is what is left of it in whole vectors, with one mask
per vector; a few columns at both ends that fill no vector come last. So every access of body and
tail is 128 bits wide, however odd the row's length and position are.

A tile has the shape `[unroll, threads, vector]`, of which a thread owns a slice of the middle axis:
maxima and sums over the other two stay in its registers, and threads meet once per row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Compiled into the kernels, so: no `from __future__ import annotations` in this file, and values
# from outside a kernel must be constexpr.
LOG2_E = tl.constexpr(1.4426950408889634)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
POSITIVE_INFINITY = tl.constexpr(float("inf"))
ACCESS_BYTES = tl.constexpr(16)

# Beyond this sigmoid(-|d|) is 0; it keeps 0 * inf out of bounded values.
SATURATED = tl.constexpr(2e4)

# Above this tanh is computed from the exponential, below it from an odd polynomial (Cephes).
TANH_LIMIT = tl.constexpr(0.625)


class Variant(NamedTuple):
    """What of a kernel is decided when it is compiled.

    Attributes:
        threads: Threads of the program.
        vector: Elements in 128 bits of the output.
        unroll: Vectors of a thread in a body tile, so that its loads are in flight together.
        logits_alignment: Elements that divide the body's offset in every row of logits.
        out_alignment: The same for the output; less than `vector` only where accesses are single.
        strided: Whether neighbouring columns are not neighbours in memory.
        scaled: `z = scale * x`; False where a cap takes the scale in.
        capped: `z = softcap * tanh(scale * x)`, where `scale` has been divided by `softcap`.
    """

    threads: int
    vector: int
    unroll: int
    logits_alignment: int
    out_alignment: int
    strided: bool
    scaled: bool
    capped: bool


class Row(NamedTuple):
    """A row of logits and of the output inside a kernel.

    Attributes:
        logits: Pointer to a 16-byte boundary.
        start: Elements from there to column 0.
        out: As `logits`.
        out_start: As `start`.
        column_stride: Elements from a column of the logits to the next.
        out_column_stride: The same in the output.
        label: Column of the label, or a number that is no column.
    """

    logits: tl.tensor
    start: tl.tensor
    out: tl.tensor
    out_start: tl.tensor
    column_stride: tl.tensor
    out_column_stride: tl.tensor
    label: tl.tensor


class Share(NamedTuple):
    """Which columns of a row a program visits: of body tiles some, and maybe tail and ends.

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


class Factors(NamedTuple):
    """The numbers of a `LogitTransform`.

    Attributes:
        scale: Of the raw logits; where there is a cap, divided by it.
        softcap: The cap.
        derivative: The constant factor of dz/dx, which is the undivided scale.
    """

    scale: tl.tensor
    softcap: tl.tensor
    derivative: tl.tensor


class Vocabulary(NamedTuple):
    """What the objectives know of the vocabulary's size V.

    Attributes:
        uniform_log_odds: `u = -log(V - 1)`.
        softplus_uniform: `log(1 + exp(u))`.
        inverse: `1 / V`.
    """

    uniform_log_odds: tl.tensor
    softplus_uniform: tl.tensor
    inverse: tl.tensor


class Gradient(NamedTuple):
    """A gradient row: `at_label` at the label, elsewhere `coefficient * exp(z - row_max)`."""

    row_max: tl.tensor
    coefficient: tl.tensor
    at_label: tl.tensor


# ---- maths of a tile ---------------------------------------------------------------------------


@triton.jit
def hyperbolic_tangent(t):
    """`tanh(t)` and its derivative `1 - tanh(t)^2`, neither of which cancels."""
    magnitude = tl.abs(t)
    q = tl.exp2(magnitude * (-2 * LOG2_E))
    w = 2 * q / (1 + q)
    square = magnitude * magnitude
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    small = p * square * magnitude + magnitude
    is_small = magnitude < TANH_LIMIT
    value = tl.where(is_small, small, 1 - w)
    slope = tl.where(is_small, 1 - small * small, w * (2 - w))
    return tl.where(t < 0, -value, value), slope


@triton.jit
def transformed(x, factors, VARIANT: tl.constexpr):
    """`z`, and `dz/dx` without the constant factor; 1.0 where there is no cap."""
    z = x.to(tl.float32)
    slope = 1.0
    if VARIANT.capped:
        z, slope = hyperbolic_tangent(z * factors.scale)
        z = z * factors.softcap
    elif VARIANT.scaled:
        z = z * factors.scale
    return z, slope


@triton.jit
def fold(row_max, row_sum, z):
    """Add a tile to the maximum and the sum of exponentials that each thread keeps."""
    new_max = tl.maximum(row_max, tl.max(tl.max(z, 2), 0))
    # -inf minus -inf must not happen in a part that is still empty; +inf minus +inf gives NaN on
    # purpose: overflow is never laundered.
    shift = tl.where(new_max == NEGATIVE_INFINITY, 0.0, new_max)
    terms = tl.exp2((z - shift[None, :, None]) * LOG2_E)
    row_sum = row_sum * tl.exp2((row_max - shift) * LOG2_E) + tl.sum(tl.sum(terms, 2), 0)
    return new_max, row_sum


@triton.jit
def merge_parts(part_max, part_sum):
    """The one merge of parts of a row: threads, programs, and the state of earlier columns.

    NaN spreads through the sum, since a GPU's maximum drops it.
    """
    row_max = tl.max(part_max, 0)
    shift = tl.where(row_max == NEGATIVE_INFINITY, 0.0, row_max)
    row_sum = tl.sum(part_sum * tl.exp2((part_max - shift) * LOG2_E), 0)
    return tl.where(row_sum != row_sum, float("nan"), row_max), row_sum


@triton.jit
def log_odds(row_max, row_sum, target, label_exists):
    """`d = z_y - log(sum of the rest)`, the maximum subtracted first."""
    d = (target - row_max) - tl.log(row_sum)
    without_rest = tl.where(target == NEGATIVE_INFINITY, float("nan"), target + POSITIVE_INFINITY)
    d = tl.where(row_max == NEGATIVE_INFINITY, without_rest, d)
    return tl.where(label_exists & (target != POSITIVE_INFINITY), d, float("nan"))


@triton.jit
def evaluate_objective(d, vocabulary, OBJECTIVE: tl.constexpr):
    """Value and slope of an objective at `d`, in forms that do not cancel for either sign of d."""
    tail_exp = tl.exp(-tl.abs(d))
    whole = 1 + tail_exp
    body = 1 / whole  # sigmoid(|d|)
    tail = tail_exp * body  # sigmoid(-|d|)
    # softplus(-|d|) = log1p(tail_exp): what rounding took from 1 + tail_exp is put back.
    log1p_term = tl.log(whole) + (tail_exp - (whole - 1)) * body
    if OBJECTIVE == "unilogit":
        # Comparisons, since a GPU's minimum and maximum drop NaN.
        bounded = tl.where(d > SATURATED, SATURATED, tl.where(d < -SATURATED, -SATURATED, d))
        entropy_like = tail * (bounded - vocabulary.uniform_log_odds)
        highest = vocabulary.softplus_uniform - vocabulary.uniform_log_odds
        above = highest - entropy_like - log1p_term
        below = entropy_like - log1p_term + vocabulary.softplus_uniform
        value = tl.where(d > 0, above, below)
        value = tl.where(value < 0, 0.0, value)
        slope = entropy_like * body
    elif OBJECTIVE == "unilogit_forward":
        linear = tl.where(d > 0, (1 - vocabulary.inverse) * d, -d * vocabulary.inverse)
        constant = vocabulary.uniform_log_odds * vocabulary.inverse - vocabulary.softplus_uniform
        value = linear + (log1p_term + constant)
        value = tl.where(value < 0, 0.0, value)
        slope = tl.where(d > 0, body, tl.where(d != d, d, tail)) - vocabulary.inverse
    else:
        tl.static_assert(OBJECTIVE == "cross_entropy" or OBJECTIVE == "gradient_ascent")
        SIGN: tl.constexpr = 1.0 if OBJECTIVE == "cross_entropy" else -1.0
        value = SIGN * (tl.where(d < 0, -d, 0.0) + log1p_term)
        slope = -SIGN * tl.where(d > 0, tail, body)
    return value, slope


# ---- the walk over a row -----------------------------------------------------------------------


@triton.jit
def tile_lanes(UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Number of each element of a tile, `[UNROLL, THREADS, VECTOR]`, in the order of memory."""
    unroll = tl.arange(0, UNROLL)[:, None, None]
    thread = tl.arange(0, THREADS)[None, :, None]
    return (unroll * THREADS + thread) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def share_of_row(row, v, part, parts, blocks_per_part, VARIANT: tl.constexpr):
    """What one of the programs that share a row visits. The last part owns tail and ends."""
    beyond = (row.out_start % VARIANT.out_alignment).to(tl.int32)
    peeled = tl.minimum((VARIANT.out_alignment - beyond) % VARIANT.out_alignment, v)
    BLOCK: tl.constexpr = VARIANT.unroll * VARIANT.threads * VARIANT.vector
    blocks = (v - peeled) // BLOCK
    first_block = part * blocks_per_part
    last_block = tl.minimum(first_block + blocks_per_part, blocks)
    tail_start = blocks * BLOCK
    tail_vectors = (v - peeled - tail_start) // VARIANT.vector
    ends = v - tail_start - tail_vectors * VARIANT.vector
    right_end = v - ends
    is_last = part == parts - 1
    tail_vectors = tl.where(is_last, tail_vectors, 0)
    ends = tl.where(is_last, ends, 0)
    return Share(peeled, first_block, last_block, tail_start, tail_vectors, ends, right_end)


@triton.jit
def body_of_row(row, peeled, VARIANT: tl.constexpr):
    """The row from its first 16-byte boundary on.

    The divisions change nothing; from them the compiler knows that accesses are aligned.
    """
    return Row(
        row.logits,
        (row.start + peeled) // VARIANT.logits_alignment * VARIANT.logits_alignment,
        row.out,
        (row.out_start + peeled) // VARIANT.out_alignment * VARIANT.out_alignment,
        row.column_stride,
        row.out_column_stride,
        row.label - peeled,
    )


@triton.jit
def tail_columns(share, first_vector, VARIANT: tl.constexpr):
    """Columns of a tile of the tail; the mask is one per vector, which keeps accesses whole."""
    lanes = tile_lanes(1, VARIANT.threads, VARIANT.vector)
    vectors = first_vector + tile_lanes(1, VARIANT.threads, 1)
    columns = share.tail_start + first_vector * VARIANT.vector + lanes
    return columns, vectors < share.tail_vectors


@triton.jit
def end_columns(share, VARIANT: tl.constexpr):
    """The columns before the first vector and after the last one, and which of them exist."""
    lane = tile_lanes(1, VARIANT.threads, 1)
    return tl.where(lane < share.peeled, lane, share.right_end + lane), lane < share.ends


@triton.jit
def at_columns(pointer, start, columns, column_stride, VARIANT: tl.constexpr):
    """Pointers to columns; with a stride they may be 2^31 elements away."""
    if VARIANT.strided:
        columns = columns.to(tl.int64) * column_stride
    return pointer + start + columns


@triton.jit
def load_columns(row, columns, inside, EVICTION: tl.constexpr, VARIANT: tl.constexpr):
    """A tile of raw logits; `inside` is None where every column exists."""
    pointers = at_columns(row.logits, row.start, columns, row.column_stride, VARIANT)
    if inside is None:
        x = tl.load(pointers, eviction_policy=EVICTION)
    else:
        x = tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION)
    return x


@triton.jit
def add_tile(
    part_max,
    part_sum,
    row,
    columns,
    inside,
    label_is_near,
    factors,
    EVICTION: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Fold a tile of a row into each thread's statistics, but for the label's column."""
    z, _ = transformed(load_columns(row, columns, inside, EVICTION, VARIANT), factors, VARIANT)
    if inside is not None:
        z = tl.where(inside, z, NEGATIVE_INFINITY)
    if label_is_near:
        z = tl.where(columns == row.label, NEGATIVE_INFINITY, z)
    return fold(part_max, part_sum, z)


@triton.jit
def rest_statistics(
    part_max, part_sum, row, share, factors, EVICTION: tl.constexpr, VARIANT: tl.constexpr
):
    """Fold a program's share of a row into each thread's statistics, but for the label's column."""
    BLOCK: tl.constexpr = VARIANT.unroll * VARIANT.threads * VARIANT.vector
    body = body_of_row(row, share.peeled, VARIANT)
    lanes = tile_lanes(VARIANT.unroll, VARIANT.threads, VARIANT.vector)
    for block in range(share.first_block, share.last_block):
        columns = block * BLOCK + lanes
        # One tile of the row holds the label: only there is it looked for column by column.
        is_near = body.label // BLOCK == block
        part_max, part_sum = add_tile(
            part_max, part_sum, body, columns, None, is_near, factors, EVICTION, VARIANT
        )
    for first_vector in range(0, share.tail_vectors, VARIANT.threads):
        columns, inside = tail_columns(share, first_vector, VARIANT)
        part_max, part_sum = add_tile(
            part_max, part_sum, body, columns, inside, True, factors, EVICTION, VARIANT
        )
    if share.ends > 0:
        columns, inside = end_columns(share, VARIANT)
        part_max, part_sum = add_tile(
            part_max, part_sum, row, columns, inside, True, factors, EVICTION, VARIANT
        )
    return part_max, part_sum


@triton.jit
def write_tile(
    row,
    columns,
    inside,
    label_is_near,
    gradient,
    factors,
    ZERO: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Write a tile of a gradient row, or zeros without reading the logits."""
    if ZERO:
        values = tl.zeros(columns.shape, tl.float32)
    else:
        # Nobody reads these logits again: they may leave the cache first.
        x = load_columns(row, columns, inside, "evict_first", VARIANT)
        z, slope = transformed(x, factors, VARIANT)
        values = gradient.coefficient * tl.exp2((z - gradient.row_max) * LOG2_E)
        if label_is_near:
            values = tl.where(columns == row.label, gradient.at_label, values)
        if VARIANT.capped:
            values = values * slope
    pointers = at_columns(row.out, row.out_start, columns, row.out_column_stride, VARIANT)
    tl.store(pointers, values.to(row.out.dtype.element_ty), mask=inside)


@triton.jit
def write_row(row, share, gradient, factors, ZERO: tl.constexpr, VARIANT: tl.constexpr):
    """Write a program's share of a gradient row.

    From the end to the start: what an earlier visit read last is still in the cache.
    """
    BLOCK: tl.constexpr = VARIANT.unroll * VARIANT.threads * VARIANT.vector
    body = body_of_row(row, share.peeled, VARIANT)
    if share.ends > 0:
        columns, inside = end_columns(share, VARIANT)
        write_tile(row, columns, inside, True, gradient, factors, ZERO, VARIANT)
    for first_vector in range(0, share.tail_vectors, VARIANT.threads):
        columns, inside = tail_columns(share, first_vector, VARIANT)
        write_tile(body, columns, inside, True, gradient, factors, ZERO, VARIANT)
    lanes = tile_lanes(VARIANT.unroll, VARIANT.threads, VARIANT.vector)
    for step in range(share.first_block, share.last_block):
        block = share.first_block + share.last_block - 1 - step
        columns = block * BLOCK + lanes
        is_near = body.label // BLOCK == block
        write_tile(body, columns, None, is_near, gradient, factors, ZERO, VARIANT)


@triton.jit
def write_gradient(row, share, row_max, row_sum, slope, factors, VARIANT: tl.constexpr):
    """The gradient row of a slope; that of slope 0 is exactly 0, whatever its logits hold."""
    at_label = slope * factors.derivative
    gradient = Gradient(row_max, -at_label / row_sum, at_label)
    if slope == 0.0:
        write_row(row, share, gradient, factors, True, VARIANT)
    else:
        write_row(row, share, gradient, factors, False, VARIANT)


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def label_column(labels, row_index, first_column, v):
    """A label's column among these `v`, or -1: no label becomes a pointer unchecked."""
    column = tl.load(labels + row_index) - first_column
    return tl.where((column >= 0) & (column < v), column, -1).to(tl.int32)


@triton.jit
def load_target(row, factors, VARIANT: tl.constexpr):
    """The label's logit; meaningless where there is no label (`row.label` is -1)."""
    pointer = at_columns(row.logits, row.start, row.label, row.column_stride, VARIANT)
    z, _ = transformed(tl.load(pointer, mask=row.label >= 0, other=0.0), factors, VARIANT)
    return z


@triton.jit
def empty_parts(VARIANT: tl.constexpr):
    """Each thread's maximum and sum before it has seen a column."""
    part_max = tl.full([VARIANT.threads], NEGATIVE_INFINITY, tl.float32)
    return part_max, tl.zeros([VARIANT.threads], tl.float32)


@triton.jit
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
    VARIANT: tl.constexpr,
):
    """Statistics of `[n, v]` logits; grid `(n, parts of a row)`.

    Args:
        row_weight: None, or `[n]`: a row of weight 0 is not read, and its parts are empty.
        state: `[3, n]`, updated in place where a row is one part.
        parts: None then, else `[2, n, parts]`: maximum and sum of each part.
    """
    row_index = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    count = tl.num_programs(1)
    label = label_column(labels, row_index, first_column, v)
    start = offset + row_index * row_stride
    row = Row(logits, start, logits, start, column_stride, column_stride, label)
    factors = Factors(scale, softcap, 1.0)

    part_max, part_sum = empty_parts(VARIANT)
    state += row_index
    if parts is None:
        # What is known of the row so far is where the first thread begins.
        is_first = tl.arange(0, VARIANT.threads) == 0
        part_max = tl.where(is_first, tl.load(state), part_max)
        part_sum = tl.where(is_first, tl.load(state + state_stride), part_sum)
    is_read = True
    if row_weight is not None:
        is_read = tl.load(row_weight + row_index) != 0.0
    if is_read:
        share = share_of_row(row, v, part, count, blocks_per_part, VARIANT)
        part_max, part_sum = rest_statistics(part_max, part_sum, row, share, factors, "", VARIANT)
    row_max, row_sum = merge_parts(part_max, part_sum)
    if parts is None:
        tl.store(state, row_max)
        tl.store(state + state_stride, row_sum)
        tl.store(state + 2 * state_stride, load_target(row, factors, VARIANT), mask=label >= 0)
    else:
        parts += row_index * count + part
        tl.store(parts, row_max)
        tl.store(parts + tl.num_programs(0).to(tl.int64) * count, row_sum)


@triton.jit
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
    VARIANT: tl.constexpr,
):
    """Merge the parts of each row, in one fixed order, into `state`; grid `(n,)`.

    Args:
        parts: `[2, n, count]` from `log_odds_update_kernel`.
        values: `[n]`, receives `f(d)` where there is an objective.
        slopes: `[n]`, receives `row_weight * f'(d)`.
        MOST_PARTS: A power of two above `count`.
        OBJECTIVE: Its name, or None to leave it at the state.
    """
    row_index = tl.program_id(0).to(tl.int64)
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
    tl.store(state, row_max)
    tl.store(state + state_stride, row_sum)

    label = label_column(labels, row_index, first_column, v)
    start = offset + row_index * row_stride
    row = Row(logits, start, logits, start, column_stride, column_stride, label)
    target = load_target(row, Factors(scale, softcap, 1.0), VARIANT)
    tl.store(state + 2 * state_stride, target, mask=label >= 0)
    if OBJECTIVE is not None:
        vocabulary = Vocabulary(uniform_log_odds, softplus_uniform, inverse_vocab)
        d = log_odds(row_max, row_sum, target, label >= 0)
        value, slope = evaluate_objective(d, vocabulary, OBJECTIVE)
        weight = tl.load(row_weight + row_index)
        tl.store(values + row_index, tl.where(weight == 0.0, 0.0, value))
        tl.store(slopes + row_index, tl.where(weight == 0.0, 0.0, weight * slope))


@triton.jit
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
    first_column,
    v,
    blocks_per_part,
    scale,
    softcap,
    derivative,
    VARIANT: tl.constexpr,
):
    """Gradient rows `[n, v]` of slopes `[n]`; grid `(n, parts of a row)`; `out` may be `logits`."""
    row_index = tl.program_id(0).to(tl.int64)
    row = Row(
        logits,
        offset + row_index * row_stride,
        out,
        out_offset + row_index * out_row_stride,
        column_stride,
        out_column_stride,
        label_column(labels, row_index, first_column, v),
    )
    part, count = tl.program_id(1), tl.num_programs(1)
    share = share_of_row(row, v, part, count, blocks_per_part, VARIANT)
    state += row_index
    row_max, row_sum = tl.load(state), tl.load(state + state_stride)
    slope = tl.load(slopes + row_index)
    factors = Factors(scale, softcap, derivative)
    write_gradient(row, share, row_max, row_sum, slope, factors, VARIANT)


@triton.jit
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
    VARIANT: tl.constexpr,
):
    """Statistics, objective and gradient of whole rows in one visit; grid `(n,)`.

    Args:
        row_weight: `[n]`; a row of weight 0 is not read.
        out: `[n, v]`, may be `logits`; None for the values alone.
        values: `[n]`, receives `f(d)`.
    """
    row_index = tl.program_id(0).to(tl.int64)
    label = label_column(labels, row_index, 0, v)
    start = offset + row_index * row_stride
    if out is None:
        row = Row(logits, start, logits, start, column_stride, column_stride, label)
    else:
        out_start = out_offset + row_index * out_row_stride
        row = Row(logits, start, out, out_start, column_stride, out_column_stride, label)
    factors = Factors(scale, softcap, derivative)
    share = share_of_row(row, v, 0, 1, v, VARIANT)
    weight = tl.load(row_weight + row_index)
    row_max, row_sum, value, slope = 0.0, 1.0, 0.0, 0.0
    if weight != 0.0:
        target = load_target(row, factors, VARIANT)
        part_max, part_sum = empty_parts(VARIANT)
        # The logits are read again from the cache: they should leave it last.
        part_max, part_sum = rest_statistics(
            part_max, part_sum, row, share, factors, "evict_last", VARIANT
        )
        row_max, row_sum = merge_parts(part_max, part_sum)
        d = log_odds(row_max, row_sum, target, label >= 0)
        vocabulary = Vocabulary(uniform_log_odds, softplus_uniform, inverse_vocab)
        value, slope = evaluate_objective(d, vocabulary, OBJECTIVE)
        slope = weight * slope
    tl.store(values + row_index, value)
    if out is not None:
        write_gradient(row, share, row_max, row_sum, slope, factors, VARIANT)


@triton.jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """`values *= factor` in place; nothing is read or written where the factor is exactly 1."""
    scale = tl.load(factor)
    if scale != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = i < count
            x = tl.load(values + i, mask=inside)
            tl.store(values + i, (x.to(tl.float32) * scale).to(x.dtype), mask=inside)
