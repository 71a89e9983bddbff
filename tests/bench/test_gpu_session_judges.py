"""A session's judges see what is wrong with a kernel, and nothing in one that is right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_session import pairs, rows
from benchmarks.gpu_session.judge import Judge
from tests.support.layouts import FEW_LAYOUTS, assert_only_written, place
from unilogit_kernels.backends.contract import Tile, TilePair
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.maths import pair_state, row_state
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds


class Wrong(EagerKernels):
    """The eager kernels but for one thing in one entry."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def log_odds_update(self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN) -> None:
        super().log_odds_update(tile, state, needs)
        if self.fault == "a sum":
            state[row_state.ROW_SUM, 0] *= 1.001

    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        super().log_odds_gradient(tile, state, slope, out)
        self._spoil(out)

    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        super().divergence_update(pair, state)
        if self.fault == "a sum":
            state[pair_state.B_SUM, 0] *= 1.001

    def divergence_gradient(
        self,
        pair: TilePair,
        state: Tensor,
        coefficients: Tensor,
        student: Literal["a", "b"],
        out: Tensor,
    ) -> None:
        super().divergence_gradient(pair, state, coefficients, student, out)
        self._spoil(out)

    def _spoil(self, out: Tensor) -> None:
        if self.fault == "an entry":
            out[0, -1] += 0.05 * out[0].abs().max()
        if self.fault == "a neighbour":
            out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(0.0)
        if self.fault == "a row of weight 0":
            out[-1, 0] = 1e-3


FLAGS = {"dtype": "float32", "transform": "capped", "layout": "odd", "chunks": 3}
PAIR = {**FLAGS, "other": "bfloat16", "other_transform": "scaled"}
CHECKS: dict[str, tuple[Callable[..., Judge], dict[str, Any]]] = {
    "statistics": (rows.check_statistics, {**FLAGS, "needs": "everything", "data": "random"}),
    "gradient": (rows.check_gradient, {**FLAGS, "state": "everything", "out": "in place"}),
    "pair statistics": (pairs.check_pair_statistics, {**PAIR, "labelled": True}),
    "pair gradient": (
        pairs.check_pair_gradient,
        {**PAIR, "student": "a", "out": "float16"},
    ),
}


HARMLESS = {"pair gradient": ("a sum",)}
"""Its coefficients hold what the sums are for."""


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("fault", ["", "a sum", "an entry", "a neighbour", "a row of weight 0"])
def test_judges_see_faults(name: str, fault: str) -> None:
    check, flags = CHECKS[name]
    shows = fault == "a sum" if "statistics" in name else fault not in ("", *HARMLESS.get(name, ()))
    with pytest.raises(AssertionError) if shows else nullcontext():
        assert check(Wrong(fault), (5, 301), "cpu", **flags).worst < 1


@pytest.mark.parametrize("layout", FEW_LAYOUTS)
def test_layouts(layout: str) -> None:
    values = torch.arange(1.0, 22.0).view(3, 7)
    view, memory = place(values, layout)
    assert torch.equal(view, values)
    assert_only_written(view, memory)
    memory.fill_(1.0)
    with pytest.raises(AssertionError, match="outside"):
        assert_only_written(view, memory)
