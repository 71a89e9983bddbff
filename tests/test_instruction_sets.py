"""The numerical tests with each instruction set forced, on torch and its libraries as on ours.

An error budget that holds on one processor only is no budget: sums are added up in another order
on each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import ROOT
from unilogit_kernels.backends.cpu import library

TESTS = ROOT / "tests"
FORCED = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        library.INSTRUCTION_SET_VARIABLE: "avx2",
    },
    # MKL_CBWR: MKL obeys nothing else on processors of other makers than Intel's.
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        library.INSTRUCTION_SET_VARIABLE: "baseline",
    },
}
"""Environments by what the C++ kernels are forced to; the suite itself runs with the best set."""

CAPABILITIES = {"avx2": "AVX2", "baseline": "DEFAULT"}
"""What torch calls these."""

JUDGED = re.compile(
    r"within_budget|TYPICAL_FACTOR|cpu\.rows import"
    r"|support\.(problems|divergence_pairs|roundings) import"
)
ELSEWHERE = [TESTS / "backends" / name for name in ("cuda", "gpu", "triton")]
"""Folders of tests that launch kernels for GPUs, whose results depend on no processor."""
OF_MODELS = [TESTS / name for name in ("distributed", "huggingface", "integrations", "unlearning")]
"""Folders of tests of whole models, whose layers are torch's own. No processor of today runs one on
the baseline set, and every run on a machine without AVX-512 has them on AVX2."""


def numerical_tests(*, of_models: bool) -> list[Path]:
    """Files whose tests go through the error budget, of whole models or of what lies below."""
    return [
        file
        for file in sorted(TESTS.rglob("test_*.py"))
        if not any(file.is_relative_to(folder) for folder in ELSEWHERE)
        and any(file.is_relative_to(folder) for folder in OF_MODELS) is of_models
        and file != Path(__file__).resolve()
        and JUDGED.search(file.read_text(encoding="utf-8"))
    ]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **FORCED[name]},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(params=FORCED)
def forced(request: pytest.FixtureRequest) -> str:
    """An instruction set that this processor has."""
    name = str(request.param)
    best = library.INSTRUCTION_SETS.index(library.instruction_set())
    if library.INSTRUCTION_SETS.index(name) < best:
        pytest.skip(f"this processor has no {name}")
    return name


def test_an_instruction_set_is_forced(forced: str) -> None:
    code = (
        "import torch; from unilogit_kernels.backends.cpu import library; "
        "print(torch.backends.cpu.get_cpu_capability(), library.instruction_set())"
    )
    assert run(forced, "-c", code).stdout.split() == [CAPABILITIES[forced], forced]


@pytest.mark.prove
@pytest.mark.timeout(7200)
def test_numerical_tests_pass(forced: str) -> None:
    _pass(forced, numerical_tests(of_models=False))


@pytest.mark.prove
@pytest.mark.every
@pytest.mark.timeout(7200)
def test_tests_of_models_pass() -> None:
    _pass("avx2", numerical_tests(of_models=True))


def _pass(name: str, files: list[Path]) -> None:
    own = library.instruction_set(), torch.backends.cpu.get_cpu_capability()
    if own == (name, CAPABILITIES[name]):
        pytest.skip("a plain run is on it")
    options = "--tb=line", "-p", "no:cacheprovider", "-m", "not prove and not pairs"
    result = run(name, "-m", "pytest", *options, *map(str, files))
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr
