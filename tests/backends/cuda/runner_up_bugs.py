"""Bugs put into the runner-up of the CUDA kernels on purpose, each of which must be caught."""

from __future__ import annotations

import math

import torch

from tests.backends.cuda import devices
from tests.backends.cuda.bugs import SPLIT, Bug, Case
from tests.functional import test_runner_up as tests
from tests.support.problems import TRANSFORMS
from unilogit_kernels.backends.contract import Tile
from unilogit_kernels.backends.cuda.launch import CudaKernels
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import RowNeeds

KERNELS = CudaKernels()


def columns(device: devices.PtxLauncher) -> None:
    """Maxima that are there many times, chunks in another order than the columns."""
    tests.test_of_equal_ones_the_lowest(KERNELS, torch.float32, (2, 0, 1))


def gradients(device: devices.PtxLauncher) -> None:
    """In place, where a slope takes the logit itself."""
    tests.test_gradient_rows(KERNELS, torch.float32, TRANSFORMS["softcap"], in_place=True)


def nothing_but_the_label(device: devices.PtxLauncher) -> None:
    """Whose lowest token but the label is the runner-up; with moments maxima begin at -inf."""
    needs = RowNeeds(runner_up=True, mean=True)
    logits, labels = torch.full((1, 700), -math.inf), torch.tensor([0])
    logits[0, 0] = 1.0
    state = row_state.empty_state(1, logits.device, needs=needs)
    KERNELS.log_odds_update(Tile(logits, labels), state, needs)
    assert row_state.runner_up(state, labels).item() == 1


CASES = {
    "a chunk's columns are counted from its first one": Case(
        Bug("kernels.h", "part.column += static_cast<int>(first_column);", ";", None), columns
    ),
    "of equal ones the highest": Case(
        Bug(
            "row_parts.h", "a.column < b.column ? a.column", "a.column > b.column ? a.column", None
        ),
        columns,
    ),
    "a larger one is not looked for behind the last": Case(
        Bug("row_parts.h", "largest == part.max ? part.column : kNoColumn", "part.column", None),
        columns,
    ),
    "a warp keeps the column of its first lane": Case(
        Bug(
            "kernels.h",
            "part = merge(part, other, needs);",
            "other.column = part.column;\n    part = merge(part, other, needs);",
            None,
        ),
        columns,
    ),
    "blocks leave columns where others have theirs": Case(
        Bug(
            "row_parts.h",
            "row < kStateTarget ? row : row - 1",
            "row < kStateTarget ? row : 0",
            None,
        ),
        columns,
        SPLIT,
    ),
    "the label of a row without others is its own runner-up": Case(
        Bug("row_parts.h", "nowhere ? kNoColumn : part.column", "part.column", None),
        nothing_but_the_label,
    ),
    "the gradient takes a column of the vocabulary for one of the chunk": Case(
        Bug(
            "row_math.h",
            "int_of_bits(state[row + kStateRunnerUp * stride]) - first_column;",
            "int_of_bits(state[row + kStateRunnerUp * stride]);",
            None,
        ),
        gradients,
    ),
    "the runner-up's logit is read behind its gradient": Case(
        Bug(
            "row_walk.h",
            "out_.data[runner_up] = Out::store(at_runner_up);",
            "out_.data[runner_up] = Out::store(entry_of(gradient.entry_there(), runner_up));",
            None,
        ),
        gradients,
    ),
}
