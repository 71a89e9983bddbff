"""The shared tests on the GPU, and a checker of memory, each a process that reports as it goes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.gpu_session.cases import Case, Missing, Report
from benchmarks.gpu_session.processes import ROOT
from benchmarks.gpu_session.target import Target

_SECONDS = 400.0
GPU_TESTS = ("tests/backends/gpu",)
SHARED_TESTS = (
    "tests/functional/test_accuracy.py",
    "tests/backends/test_statistics_kernels.py",
    "tests/backends/test_divergence_kernels.py",
    "tests/backends/test_layouts.py",
    "tests/functional/test_tensors.py",
    "tests/calls/test_calls.py",
)
"""With all tensors on the GPU; as `make gpu` runs them, and the layouts."""
_TEST_LINE = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error")


def cases(target: Target) -> list[Case]:
    """What only a GPU can show, memory, then everything shared."""
    found = [Case("pytest: tests of GPUs", partial(_pytest, target, GPU_TESTS), _SECONDS)]
    found += [
        Case(f"compute-sanitizer: {backend}", partial(_sanitizer, target, backend), _SECONDS)
        for backend in target.backends()
    ]
    if not target.rehearses:
        found.append(Case("pytest: shared", partial(_pytest, target, SHARED_TESTS), _SECONDS))
    return found


def _lines(command: Sequence[str], environment: dict[str, str]) -> Iterator[str]:
    """Of a process, as it prints them; then how it ended, as `status N`."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
            yield line.rstrip("\n")
    yield f"status {process.returncode}"


def _pytest(target: Target, tests: Sequence[str], report: Report) -> dict[str, Any]:
    import importlib.util

    if importlib.util.find_spec("pytest") is None:
        raise Missing("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
    environment = {} if target.rehearses else {"UNILOGIT_KERNELS_TEST_DEVICE": "cuda"}
    environment["TRITON_INTERPRET"] = "0"
    counts: Counter[str] = Counter()
    failures: list[str] = []
    status = ""
    for status in _lines([*command, *tests], environment):
        found = _TEST_LINE.match(status)
        if found is None:
            continue
        counts[found[2].lower()] += 1
        if found[2] in ("FAILED", "ERROR"):
            failures.append(found[1])
        report([{"counts": dict(counts), "failures": failures}])
    if failures or status != "status 0":
        raise AssertionError(
            f"pytest ended with {status}, {dict(counts)}: {', '.join(failures[:40])}"
        )
    return {"counts": dict(counts)}


def _sanitizer(target: Target, backend: str, report: Report) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Missing("compute-sanitizer is not on PATH")
    missing = target.backends()[backend]
    if missing is not None:
        raise Missing(missing)
    command = [tool, "--tool", "memcheck", sys.executable, "-m", "benchmarks.gpu_session.one_step"]
    # Each tensor is an allocation of its own, whose bounds are then known.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said: list[str] = []
    for line in _lines([*command, "small", "--backend", backend], environment):
        said.append(line)
    errors = _ERRORS.findall("\n".join(said))
    if not errors:
        raise RuntimeError(f"no summary of errors: {' '.join(said[-5:])}")
    assert errors[-1] == "0", f"{errors[-1]} errors: {' '.join(said[:10])}"
    return {"errors": 0}
