"""Sweeps of weighted statistics in C++: against the literal loss, and against two passes.

Two passes are those of the eager backend, in float64 the truth and in float32 what plain torch
makes of it; they know every hard row, where the derivative of the literal loss is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.backends.cpu.rows import (
    CAPPED,
    DTYPES,
    INF,
    KERNELS,
    NAN,
    PLAIN,
    SHAPES,
    STREAM_BYTES,
    TRANSFORMS,
    assert_rows_within_budget,
    hard_problem,
    problem,
)
from tests.support.layouts import CANARY, LAYOUTS, assert_only_written, place
from unilogit_kernels import reference
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.cpu.kernels import WEIGHTED_STATISTICS
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.maths import row_state, statistics
from unilogit_kernels.maths.elementwise import softplus
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.testing import assert_within_budget


class Weights(NamedTuple):
    """Of the cross-entropy, the uniform one, the squared logsumexp, the entropy, and 1."""

    cross_entropy: float = 0.0
    uniform: float = 0.0
    squared_logsumexp: float = 0.0
    entropy: float = 0.0
    constant: float = 0.0


# All exact in float32.
WEIGHTS = {
    "cross-entropy": Weights(1.0),
    "z-loss": Weights(1.0, squared_logsumexp=2.0**-7),
    "smoothing": Weights(0.875, 0.125, 2.0**-10, constant=-0.5),
    "uniform": Weights(uniform=-1.5),
    "entropy": Weights(1.0, entropy=-0.25),
    "entropy alone": Weights(entropy=1.0),
    "all": Weights(-0.5, 0.75, 2.0**-8, 1.25, 3.0),
}
NEEDS = RowNeeds(mean=True, entropy=True)


class Swept(NamedTuple):
    loss: Tensor
    rows: Tensor


def sweep(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    weights: Weights,
    transform: LogitTransform = PLAIN,
    out: Tensor | None = None,
) -> Tensor:
    tile = Tile(logits, labels, 0, transform)
    found = KERNELS.log_odds_sweep(
        tile, row_weight, WEIGHTED_STATISTICS, logits.shape[1], out, weights
    )
    return found[0] if weights.squared_logsumexp else found


def two_passes(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    weights: Weights,
    transform: LogitTransform,
    dtype: torch.dtype,
) -> Swept:
    """By the eager kernels and the formulas of `statistics`, which leave no weight of 0 out."""
    kernels, v, n = EagerKernels(), logits.shape[1], len(labels)
    tile = Tile(logits.to(dtype), labels, 0, transform)
    state = row_state.empty_state(n, logits.device, dtype, NEEDS)
    kernels.log_odds_update(tile, state, NEEDS)
    seen = statistics.statistics(state, labels, v, RowNeeds(False, True, True, True))
    assert seen.logsumexp is not None
    terms = [
        softplus(-seen.log_odds),
        seen.uniform_cross_entropy,
        seen.logsumexp.square(),
        seen.entropy,
        torch.ones_like(seen.log_odds),
    ]
    loss = torch.zeros_like(seen.log_odds)
    for weight, term in zip(weights, terms, strict=True):
        if weight and term is not None:
            loss = loss + weight * term
    row_weight = row_weight.to(dtype)
    by_logsumexp = 2 * weights.squared_logsumexp * seen.logsumexp
    slope = statistics.Statistics(
        -weights.cross_entropy * torch.sigmoid(-seen.log_odds) * row_weight,
        None,
        (by_logsumexp if weights.squared_logsumexp else torch.zeros_like(loss)) * row_weight,
        weights.uniform * row_weight,
        weights.entropy * row_weight,
    )
    slopes = statistics.row_slopes(state, seen.log_odds, slope, v)
    rows = torch.empty_like(tile.logits)
    kernels.log_odds_gradient(tile, state, slopes, rows)
    bad, skipped = seen.log_odds.isnan(), row_weight == 0
    loss[bad], rows[bad] = NAN, NAN
    loss[skipped], rows[skipped] = 0.0, 0.0
    return Swept(loss, rows)


def check_against_two_passes(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    weights: Weights,
    transform: LogitTransform,
    out: Tensor,
) -> None:
    """`logits` may be `out`. Ordinary rows of plain torch's join in, as in `check_sweep`."""
    n, v = logits.shape
    more, more_labels, more_weight = problem(32, v, logits.dtype, seed=1)
    inputs = (
        torch.cat((logits, more)),
        torch.cat((labels, more_labels)),
        torch.cat((row_weight, more_weight)),
    )
    exact, plain = (
        two_passes(*inputs, weights, transform, dtype) for dtype in (torch.float64, torch.float32)
    )
    found = torch.cat((sweep(logits, labels, row_weight, weights, transform, out), plain.loss[n:]))
    assert torch.equal(found.isnan(), exact.loss.isnan()), "loss: NaN lost or invented"
    unbounded, finite = exact.loss.isinf(), exact.loss.isfinite()
    assert torch.equal(found[unbounded].double(), exact.loss[unbounded])
    assert_within_budget(
        found[finite], exact.loss[finite], plain.loss[finite], "loss", smallest_scale=1.0
    )
    rows = torch.cat((out, plain.rows[n:].to(out.dtype)))
    assert_rows_within_budget(rows, exact.rows, plain.rows, "gradient")


