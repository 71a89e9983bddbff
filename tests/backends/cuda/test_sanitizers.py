"""The CUDA sources as C++ for the CPU, under AddressSanitizer and ThreadSanitizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ptxsim.cuda_cpu import Sanitizer, build, run
from tests.backends.cuda import pair_bugs
from tests.backends.cuda.bugs import Bug, sources_with
from tests.backends.cuda.test_faults import BUGS
from unilogit_kernels.backends.cuda import sources

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ on PATH"),
    pytest.mark.prove,
]
PROGRAMS = Path(__file__).with_name("sanitized")
KERNELS = ("rows", "general", "pairs")
SEEDS = ("0", "1")


def compiled(kernels: str, headers: Path, folder: Path, sanitizer: Sanitizer) -> Path:
    program = folder / f"{kernels}-{sanitizer}"
    options = [f"-I{headers}", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
    options += ["-Wno-unknown-pragmas", "-Wno-unused-variable"]  # nvcc's pragmas
    build(PROGRAMS / f"{kernels}.cpp", program, sanitizer=sanitizer, options=options)
    return program


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_sources_are_clean(kernels: str, sanitizer: Sanitizer, tmp_path: Path) -> None:
    program = compiled(kernels, sources.directory(), tmp_path, sanitizer)
    for seed in SEEDS:
        result = run(program, seed)
        assert result.stdout == "correct\n", result.stdout + result.stderr
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("kernels", "bug", "sanitizer", "message"),
    [
        ("rows", BUGS["a vector too many in the tail"], "address", "heap-buffer-overflow"),
        (
            "rows",
            BUGS["missing barrier before the warps' parts are read"],
            "thread",
            "data race",
        ),
        (
            "pairs",
            pair_bugs.CASES["no barrier before the warps' parts are read"].bug,
            "thread",
            "data race",
        ),
    ],
)
def test_bugs_are_caught(
    kernels: str, bug: Bug, sanitizer: Sanitizer, message: str, tmp_path: Path
) -> None:
    program = compiled(kernels, sources_with(bug, tmp_path), tmp_path, sanitizer)
    result = run(program, SEEDS[0])
    assert result.returncode != 0
    assert message in result.stderr, result.stdout + result.stderr
