"""Bugs put into the sums, moments and general gradient rows of the CUDA kernels on purpose."""

from __future__ import annotations

import torch

from tests.backends import test_statistics_kernels as tests
from tests.backends.cuda import devices
from tests.backends.cuda.bugs import SPLIT, Bug, Case
from unilogit_kernels.backends.contract import Tile
from unilogit_kernels.backends.cuda.launch import CudaKernels
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import RowNeeds

KERNELS = CudaKernels()
V = 1500
CHUNKS = tests.cut(V, 1, 1400)
"""The second is long enough to be split."""


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Labels in columns of tiles and of every thread; maxima that come late."""
    logits = 3 * torch.randn(16, V) + torch.linspace(0, 6, V)
    return logits, torch.arange(16) * 43 + 7


# ---- problems ----------------------------------------------------------------------------------


def statistics(device: devices.PtxLauncher) -> None:
    logits, labels = problem()
    state = tests.fold(KERNELS, logits, labels, chunks=CHUNKS)
    tests.check(state, logits, labels, tests.EVERYTHING)


def forbidden_columns(device: devices.PtxLauncher) -> None:
    """Of -inf, which have no share of an entropy."""
    tests.test_hard_rows(KERNELS, (100, 300))


def distant_columns(device: devices.PtxLauncher) -> None:
    """Masked by the most negative number: the sum of their distances is infinite."""
    logits, labels = problem()
    logits[:, : V // 2] = torch.finfo(torch.float32).min
    needs = RowNeeds(entropy=True, variance=True)
    state = tests.fold(KERNELS, logits, labels, needs, tests.cut(V, V // 2))
    assert state[[row_state.ROW_SUM, row_state.DOT, row_state.SQUARE]].isfinite().all()


def needs(device: devices.PtxLauncher) -> None:
    """What an earlier launch left stays where a later one does not need it."""
    logits, labels = problem()
    state = tests.fold(KERNELS, logits, labels)
    before = state.clone()
    KERNELS.log_odds_update(Tile(logits, labels), state, RowNeeds(mean=True))
    assert torch.equal(state[row_state.DOT :], before[row_state.DOT :])


def gradients(device: devices.PtxLauncher) -> None:
    for transform in (tests.TRANSFORMS["negative scale"], tests.TRANSFORMS["softcap"]):
        tests.check_gradient(KERNELS, *problem(), at=(1, 600), transform=transform)


def hard_gradients(device: devices.PtxLauncher) -> None:
    tests.test_gradient_of_hard_rows(KERNELS)


def rows_of_one_slope(device: devices.PtxLauncher) -> None:
    """Neither a tilt nor a constant is a row of zeros, which would not be read."""
    logits, labels = problem()
    state = tests.fold(KERNELS, logits, labels)
    slope = torch.zeros(5, 16)
    slope[3, ::2] = slope[4, 1::2] = 0.5
    out = torch.empty_like(logits)
    KERNELS.log_odds_gradient(Tile(logits, labels), state, slope, out)
    assert (out != 0).any(1).all()


def in_parts(right: str, wrong: str) -> Bug:
    return Bug("row_parts.h", right, wrong, None)


def in_rows(right: str, wrong: str) -> Bug:
    return Bug("row_math.h", right, wrong, None)


CASES = {
    "the label's column is counted": Case(
        in_parts("tile.count += is_label(i) ? 0.0f : 1.0f;", "tile.count += 1.0f;"), statistics
    ),
    "the label's logit is in the sum": Case(
        in_parts(
            "linear.add(i, is_label(i) ? 0.0f : transform", "linear.add(i, false ? 0.0f : transform"
        ),
        statistics,
    ),
    "sums stay where the maximum was": Case(
        in_parts("fmaf(a.count, shift_of(a.max) - shift, a.linear)", "a.linear"), statistics
    ),
    "products stay where the maximum was": Case(
        in_parts("fmaf(part.sum, bounded(shift_of(part.max) - shift), part.dot)", "part.dot"),
        statistics,
    ),
    "products of what has no share": Case(
        in_parts("weight * bounded(s)", "weight * s"), forbidden_columns
    ),
    "squares of what has no share": Case(
        in_parts("bounded(s) - mean", "s - mean"), forbidden_columns
    ),
    "products of a part that has no share": Case(
        in_parts("bounded(shift_of(part.max) - shift)", "shift_of(part.max) - shift"),
        distant_columns,
    ),
    "a mean of nothing": Case(
        in_parts("b == 0.0f ? 0.0f : quick_quotient(a, b)", "quick_quotient(a, b)"),
        forbidden_columns,
    ),
    "parts are as if they had one mean": Case(
        in_parts("within + square_between(p, q)", "within"), statistics
    ),
    "squares keep the weight that they had": Case(
        in_parts("fmaf(p.weight, a.square, q.weight * b.square)", "a.square + b.square"),
        statistics,
    ),
    "squares about the maximum": Case(
        in_parts("const float mean = ratio(tile.dot, tile.sum);", "const float mean = 0.0f;"),
        statistics,
    ),
    "parts have one plane for all moments": Case(
        in_parts("row < kStateTarget ? row : row - 1", "row < kStateTarget ? row : kStateTarget"),
        statistics,
        SPLIT,
    ),
    "products are kept that nobody needs": Case(
        in_parts("if (needs.has(kNeedsDot)) visit", "visit"), needs
    ),
    "a block keeps the moments of its first warp": Case(
        Bug("kernels.h", "field = moments[row - kStateCount][lane];", ";", None), statistics
    ),
    "a row without a tilt": Case(
        in_rows("fmaf(tilt, bounded(s), coefficient)", "coefficient"), gradients
    ),
    "a tilt of what is not normalised": Case(
        in_rows("-tilt * derivative / rest.sum", "-tilt * derivative"), gradients
    ),
    "a row without a constant": Case(
        in_rows("bounded(s), coefficient), uniform)", "bounded(s), coefficient), 0.0f)"), gradients
    ),
    "a constant of the transformed logits": Case(
        in_rows("uniform * derivative}", "uniform}"), gradients
    ),
    "a constant without the slope of the cap": Case(
        Bug(
            "row_walk.h",
            "entry = kCapped ? value * cap_slope : value;",
            "entry = kCapped ? fmaf(value - gradient.entry(-infinity()), cap_slope, "
            "gradient.entry(-infinity())) : value;",
            None,
        ),
        gradients,
    ),
    "the runner-up has an entry like others": Case(
        in_rows("at_runner_up * derivative, runner_up}", "at_runner_up * derivative, -1}"),
        gradients,
    ),
    "a tilt of what has no share": Case(
        in_rows("fmaf(tilt, bounded(s)", "fmaf(tilt, s"), hard_gradients
    ),
    "a rest of nothing has an infinite maximum": Case(
        in_rows("rest.max = shift_of(rest.max);", ""), hard_gradients
    ),
    "a rest of nothing is divided by": Case(
        in_rows("rest.sum == 0.0f ? 1.0f : rest.sum", "rest.sum"), hard_gradients
    ),
    "a tilt alone is a row of zeros": Case(
        in_rows("row.size += fabsf(tilt) + fabsf(uniform);", "row.size += fabsf(uniform);"),
        rows_of_one_slope,
    ),
    "a constant alone is a row of zeros": Case(
        in_rows("row.size += fabsf(tilt) + fabsf(uniform);", "row.size += fabsf(tilt);"),
        rows_of_one_slope,
    ),
}
