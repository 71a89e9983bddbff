"""Launches of every kernel and flag on hostile memory, judged against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.support.layouts import assert_only_written, place
from unilogit_kernels import objectives
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.backends.triton.launch import TritonKernels
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.testing import assert_within_budget

TRITON, EAGER = TritonKernels(), EagerKernels()
PLAIN = LogitTransform()
SCALED = LogitTransform(scale=-1.5)
CAPPED = LogitTransform(scale=0.7, softcap=5.0)


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        dtype: Of the logits.
        transform: Of the logits.
        objective: For the sweep.
        layout: See `tests.support.layouts`.
        in_place: Whether gradients overwrite the logits.
        n: Tokens.
        v: Columns.
    """

    dtype: torch.dtype = torch.float32
    transform: LogitTransform = PLAIN
    objective: str = "unilogit"
    layout: str = "odd"
    in_place: bool = False
    n: int = 3
    v: int = 3001


def _thirds(v: int) -> list[tuple[int, int]]:
    """The columns in two chunks, of one and two thirds."""
    return [(first, last) for first, last in ((0, v // 3), (v // 3, v)) if last > first]


Rows = tuple[Tensor, Tensor, Tensor]
"""Logits, labels and weights."""


def problem(case: Case) -> Rows:
    """Logits, labels and weights; the last row has weight 0, holds NaN and has no label."""
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(case.n, case.v, generator=generator)
    labels = torch.randint(0, case.v, (case.n,), generator=generator)
    labels[0], labels[1] = case.v - 1, 1  # where the ends are
    weight = torch.linspace(-1.5, 2.0, case.n)
    logits[-1], labels[-1], weight[-1] = math.nan, -100, 0.0
    return logits.to(case.dtype), labels, weight


def sweep_by_eager(
    logits: Tensor, labels: Tensor, weight: Tensor, case: Case, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values and gradient rows in `dtype`, by the eager kernels."""
    n, v = logits.shape
    state = row_state.empty_state(n, logits.device, dtype)
    EAGER.log_odds_update(Tile(logits, labels, transform=case.transform), state)
    d = row_state.log_odds(state, labels, v)
    f = objectives.REGISTRY[case.objective]()
    skipped = weight == 0
    values = f.value(d, v).masked_fill(skipped, 0.0)
    slope = (f.slope(d, v) * weight.to(dtype)).masked_fill(skipped, 0.0)
    out = torch.empty(n, v, dtype=torch.float64 if dtype == torch.float64 else logits.dtype)
    EAGER.log_odds_gradient(Tile(logits, labels, transform=case.transform), state, slope, out)
    return values, out


def check_sweep(case: Case, rows_of: Rows | None = None) -> None:
    """Values and gradients of one visit."""
    logits, labels, weight = rows_of or problem(case)
    exact, exact_rows = sweep_by_eager(logits, labels, weight, case, torch.float64)
    plain, plain_rows = sweep_by_eager(logits, labels, weight, case, torch.float32)
    view, memory = place(logits, case.layout)
    out, out_memory = (view, memory) if case.in_place else place(logits, case.layout)
    values = TRITON.log_odds_sweep(
        Tile(view, labels, transform=case.transform), weight, case.objective, case.v, out
    )
    assert_within_budget(values, exact, plain, "values", smallest_scale=1.0)
    assert_within_budget(out, exact_rows, plain_rows, "gradient")
    assert out[weight == 0].count_nonzero() == 0
    assert_only_written(out, out_memory)


MAGNITUDES = (0.0, -37.0, 3e2, -1e4, 1e5, 1e8, -1e8, 1.2e9, -1.3e9, 1.5e9, -1.6e9, 2e38, -3e38)
"""What is added to all logits of a row. A kernel rounds the product of a row's maximum and log2(e),
the more the larger it is, and from about 1.4e9 on the difference of two logits is 0 or 128."""


def shifted_problem(case: Case) -> Rows:
    """A row for each of `MAGNITUDES`, and two that are the lowest number, one of them by half."""
    case = replace(case, n=len(MAGNITUDES) + 2)
    logits, labels, _ = problem(case)
    logits = logits.float().nan_to_num(0.0)
    logits[: len(MAGNITUDES)] += torch.tensor(MAGNITUDES)[:, None]
    lowest = torch.finfo(case.dtype).min
    logits[-2, ::2] = logits[-1] = lowest
    labels[-1] = 7
    return logits.to(case.dtype), labels, torch.linspace(0.5, 2.0, case.n)


def check_magnitudes(case: Case) -> None:
    """`check_sweep` and `check_chunks` of rows of every magnitude."""
    rows = shifted_problem(case)
    case = replace(case, n=len(rows[0]))
    check_sweep(case, rows)
    check_chunks(case, rows)


def check_chunks(case: Case, rows_of: Rows | None = None) -> None:
    """Statistics folded chunk by chunk, then the gradient of each chunk."""
    logits, labels, weight = rows_of or problem(case)
    if rows_of is None:
        logits[-1], labels[-1] = logits[0], 5
    chunks = _thirds(case.v)
    states = {}
    rows = {}
    for dtype in (torch.float64, torch.float32):
        states[dtype] = row_state.empty_state(case.n, logits.device, dtype)
        EAGER.log_odds_update(Tile(logits, labels, transform=case.transform), states[dtype])
        rows[dtype] = torch.empty_like(
            logits, dtype=torch.float64 if dtype == torch.float64 else case.dtype
        )
        EAGER.log_odds_gradient(
            Tile(logits, labels, transform=case.transform),
            states[dtype],
            weight.to(dtype),
            rows[dtype],
        )
    state = row_state.empty_state(case.n, logits.device)
    views = [place(logits[:, first:last], case.layout) for first, last in chunks]
    for (first, _), (view, _) in zip(chunks, views, strict=True):
        TRITON.log_odds_update(Tile(view, labels, first, case.transform), state)
    d = [row_state.log_odds(s, labels, case.v) for s in (state, *states.values())]
    assert_within_budget(d[0], d[1], d[2], "log-odds", smallest_scale=1.0)
    for (first, last), (view, memory) in zip(chunks, views, strict=True):
        out, out_memory = (view, memory) if case.in_place else place(view, case.layout)
        TRITON.log_odds_gradient(Tile(view, labels, first, case.transform), state, weight, out)
        part = slice(first, last)
        # A part of a row is judged by the largest entry of its own.
        assert_within_budget(
            out, rows[torch.float64][:, part], rows[torch.float32][:, part], "gradient of a chunk"
        )
        assert out[weight == 0].count_nonzero() == 0
        assert_only_written(out, out_memory)


def check_runner_up(case: Case) -> None:
    """The column of the largest logit, with many equal ones, and its entry, chunk by chunk."""
    logits, labels, weight = problem(case)
    logits = logits.float().nan_to_num(0.0)
    logits[1:] = logits[1:].round().clamp(-2, 2)
    logits = logits.to(case.dtype)
    labels[-1], weight[-1] = int(logits[-1].argmax()), 0.5
    chunks = _thirds(case.v)[::-1]
    views = [place(logits[:, first:last], case.layout) for first, last in chunks]
    needs = RowNeeds(runner_up=True)
    states = {}
    for dtype, kernels in ((torch.float64, EAGER), (torch.float32, TRITON)):
        state = row_state.empty_state(case.n, logits.device, dtype, needs)
        for (first, _), (view, _) in zip(chunks, views, strict=True):
            kernels.log_odds_update(Tile(view, labels, first, case.transform), state, needs)
        states[dtype] = state
    exact, found = states.values()
    columns = row_state.runner_up(found, labels)
    assert torch.equal(columns, row_state.runner_up(exact, labels)), "another column"
    for (first, last), (view, memory) in zip(chunks, views, strict=True):
        rows = []
        for kernels, state in ((EAGER, exact), (EAGER, exact.float()), (TRITON, found)):
            state[row_state.RUNNER_UP] = row_state.as_row(columns, state.dtype)
            slope = torch.stack((weight, 1 - weight, 2 * weight)).to(state.dtype)
            out, out_memory = place(view, case.layout)
            if state.dtype == torch.float64:
                out = torch.empty_like(logits[:, first:last], dtype=torch.float64)
            elif kernels is TRITON and case.in_place:
                out, out_memory = view, memory
            kernels.log_odds_gradient(Tile(view, labels, first, case.transform), state, slope, out)
            rows.append(out)
        assert_within_budget(rows[2], rows[0], rows[1], "gradient with the runner-up")
        assert_only_written(rows[2], out_memory)


EVERYTHING = RowNeeds(*[True] * len(RowNeeds._fields))


def check_statistics(case: Case, needs: RowNeeds = EVERYTHING) -> None:
    """What a state of all rows holds, and gradient rows of five slopes, chunk by chunk.

    Of the six rows one has columns of -inf, one is nearly one peak, and one has nothing but -inf;
    of one all slopes are 0, of others all but one are.
    """
    case = replace(case, n=6)
    logits, labels, _ = problem(case)
    logits = logits.float().nan_to_num(0.0)
    forbidden = math.copysign(math.inf, -case.transform.scale)
    logits[0, ::5] = logits[2] = forbidden
    logits[1] = logits[1] / 300
    logits[1, case.v // 2] = 9.0
    logits[2, labels[2]] = 1.0
    logits, labels[-1] = logits.to(case.dtype), 5
    chunks = _thirds(case.v)
    views = [place(logits[:, first:last], case.layout) for first, last in chunks]
    exact, plain, found = (
        row_state.empty_state(case.n, logits.device, dtype, needs)
        for dtype in (torch.float64, torch.float32, torch.float32)
    )
    for (first, _), (view, _) in zip(chunks, views, strict=True):
        tile = Tile(view, labels, first, case.transform)
        for kernels, state in ((EAGER, exact), (EAGER, plain), (TRITON, found)):
            kernels.log_odds_update(tile, state, needs)
    asked = [row_state.ROW_MAX, row_state.ROW_SUM, row_state.TARGET]
    asked += [row_state.COUNT, row_state.LINEAR] if needs.mean else []
    asked += [row_state.DOT] if needs.entropy or needs.variance else []
    asked += [row_state.SQUARE] if needs.variance else []
    for i in asked:
        whole = exact[i].isfinite()
        assert torch.equal(found[i][~whole].double(), exact[i][~whole]), f"row {i}"
        assert_within_budget(
            found[i][whole], exact[i][whole], plain[i][whole], f"row {i}", smallest_scale=1.0
        )
    slope = torch.linspace(-1, 1, 5 * case.n).view(5, case.n)
    slope[:, -1] = slope[:4, 3] = slope[:3, 4] = slope[4, 4] = 0.0
    for (first, last), (view, memory) in zip(chunks, views, strict=True):
        rows = []
        for kernels, state in ((EAGER, exact), (EAGER, exact.float()), (TRITON, found)):
            state[row_state.RUNNER_UP] = row_state.as_row(
                row_state.as_integers(found[row_state.RUNNER_UP]), state.dtype
            )
            out, out_memory = place(view, case.layout)
            if state.dtype == torch.float64:
                out = torch.empty_like(logits[:, first:last], dtype=torch.float64)
            elif kernels is TRITON and case.in_place:
                out, out_memory = view, memory
            tile = Tile(view, labels, first, case.transform)
            kernels.log_odds_gradient(tile, state, slope.to(state.dtype), out)
            rows.append(out)
        assert_within_budget(rows[2], rows[0], rows[1], "gradient of five slopes")
        assert rows[2][-1].count_nonzero() == 0
        assert_only_written(rows[2], out_memory)


def check_distant_rows(case: Case) -> None:
    """Rows 2^30 elements apart, of a virtual allocation of which only touched pages exist."""
    logits, labels, weight = problem(case)
    logits[-1], labels[-1], weight[-1] = logits[0], 11, 1.0
    stride = (1 << 30) + 8
    memory = torch.empty((case.n - 1) * stride + case.v, dtype=case.dtype)
    view = memory.as_strided((case.n, case.v), (stride, 1)).copy_(logits)
    TRITON.log_odds_sweep(
        Tile(view, labels, transform=case.transform), weight, case.objective, case.v, view
    )
    _, exact = sweep_by_eager(logits, labels, weight, case, torch.float64)
    _, plain = sweep_by_eager(logits, labels, weight, case, torch.float32)
    assert_within_budget(view, exact, plain, "gradient")


def check_bad_labels(case: Case) -> None:
    """Labels that are in no column read nothing, and give NaN for their rows alone."""
    logits, labels, weight = problem(case)
    logits[-1], weight[:] = 0.0, 1.0
    labels[:] = torch.tensor([-1, -100, case.v, case.v + 1, 2**40, 3])
    view, _ = place(logits, case.layout)
    out, _ = place(logits, case.layout)
    values = TRITON.log_odds_sweep(
        Tile(view, labels, transform=case.transform), weight, case.objective, case.v, out
    )
    assert values[:5].isnan().all()
    assert out[:5].isnan().all()
    assert values[5].isfinite()
    assert out[5].isfinite().all()
