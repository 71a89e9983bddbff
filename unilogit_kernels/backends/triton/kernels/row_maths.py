"""The maths of a row: transforms of logits, running sums, log-odds and objectives."""

from typing import NamedTuple

import triton
import triton.language as tl

from unilogit_kernels.backends.triton.kernels.row_walk import at_columns
from unilogit_kernels.maths.row_state import RowNeeds

LOG2_E = tl.constexpr(1.4426950408889634)
# Below this e^s is 0. Where s is no lower, the products of e^s are 0 with it, and not 0 * inf.
LOWEST = tl.constexpr(-1e4)

LN_2 = tl.constexpr(0.6931471805599453)
# Below it 2^e is 1 + e log(2): what is left out is no digit of a float32.
SMALL_EXCESS = tl.constexpr(2.0**-13)
# From here on numbers are at least 128 apart: exponentials of their differences are 0 or 1. Below,
# the product with log2(e) is rounded by less than 2^6, so that no sum of its powers overflows.
ALL_OR_NOTHING = tl.constexpr(1.4e9)
# Where maxima begin that must not be -inf: the lowest number.
LOWEST_MAXIMUM = tl.constexpr(-3.4028234663852886e38)

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
POSITIVE_INFINITY = tl.constexpr(float("inf"))

# Beyond this sigmoid(-|d|) is 0; it keeps 0 * inf out of bounded values.
SATURATED = tl.constexpr(2e4)

# Above this tanh is computed from the exponential, below it from an odd polynomial (Cephes).
TANH_LIMIT = tl.constexpr(0.625)


class Needs(NamedTuple):
    """What a kernel computes of rows beside maximum and sum; decided when it is compiled.

    Attributes:
        runner_up: In which column the maximum is.
        linear: How many columns there are, and the sum of their logits.
        dot: The mean logit under the softmax.
        square: The variance; asks for `dot` too.
    """

    runner_up: bool = False
    linear: bool = False
    dot: bool = False
    square: bool = False

    @staticmethod
    def of(needs: RowNeeds) -> "Needs":
        """What a kernel must compute for a loss that needs this of rows."""
        dot = needs.entropy or needs.variance
        return Needs(needs.runner_up, linear=needs.mean, dot=dot, square=needs.variance)


class Logits(NamedTuple):
    """What of a matrix of logits is decided when a kernel is compiled.

    Attributes:
        alignment: Elements that divide the body's offset in every row.
        eviction: How long what the statistics read stays in the cache; what a gradient reads may
            always leave first.
        scaled: `z = scale * x`; False where a cap takes the scale in.
        capped: `z = softcap * tanh(scale * x)`, where `scale` has been divided by `softcap`.
        binary: Whether sums and gradients are of `exponent`: of plain logits. The product of
            others with their factor would be rounded before it, and moments take `z - row_max`.
        packs: Whether maxima are taken of two at a time, as words hold them: of plain bfloat16,
            where the GPU has an instruction for it.
        needs: What statistics are computed of them.
    """

    alignment: int
    eviction: str
    scaled: bool
    capped: bool
    binary: bool = False
    packs: bool = False
    needs: Needs = Needs()


class Factors(NamedTuple):
    """The numbers of a `LogitTransform`.

    Attributes:
        scale: Of the raw logits; where there is a cap, divided by it.
        softcap: The cap.
    """

    scale: tl.tensor
    softcap: tl.tensor


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


# ---- logits --------------------------------------------------------------------------------------


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
def widened(x):
    """A logit as a float32.

    A bfloat16 is its upper half. Said in integers, what shares a word with another takes one
    instruction: a shift or a mask.
    """
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def transformed(x, factors, LOGITS: tl.constexpr):
    """`z`, and `dz/dx` without the constant factor; 1.0 where there is no cap."""
    z = widened(x)
    slope = 1.0
    if LOGITS.capped:
        z, slope = hyperbolic_tangent(z * factors.scale)
        z = z * factors.softcap
    elif LOGITS.scaled:
        z = z * factors.scale
    return z, slope


@triton.jit
def load_target(row, label, factors, LOGITS: tl.constexpr, STRIDED: tl.constexpr):
    """The label's logit; meaningless where there is no label (it is -1)."""
    x = tl.load(at_columns(row, label, STRIDED), mask=label >= 0, other=0.0)
    z, _ = transformed(x, factors, LOGITS)
    return z


# ---- running sums --------------------------------------------------------------------------------


@triton.jit
def finite_shift(row_max):
    """What is subtracted from logits before an exponential: the maximum.

    -inf minus -inf must not happen in a part that is still empty; +inf minus +inf gives NaN on
    purpose: overflow is never laundered.
    """
    return tl.where(row_max == NEGATIVE_INFINITY, 0.0, row_max)


@triton.jit
def binary_shift(row_max):
    """How logits become binary exponents of `e^(z - row_max)`, in one instruction: `exponent`.

    From `ALL_OR_NOTHING` on any factor gives the same exponentials, and 1 does not overflow.

    Args:
        row_max: No -inf: see `LOWEST_MAXIMUM`.

    Returns:
        What is multiplied by, and what is then added: minus the maximum times that, rounded.
    """
    factor = tl.where(tl.abs(row_max) < ALL_OR_NOTHING, LOG2_E, 1.0)
    return factor, rounded_product(row_max, -factor)


@triton.jit
def rounded_product(a, b):
    """`a * b`, which the compiler does not fuse with what is added to it."""
    return tl.fma(a, b, 0.0)


@triton.jit
def exponent(z, factor, shift):
    """`t` with `2^t = 2^e e^(z - row_max)`, whose `e` is the row's: see `with_excess`."""
    return tl.fma(z, factor, shift)


@triton.jit
def with_excess(row_sum, row_max, SIGN: tl.constexpr):
    """A sum of `e^(z - row_max)` as one of `exponent`, or with the sign -1 the inverse.

    They differ by what was rounded off the product of maximum and factor, which is the same for
    all columns.
    """
    factor, shift = binary_shift(row_max)
    excess = SIGN * tl.fma(row_max, factor, shift)
    nearby = tl.fma(row_sum, excess * LN_2, row_sum)
    changed = tl.where(tl.abs(excess) < SMALL_EXCESS, nearby, row_sum * tl.exp2(excess))
    return tl.where(row_sum == 0.0, row_sum, changed)  # whose maximum may be -inf


@triton.jit
def moved_dot(row_sum, dot, move, other_move):
    """Sum and `sum e^s (s - t)` of a part after the maxima of s and t have moved so far.

    A part of no weight in the whole contributes nothing, even an infinite dot product.
    """
    weight = tl.exp2(move * LOG2_E)
    dot = weight * (dot + row_sum * (move - other_move))
    return weight * row_sum, tl.where(weight == 0.0, 0.0, dot)


@triton.jit
def ratio(a, b):
    """`a / b`, and `a` where b is 0."""
    return a / tl.where(b == 0.0, 1.0, b)


# ---- log-odds and objectives ---------------------------------------------------------------------


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
