"""The shared suite on Triton's kernels, interpreted: what they compute, apart from any compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

SELECTION = {
    "flags": ("functional/test_accuracy.py::test_logits", "not float16"),
    "shapes and hard rows": (
        "functional/test_accuracy.py",
        "not float16 and not 5000 and "
        "(test_odd_sizes or test_hard_rows or test_extreme_log_odds or test_empty_parts_merge)",
    ),
    "chunks, layouts and weights": (
        "functional/test_accuracy.py::test_linear "
        "functional/test_tensors.py::test_logits_of_any_strides calls/test_calls.py",
        "not float16 and ((test_linear and softcap and unilogit and not forward) or "
        "any_strides or (token_weights and logits) or (poison and nan) or all_ignored)",
    ),
    "runner-up": (
        "functional/test_runner_up.py",
        "(lowest and float32 and 0-1-2) or (test_hard_rows and 100) or cannot_count or "
        "(test_gradient_rows and float32 and softcap and True)",
    ),
    "statistics": (
        "backends/test_statistics_kernels.py",
        "stays or (hard and not odd) or one_size or (peak and whole and 12) "
        "or (test_gradient_in_place and float32 and softcap and 100)",
    ),
    "two rows": (
        "backends/test_divergence_kernels.py",
        "equal_rows or (forbidden and float32) or (test_gradient and float32 and True and softcap)",
    ),
    "layouts": (
        "backends/test_layouts.py",
        "contiguous and (whole and float32 or split and mixed)",
    ),
}
"""Tests and a filter. The interpreter is slow; compiled, the kernels run the whole suite."""

REST = (pytest.mark.pinned_triton, pytest.mark.prove)
NEWEST = ("shapes and hard rows", "two rows")
"""What tells one triton's interpreter from another's: every operation that the kernels use."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=[] if part in NEWEST else REST) for part in SELECTION],
)
def test_shared_suite(part: str) -> None:
    tests, matching = SELECTION[part]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not every", "-k", matching, *tests.split()],
        cwd=ROOT / "tests",
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
