"""Triton's kernels as the PTX they compile to, executed with every access checked.

`ptxsim` finds accesses out of bounds or misaligned, writes to what is read-only, races, divergent
barriers and uninitialised values; results are judged against float64.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ptxsim import Schedule
from ptxsim.triton_device import triton_device
from tests.backends.triton.battery import (
    CAPPED,
    EVERYTHING,
    PLAIN,
    SCALED,
    TRITON,
    Case,
    check_bad_labels,
    check_chunks,
    check_distant_rows,
    check_magnitudes,
    check_runner_up,
    check_statistics,
    check_sweep,
)
from tests.backends.triton.small_problems import SHARES, small_problems
from tests.support import ROOT
from unilogit_kernels import linear_unilogit_loss, unilogit_loss
from unilogit_kernels.backends.contract import Tile, TilePair
from unilogit_kernels.maths import pair_state, row_state
from unilogit_kernels.testing import assert_within_budget, force_backend

SEQUENTIAL = Schedule()
SCHEDULES = {
    "sequential": SEQUENTIAL,
    "reversed": Schedule("reversed"),
    "random 1": Schedule("random", seed=1),
    "random 2": Schedule("random", seed=2),
}
PINNED = pytest.mark.pinned_triton
FLAGS = [
    Case(torch.float32, PLAIN, "unilogit"),
    Case(torch.float32, CAPPED, "cross_entropy", in_place=True),
    Case(torch.bfloat16, SCALED, "unilogit_forward", in_place=True),
    Case(torch.bfloat16, CAPPED, "unilogit", layout="contiguous", v=3000),
    Case(torch.float16, PLAIN, "gradient_ascent"),
    Case(torch.float32, SCALED, "unilogit", layout="inner stride", v=501),
    Case(torch.bfloat16, PLAIN, "unilogit", layout="inner stride", v=7, in_place=True),
]
SHARED_SUITE = {
    "one row": (
        "functional/test_accuracy.py functional/test_tensors.py calls/test_calls.py",
        "(test_logits and torch.float32 and unilogit and not forward and not padded) "
        "or (test_hard_rows and 37 and mean) or offset or (backward_twice and float16) "
        "or (poison and nan and bfloat16 and mean)",
    ),
    "two rows": (
        "backends/test_divergence_kernels.py",
        "(test_hard_rows and whole) or (test_state and float32 and split) "
        "or (test_gradient and float32 and whole) or equal_rows",
    ),
    "statistics": (
        "backends/test_statistics_kernels.py",
        "stays or hard or peak or one_size or common or (shards and float32) "
        "or (test_derivatives and bfloat16) or (test_gradient_in_place and softcap and float16) "
        "or (test_gradient_into and bfloat16 and float32)",
    ),
    "layouts": (
        "backends/test_layouts.py",
        "(whole and float32) or (split and bfloat16)",
    ),
    "runner-up": (
        "functional/test_runner_up.py functional/test_methods.py",
        "(test_column and bfloat16 and not softcap) or lowest and float32 or every_column or "
        "cannot_count or hard_rows or (test_gradient_rows and float32) or without_a_slope or "
        "ways_to_run or (test_tokens and loku and float32)",
    ),
}
"""Tests that every backend goes through, and a filter: each dtype and flag costs a compilation."""


# Every flag of the one-row kernels is in FLAGS as well.
@pytest.mark.prove
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "part",
    [
        pytest.param("one row", marks=PINNED),
        "two rows",
        pytest.param("runner-up", marks=PINNED),
        "statistics",
        pytest.param("layouts", marks=PINNED),
    ],
)
def test_shared_suite(part: str) -> None:
    """On the kernels compiled for sm_90."""
    tests, matching = SHARED_SUITE[part]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not every", "-k", matching, *tests.split()],
        cwd=ROOT / "tests",
        env={**os.environ, "UNILOGIT_KERNELS_EXECUTE_PTX": "90"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.mark.parametrize(
    ("case", "share"),
    [
        # A plain run has each case on one way to share the rows, and both ways.
        pytest.param(case, share, marks=[pytest.mark.prove] if (i + j) % 2 else [])
        for i, case in enumerate(FLAGS)
        for j, share in enumerate(SHARES)
    ],
    ids=str,
)
def test_every_kernel_and_flag(case: Case, share: str) -> None:
    read_only = ["labels"] if case.in_place else ["labels", "logits"]
    with small_problems(share), triton_device(90, read_only=read_only):
        check_sweep(case)
        check_chunks(case)
        check_runner_up(case)
        check_statistics(case)


ORDERS = [
    pytest.param(
        arch,
        schedule,
        marks=[] if (arch, name) in ((80, "random 1"), (100, "random 1")) else PINNED,
        id=f"{arch}-{name}",
    )
    for arch in (80, 90, 100, 120)
    for name, schedule in SCHEDULES.items()
    if arch == 90 or name == "random 1"
]
"""Every order on one architecture; on the others the one most likely to show a missing barrier. On
a newer triton sm_90 has all other tests, and the PTX of sm_120 has the instructions of sm_80."""


@pytest.mark.prove
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("arch", "schedule"), ORDERS)
def test_any_order_on_any_architecture(arch: int, schedule: Schedule, share: str) -> None:
    case = Case(torch.bfloat16, PLAIN, in_place=True, n=5)
    with small_problems(share), triton_device(arch, schedule=schedule):
        check_sweep(case)
        check_chunks(case)
        check_runner_up(case)
        check_statistics(case)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_every_magnitude(dtype: torch.dtype, share: str) -> None:
    with small_problems(share), triton_device(90):
        check_magnitudes(Case(dtype))


@pytest.mark.parametrize("share", SHARES)
def test_labels_out_of_range_read_nothing_and_give_nan(share: str) -> None:
    with small_problems(share), triton_device(90):
        check_bad_labels(Case(n=6))


@pytest.mark.parametrize("share", SHARES)
def test_offsets_beyond_32_bits(share: str) -> None:
    # Looking for races would take memory for every element in between.
    with small_problems(share), triton_device(90, schedule=Schedule(check_races=False)):
        check_distant_rows(Case(torch.bfloat16))


def test_states_beyond_32_bits() -> None:
    """Rows of the states so far apart that the offset of the last one takes 33 bits."""
    a, b, labels = torch.randn(2, 300), torch.randn(2, 300), torch.tensor([5, 299])
    states = (
        pair_state.empty_state(2, a.device),
        row_state.empty_state(2, a.device, needs=EVERYTHING),
    )
    for state in states:
        rows = state.shape[0]
        stride = 2**31 // (rows - 1) + 8
        distant = torch.empty((rows - 1) * stride + 2).as_strided((rows, 2), (stride, 1))
        distant.copy_(state)
        # Looking for races would take memory for every element in between.
        with small_problems(SHARES[0]), triton_device(90, schedule=Schedule(check_races=False)):
            for each in (state, distant):
                if rows == EVERYTHING.state_rows:
                    TRITON.log_odds_update(Tile(a, labels), each, EVERYTHING)
                else:
                    TRITON.divergence_update(TilePair(a, b, labels), each)
        assert torch.equal(distant, state)


@pytest.mark.parametrize("factor", [1.0, -0.37, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale(factor: float, dtype: torch.dtype) -> None:
    values = torch.randn(2 * 4096 + 33).to(dtype)
    expected = (values.float() * factor).to(dtype)
    with small_problems(SHARES[0]), triton_device(90, read_only=["factor"]) as launches:
        TRITON.scale_(values, torch.tensor(factor))
    assert torch.equal(values.nan_to_num(9.0), expected.nan_to_num(9.0))
    moved = launches[0].counters.global_bytes_stored
    assert moved == (0 if factor == 1.0 else values.nbytes)


def test_public_calls_reach_the_kernels() -> None:
    """`force_backend` sends loss and backward there, for logits and for a fused linear."""
    labels = torch.tensor([1, -100, 5])
    operands = torch.randn(3, 1100), torch.randn(3, 16), torch.randn(1100, 16)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        logits, hidden, weight = (x.to(dtype) for x in operands)
        trained = logits.requires_grad_(), hidden.requires_grad_()
        loss = unilogit_loss(logits, labels) + linear_unilogit_loss(hidden, weight, labels)
        return torch.autograd.grad(loss, trained)

    with force_backend("eager"):
        exact, plain = gradients(torch.float64), gradients(torch.float32)
    with force_backend("triton"), small_problems(SHARES[0]), triton_device(80) as launches:
        found = gradients(torch.float32)
        names = {launch.name for launch in launches}
    assert {"log_odds_sweep_kernel", "scale_kernel"} <= names
    for name, *values in zip(("logits", "hidden"), found, exact, plain, strict=True):
        assert_within_budget(values[0], values[1], values[2], name)
