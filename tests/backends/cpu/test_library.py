"""The library of C++ kernels: its vector functions, and how it is found, checked and loaded."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support import ROOT
from unilogit_kernels.backends.contract import Tile
from unilogit_kernels.backends.cpu import library
from unilogit_kernels.backends.cpu.kernels import CpuKernels

API = ROOT / "csrc/cpu/api.h"
INTERFACE, INTERFACE_DIGEST = library._INTERFACE, "063d1335"
"""The number in use, and what it stands for: the header without comments and spaces."""


# ---- the vector functions ---------------------------------------------------------------------

FloatArray = npt.NDArray[np.float32]


def exp_array(x: FloatArray) -> FloatArray:
    result = np.empty_like(x)
    library.load_library().unilogit_exp(x.ctypes.data, result.ctypes.data, x.size)
    return result


def exp_in_ulps(x: FloatArray) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The exact exponentials, and one unit in the last place of each in float32."""
    exact = np.exp(x.astype(np.float64))
    power = (exact.view(np.int64) & 0x7FF0_0000_0000_0000).view(np.float64)
    return exact, np.maximum(power * 2.0**-23, 2.0**-149)


@pytest.mark.timeout(600)
def test_exp_is_within_2_ulp_of_every_float(instruction_sets: list[str]) -> None:
    """By every instruction set that is here, block by block: the exact values take the longest."""
    first, exact_from, last = (
        int(np.array([value], np.float32).view(np.uint32)[0])
        for value in (-0.0, -(2.0**-26), -104.0)
    )
    block = 1 << 16  # whose temporaries stay in the cache
    for start in range(first, last + 1, block):
        stop = min(start + block, last + 1)
        x = np.arange(start, stop, dtype=np.uint32).view(np.float32)
        # exp(x) lies between 1 - 2^-26 and 1 at first: one ulp holds both neighbours.
        is_near_one = stop <= exact_from
        exact, ulp = (None, None) if is_near_one else exp_in_ulps(x)
        for name in instruction_sets:
            library.select_instruction_set(name)
            result = exp_array(x)
            if exact is None or ulp is None:
                assert result.max() <= 1, name
                assert result.min() >= 1 - 2.0**-24, name
            else:
                assert bool((np.abs(result - exact) <= 2 * ulp).all()), name


def test_exp_special_values(isa: str) -> None:
    x = np.array([0.0, -0.0, -math.inf, math.nan, -1e30, -3.4e38, -104.0], np.float32)
    assert np.array_equal(exp_array(x), [1, 1, 0, math.nan, 0, 0, 0], equal_nan=True)
    payload = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(exp_array(payload)).all()


def test_tanh_does_not_cancel(isa: str) -> None:
    bits = np.arange(0, 0x7F80_0000, 257, dtype=np.uint32)
    magnitude = bits.view(np.float32)
    x = np.concatenate([magnitude, -magnitude, np.array([math.inf, -math.inf], np.float32)])
    value, slope = np.empty_like(x), np.empty_like(x)
    loaded = library.load_library()
    loaded.unilogit_tanh(x.ctypes.data, value.ctypes.data, slope.ctypes.data, x.size)
    exact = np.tanh(x.astype(np.float64))
    with np.errstate(over="ignore"):
        exact_slope = 1 / np.cosh(x.astype(np.float64)) ** 2
    tiny = np.finfo(np.float32).tiny
    eps = np.finfo(np.float32).eps
    assert np.max(np.abs(value - exact) / np.maximum(np.abs(exact), tiny)) <= 3 * eps
    assert np.max(np.abs(slope - exact_slope) / np.maximum(exact_slope, tiny)) <= 5 * eps
    assert np.array_equal(np.signbit(value), np.signbit(x))


# ---- the binding ------------------------------------------------------------------------------


def test_float64_is_refused() -> None:
    logits = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float64.*eager backend"):
        CpuKernels().log_odds_update(
            Tile(logits, torch.zeros(2, dtype=torch.int64)), torch.zeros(3, 2)
        )


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_does_not_load_the_library() -> None:
    code = (
        "from unilogit_kernels.backends.cpu import library; library.is_available(); print('fine')"
    )
    missing = run_python(code, **{library.LIBRARY_VARIABLE: "/nonexistent.so"})
    assert missing.returncode == 0, missing.stderr


def test_missing_library_is_explained() -> None:
    code = "from unilogit_kernels.backends.cpu import library; print(library.unavailable_reason())"
    missing = run_python(code, **{library.LIBRARY_VARIABLE: "/nonexistent.so"})
    assert "/nonexistent.so does not exist" in missing.stdout
    assert "C++17 compiler" in missing.stdout


def test_library_of_other_sources_is_refused() -> None:
    code = "from unilogit_kernels.backends.cpu import library; library._INTERFACE += 1; "
    other = run_python(code + "print(library.unavailable_reason())")
    assert f"has interface {INTERFACE} and" in other.stdout
    assert f"needs {INTERFACE + 1}: it was built from other sources" in other.stdout


def test_interface_has_a_number_of_its_own() -> None:
    header = API.read_text()
    (number,) = re.findall(r"#define UNILOGIT_INTERFACE (\d+)", header)
    assert int(number) == INTERFACE
    code = "".join(re.sub(r"//.*", "", header).split())
    found = hashlib.sha256(code.encode()).hexdigest()[:8]
    assert found == INTERFACE_DIGEST, (
        f"api.h has changed: give UNILOGIT_INTERFACE and library._INTERFACE the next number if a "
        f"signature has, and note {found} here"
    )


def test_instruction_set_can_be_forced_by_the_environment() -> None:
    code = "from unilogit_kernels.backends.cpu import library; print(library.instruction_set())"
    forced = run_python(code, **{library.INSTRUCTION_SET_VARIABLE: "baseline"})
    assert forced.stdout == "baseline\n", forced.stderr
    unknown = run_python(code, **{library.INSTRUCTION_SET_VARIABLE: "mmx"})
    assert "instruction set 'mmx' is not one of" in unknown.stderr
