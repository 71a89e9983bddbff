"""Bugs put into the kernels of two rows, of the runner-up and of moments, each of them caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptxsim import KernelFaultError
from tests.backends.cuda import devices, general_bugs, pair_bugs, runner_up_bugs
from tests.backends.cuda.bugs import Case, sources_with

pytestmark = [
    pytest.mark.skipif(devices.NVCC is None, reason=devices.WITHOUT_NVCC),
    pytest.mark.prove,
]
CASES = {
    "pairs": pair_bugs.CASES,
    "runner-up": runner_up_bugs.CASES,
    "general": general_bugs.CASES,
}


@pytest.mark.parametrize("share", devices.SHARES)
@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_without_a_bug_nothing_is_caught(cases: dict[str, Case], share: str) -> None:
    for problem in dict.fromkeys(case.problem for case in cases.values()):
        with devices.small_problems(share) as device, devices.block_sizes(64, 32, 128):
            problem(device)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{kernels}: {name}")
        for kernels, cases in CASES.items()
        for name, case in cases.items()
    ],
)
def test_bugs_are_caught(case: Case, tmp_path: Path) -> None:
    with devices.small_problems(case.share) as device, devices.block_sizes(64, 32, 128):
        device.headers = sources_with(case.bug, tmp_path)
        with pytest.raises((KernelFaultError, AssertionError), match=case.bug.caught):
            case.problem(device)
