"""Kernels of several matrices in every mix of layouts (CASES 35).

How a kernel walks over its rows is decided from all of its matrices at once; a decision made from
one of them and applied to another shows only where their layouts differ.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.backends import test_divergence_kernels as pairs
from tests.support.layouts import LAYOUTS, assert_only_written, place
from unilogit_kernels import objectives
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile, TilePair
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.testing import assert_within_budget

PLAIN = LogitTransform()
SHAPE = (5, 1101)
"""Rows of an odd length, of full tiles, single vectors and ends."""

OBJECTIVE = "cross_entropy"
"""Its slope is near -1 for unlikely labels: no error of it hides behind its size."""

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float32, torch.bfloat16, id="mixed"),
]


def one_row(
    kernels: RowKernels, logits: Tensor, labels: Tensor, out: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values and gradient rows of cross-entropy in two visits, with statistics in `dtype`."""
    n, v = logits.shape
    state = row_state.empty_state(n, logits.device, dtype)
    kernels.log_odds_update(Tile(logits, labels), state)
    d = row_state.log_odds(state, labels, v)
    loss = objectives.REGISTRY[OBJECTIVE]()
    kernels.log_odds_gradient(Tile(logits, labels), state, loss.slope(d, v), out)
    return loss.value(d, v), out


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_output(
    backend: str, layout: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    kernels, eager = registry.load(backend), EagerKernels()
    logits = (3 * torch.randn(SHAPE)).to(dtype)
    labels = torch.randint(0, SHAPE[1], SHAPE[:1])
    exact = one_row(eager, logits, labels, torch.empty(SHAPE).double(), torch.float64)
    plain = one_row(eager, logits, labels, torch.empty(SHAPE, dtype=out_dtype), torch.float32)
    for out_layout in LAYOUTS:
        what = f"{layout} logits, {out_layout} output: "
        for is_swept in (False, True) if OBJECTIVE in kernels.swept_objectives else (False,):
            view, _ = place(logits, layout)
            out, memory = place(torch.zeros(SHAPE, dtype=out_dtype), out_layout)
            if is_swept:
                weight = torch.ones(SHAPE[0])
                values = kernels.log_odds_sweep(
                    Tile(view, labels), weight, OBJECTIVE, SHAPE[1], out
                )
            else:
                values, _ = one_row(kernels, view, labels, out, torch.float32)
            assert_within_budget(values, exact[0], plain[0], what + "values", smallest_scale=1.0)
            assert_within_budget(out, exact[1], plain[1], what + "gradient")
            assert_only_written(out, memory)


SLOPES = {3: RowNeeds(runner_up=True), 5: RowNeeds(*[True] * len(RowNeeds._fields))}
"""By the number of slopes, what a state holds whose gradient rows take them."""


def row_of_slopes(
    kernels: RowKernels, logits: Tensor, labels: Tensor, out: Tensor, slope: Tensor
) -> Tensor:
    """Gradient rows of as many slopes, from a state in their dtype."""
    needs = SLOPES[slope.shape[0]]
    state = row_state.empty_state(logits.shape[0], logits.device, slope.dtype, needs)
    kernels.log_odds_update(Tile(logits, labels), state, needs)
    kernels.log_odds_gradient(Tile(logits, labels), state, slope, out)
    return out


@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_several_slopes_and_output(
    backend: str, layout: str, dtype: torch.dtype, out_dtype: torch.dtype, slopes: int
) -> None:
    kernels, eager = registry.load(backend), EagerKernels()
    logits = (3 * torch.randn(SHAPE)).to(dtype)
    labels, slope = torch.randint(0, SHAPE[1], SHAPE[:1]), torch.randn(slopes, SHAPE[0])
    exact = row_of_slopes(eager, logits, labels, torch.empty(SHAPE).double(), slope.double())
    plain = row_of_slopes(eager, logits, labels, torch.empty(SHAPE, dtype=out_dtype), slope)
    for out_layout in LAYOUTS:
        view, _ = place(logits, layout)
        out, memory = place(torch.zeros(SHAPE, dtype=out_dtype), out_layout)
        row_of_slopes(kernels, view, labels, out, slope)
        assert_within_budget(out, exact, plain, f"{layout} logits, {out_layout} output")
        assert_only_written(out, memory)


@pytest.mark.parametrize(("a_dtype", "b_dtype"), DTYPES)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_two_models_and_output(
    backend: str, a_layout: str, a_dtype: torch.dtype, b_dtype: torch.dtype
) -> None:
    """Every pair of layouts of the three matrices: `out` takes that of a plus that of b."""
    kernels = registry.load(backend)
    a, b, labels = pairs.rows(*SHAPE, a_dtype, b_dtype)
    coefficients, transforms = torch.randn(4, SHAPE[0]), (PLAIN, PLAIN)
    student: pairs.Student = "b" if a_dtype == torch.bfloat16 else "a"
    exact_state, plain_state = (
        pairs.literal_state(a, b, labels, dtype) for dtype in (torch.float64, torch.float32)
    )
    exact, plain = (
        pairs.literal_gradient(a, b, labels, coefficients, student, transforms, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    for i, b_layout in enumerate(LAYOUTS):
        out_layout = LAYOUTS[(LAYOUTS.index(a_layout) + i) % len(LAYOUTS)]
        what = f"{a_layout} a, {b_layout} b, {out_layout} output: "
        (a_view, _), (b_view, _) = place(a, a_layout), place(b, b_layout)
        out, memory = place(torch.zeros_like(b if student == "b" else a), out_layout)
        state = pairs.fold(kernels, a_view, b_view, labels)
        found = pairs.found_state(state, SHAPE[1], labels)
        for j, name in enumerate(("rest divergence", "d_a", "d_b")):
            assert_within_budget(
                found[j], exact_state[j], plain_state[j], what + name, smallest_scale=1.0
            )
        kernels.divergence_gradient(
            TilePair(a_view, b_view, labels, 0, *transforms), state, coefficients, student, out
        )
        assert_within_budget(out, exact, plain.to(out.dtype), what + "gradient")
        assert_only_written(out, memory)