def literal_loss(z: Tensor, labels: Tensor, weights: Weights) -> Tensor:
    a, b, c, e, k = weights
    loss = a * F.cross_entropy(z, labels, reduction="none") + k
    loss = loss + b * reference.uniform_cross_entropy(z) + c * z.logsumexp(-1).square()
    return loss + e * reference.entropy(z)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sweep(isa: str, weights: Weights, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        logits, labels, row_weight = problem(*shape, dtype)
        for transform in TRANSFORMS:
            losses, gradients = [], []
            for t in (torch.float64, torch.float32):
                x = logits.to(t).requires_grad_()
                z = reference.transform_logits(
                    x, softcap=transform.softcap or None, logit_scale=transform.scale
                )
                losses.append(literal_loss(z, labels, weights))
                (row,) = torch.autograd.grad((losses[-1] * row_weight.to(t)).sum(), x)
                gradients.append(row)
            out, memory = place(torch.zeros(shape, dtype=dtype), "contiguous")
            loss = sweep(logits, labels, row_weight, weights, transform, out)
            alone = sweep(logits, labels, row_weight, weights, transform)
            assert torch.equal(loss, alone)
            assert_within_budget(loss, losses[0], losses[1], smallest_scale=1.0)
            assert_rows_within_budget(out, gradients[0], gradients[1], f"{shape}")
            assert_only_written(out, memory)


@pytest.mark.parametrize("v", [5, 40, 3000])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows(isa: str, dtype: torch.dtype, weights: Weights, v: int) -> None:
    names, logits, labels, row_weight = hard_problem(v, dtype)
    for transform in (PLAIN, CAPPED) if v == 40 else (PLAIN,):
        for i, name in enumerate(names):
            row = slice(i, i + 1)
            out = torch.full((1, v), CANARY, dtype=dtype)
            try:
                check_against_two_passes(
                    logits[row], labels[row], row_weight[row], weights, transform, out
                )
            except AssertionError as error:
                raise AssertionError(f"row {name!r}: {error}") from error


def test_a_weight_of_zero_leaves_infinite_terms_out(isa: str) -> None:
    logits, labels = torch.randn(2, 3000), torch.tensor([5, 7])
    logits[0, 100:200], logits[1, 7] = -INF, -INF
    row_weight = torch.ones(2)
    loss = sweep(logits, labels, row_weight, Weights(1.0, 0.0, 0.5, 0.25))
    assert loss.isfinite().tolist() == [True, False]
    loss = sweep(logits, labels, row_weight, Weights(0.0, 0.0, 0.5, 0.25))
    assert loss.isfinite().all()
    assert sweep(logits, labels, row_weight, Weights(uniform=1.0)).tolist() == [INF, INF]


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(-0.5), CAPPED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_in_any_layout_on_any_threads(
    isa: str, weights: Weights, transform: LogitTransform, dtype: torch.dtype
) -> None:
    """Whole rows and rows cut for threads, whose blocks are written while others are read."""
    for n in (1, 7):
        logits, labels, row_weight = problem(n, 8193, dtype)
        expected = torch.empty_like(logits)
        loss = sweep(logits, labels, row_weight, weights, transform, expected)
        for layout in LAYOUTS:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                view, memory = place(logits, layout)
                assert torch.equal(sweep(view, labels, row_weight, weights, transform, view), loss)
                assert torch.equal(view, expected)
                assert_only_written(view, memory)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", ["smoothing", "entropy", "all"])
def test_bypassing_the_cache_changes_nothing(
    isa: str, weights: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    for v, layout in ((8193, "unaligned"), (16384, "contiguous")):
        n = 3 + STREAM_BYTES // (v * out_dtype.itemsize)
        logits, labels, row_weight = problem(n, v, dtype)
        row_weight[7] = 0.0
        out, memory = place(torch.zeros(n, v, dtype=out_dtype), layout)
        loss = sweep(logits, labels, row_weight, WEIGHTS[weights], out=out)
        expected = torch.empty(n, v, dtype=out_dtype)
        for i in range(0, n, 10):
            rows = slice(i, i + 10)
            given = (logits[rows], labels[rows], row_weight[rows], WEIGHTS[weights])
            assert torch.equal(sweep(*given, out=expected[rows]), loss[rows])
        assert torch.equal(out, expected)
        assert_only_written(out, memory)


def test_rows_of_weight_zero_are_not_read(isa: str) -> None:
    logits, labels, row_weight = problem(9, 2050, torch.float32)
    logits[::2], row_weight[::2], labels[::2] = NAN, 0.0, -100
    out = torch.full_like(logits, CANARY)
    loss = sweep(logits, labels, row_weight, WEIGHTS["all"], out=out)
    assert loss[::2].count_nonzero() == out[::2].count_nonzero() == 0
    assert bool(loss.isfinite().all())
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_square_of_the_logsumexp_is_reported(isa: str, dtype: torch.dtype) -> None:
    """In a row of its own, unweighted as the loss is, and 0 where that is."""
    logits, labels, row_weight = problem(9, 2100, dtype)
    row_weight[4] = 0.0
    weights = Weights(1.0, 0.1, 2.0**-8)
    loss, reported = KERNELS.log_odds_sweep(
        Tile(logits, labels), row_weight, WEIGHTED_STATISTICS, 2100, None, weights
    )
    exact, plain = (
        torch.where(row_weight == 0, 0.0, 2.0**-8 * logits.to(t).logsumexp(1).square())
        for t in (torch.float64, torch.float32)
    )
    assert reported[4] == loss[4] == 0
    assert_within_budget(reported, exact, plain)
    without = KERNELS.log_odds_sweep(
        Tile(logits, labels), row_weight, WEIGHTED_STATISTICS, 2100, None, Weights(1.0, 0.1)
    )
    assert without.shape == (9,)


def test_five_weights_are_asked_for() -> None:
    logits, labels, row_weight = problem(2, 5, torch.float32)
    with pytest.raises(ValueError, match="not enough values"):
        KERNELS.log_odds_sweep(
            Tile(logits, labels), row_weight, WEIGHTED_STATISTICS, 5, None, (1.0, 0.5)
        )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Weights, LogitTransform, str]:
    n = draw(st.integers(1, 9))
    v = draw(st.one_of(st.integers(2, 70), st.integers(2000, 4200)))
    seed = draw(st.integers(0, 1000))
    logits, labels, row_weight = problem(n, v, draw(st.sampled_from(DTYPES)), seed)
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, n - 1)), draw(st.integers(0, v - 1))
        logits[row, column] = draw(st.sampled_from([INF, -INF, NAN, 0.0, 60.0, -60.0]))
    for _ in range(draw(st.integers(0, 2))):
        row_weight[draw(st.integers(0, n - 1))] = draw(st.sampled_from([0.0, -3.0, 1e3]))
        labels[draw(st.integers(0, n - 1))] = draw(st.sampled_from([0, v - 1, v, -100]))
    weights = Weights(*(draw(st.sampled_from([0.0, 1.0, -0.25])) for _ in Weights._fields))
    transform = draw(st.sampled_from((PLAIN, LogitTransform(scale=0.5), CAPPED)))
    return logits, labels, row_weight, weights, transform, draw(st.sampled_from(LAYOUTS))


@settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_fuzz(isa: str, case: tuple[Tensor, Tensor, Tensor, Weights, LogitTransform, str]) -> None:
    logits, labels, row_weight, weights, transform, layout = case
    view, _memory = place(logits, layout)
    out, memory = place(torch.zeros_like(logits), layout)
    check_against_two_passes(view, labels, row_weight, weights, transform, out)
    assert_only_written(out, memory)
