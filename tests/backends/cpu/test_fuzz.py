"""The C++ row kernels over random shapes, layouts, dtypes and special values."""

from __future__ import annotations

from typing import Literal

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.backends.cpu.rows import (
    DTYPES,
    INF,
    KERNELS,
    NAN,
    OBJECTIVES,
    PLAIN,
    check_sweep,
    problem,
)
from tests.support.layouts import LAYOUTS, assert_only_written, place
from unilogit_kernels.backends.contract import LogitTransform, RowKernels, TilePair
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.maths import pair_state
from unilogit_kernels.testing import assert_within_budget


@st.composite
def fuzz_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, str, LogitTransform, str]:
    """A sweep over random shapes, layouts, dtypes and special values."""
    n = draw(st.integers(1, 9))
    v = draw(st.one_of(st.integers(2, 70), st.integers(2000, 4200)))
    dtype = draw(st.sampled_from(DTYPES))
    logits, labels, weight = problem(n, v, dtype, seed=draw(st.integers(0, 1000)))
    specials = st.sampled_from([INF, -INF, NAN, 0.0, 60.0, -60.0])
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, n - 1)), draw(st.integers(0, v - 1))
        logits[row, column] = draw(specials)
    for _ in range(draw(st.integers(0, 2))):
        weight[draw(st.integers(0, n - 1))] = draw(st.sampled_from([0.0, -3.0, 1e3]))
        labels[draw(st.integers(0, n - 1))] = draw(st.sampled_from([0, v - 1, v, -100]))
    objective = draw(st.sampled_from(OBJECTIVES))
    transform = draw(st.sampled_from((PLAIN, LogitTransform(scale=0.5))))
    return logits, labels, weight, objective, transform, draw(st.sampled_from(LAYOUTS))


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=fuzz_cases())
def test_fuzz(isa: str, case: tuple[Tensor, Tensor, Tensor, str, LogitTransform, str]) -> None:
    logits, labels, weight, objective, transform, layout = case
    view, _memory = place(logits, layout)
    out, memory = place(torch.zeros_like(logits), layout)
    check_sweep(view, labels, weight, objective, transform, out)
    assert_only_written(out, memory)


@st.composite
def pair_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, str, str]:
    """Two rows of random shapes, layouts, dtypes and special values, and gradient coefficients."""
    n = draw(st.integers(4, 9))
    v = draw(st.one_of(st.integers(30, 70), st.integers(1000, 4200)))
    seed = draw(st.integers(0, 1000))
    a, labels, _ = problem(n, v, draw(st.sampled_from(DTYPES)), seed)
    b, _, _ = problem(n, v, draw(st.sampled_from(DTYPES)), seed + 1)
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, n - 1)), draw(st.integers(0, v - 1))
        a[row, column] = draw(st.sampled_from([INF, -INF, NAN, 0.0, 60.0]))
        b[row, column] = draw(st.sampled_from([INF, NAN, 0.0, 60.0]))
    labels[draw(st.integers(0, n - 1))] = draw(st.sampled_from([0, v - 1, v, -1, -100]))
    coefficients = torch.randn(4, n, generator=torch.Generator().manual_seed(seed))
    coefficients[:, draw(st.integers(0, n - 1))] = 0.0
    layout = draw(st.sampled_from(LAYOUTS))
    return a, b, labels, coefficients, layout, draw(st.sampled_from(("a", "b")))


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=pair_cases())
def test_fuzz_of_two_rows(
    isa: str, case: tuple[Tensor, Tensor, Tensor, Tensor, str, Literal["a", "b"]]
) -> None:
    a, b, labels, coefficients, layout, student = case
    a_view, _ = place(a, layout)
    b_view, _ = place(b, layout)
    transforms = (LogitTransform(scale=0.5), PLAIN)
    runs: list[tuple[RowKernels, Tensor, Tensor, torch.dtype]] = [
        (KERNELS, a_view, b_view, torch.float32),
        (EagerKernels(), a.double(), b.double(), torch.float64),
        (EagerKernels(), a.float(), b.float(), torch.float32),
    ]
    states, gradients = [], []
    for kernels, x, y, dtype in runs:
        state = pair_state.empty_state(len(labels), a.device, dtype)
        for columns in (slice(0, 700), slice(700, None)):
            first = columns.start
            kernels.divergence_update(
                TilePair(x[:, columns], y[:, columns], labels, first, *transforms), state
            )
        log_odds = pair_state.log_odds(state, labels, a.shape[1])
        states.append(torch.stack((pair_state.rest_divergence(state), *log_odds)))
        # A row that is not finite has no finite coefficients; one that does not count has zeros.
        bad = state[[pair_state.A_SUM, pair_state.B_SUM]].isnan().any(0) & (coefficients != 0).any(
            0
        )
        factors = torch.where(bad, NAN, coefficients).to(dtype)
        like = a if student == "a" else b
        out, memory = place(torch.zeros_like(like if kernels is KERNELS else x), layout)
        kernels.divergence_gradient(
            TilePair(x, y, labels, 0, *transforms), state, factors, student, out
        )
        gradients.append(out.clone())
        assert_only_written(out, memory)
    assert torch.equal(states[0].isnan(), states[1].isnan())
    assert torch.equal(states[0] == INF, states[1] == INF)
    assert torch.equal(gradients[0].isnan(), gradients[1].isnan()), "NaN lost or invented"
    ours, exact, plain = (x.nan_to_num(0.0).flatten() for x in gradients)
    assert_within_budget(ours, exact, plain.to(ours.dtype))
