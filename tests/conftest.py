"""Fixtures shared by the suite: every backend goes through the same tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from cuda_kernels import devices

from unilogit_kernels import available_backends
from unilogit_kernels.backends import DivergenceKernels, cpu, load

# Whether Triton's kernels are interpreted is decided once, when they are imported: they have the
# suite for themselves, in a process that `triton_kernels/test_interpreter.py` starts.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from triton_kernels import interpreter

    interpreter.install()


def _variants() -> list[Any]:
    """The backends that run on a CPU; the C++ one once for each instruction set that is here.

    The CUDA kernels run as the PTX that nvcc makes of them, on an executor that checks each access.
    """
    if INTERPRETED:
        return [f"triton-{share}" for share in interpreter.SHARES]
    names: list[Any] = ["eager"]
    if cpu.is_available():
        best = cpu.INSTRUCTION_SETS.index(cpu.instruction_set())
        names += (f"cpu-{name}" for name in cpu.INSTRUCTION_SETS[best:])
    else:
        names.append("cpu")
    without_nvcc = pytest.mark.skipif(devices.NVCC is None, reason=devices.WITHOUT_NVCC)
    names += (pytest.param(f"cuda-{share}", marks=without_nvcc) for share in devices.SHARES)
    return names


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    cpu.select_instruction_set(name)
    yield
    cpu.select_instruction_set(os.environ.get(cpu.INSTRUCTION_SET_VARIABLE, ""))


def _variant(name: str, variant: str) -> AbstractContextManager[Any]:
    if name == "cuda":
        return devices.small_problems(variant)
    return interpreter.small_problems(variant) if INTERPRETED else _instruction_set(variant)


@pytest.fixture(params=_variants())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn. One that cannot run here fails its tests: a skip would hide it."""
    name, _, variant = str(request.param).partition("-")
    with _variant(name, variant) if variant else nullcontext():
        reason = available_backends()[name]
        assert reason is None, f"backend {name!r} is not available here: {reason}"
        yield name


@pytest.fixture
def two_row_backend(backend: str) -> str:
    """Each backend that has the two-row kernels: it joins by implementing the protocol."""
    if not isinstance(load(backend), DivergenceKernels):
        pytest.skip(f"backend {backend!r} has no two-row kernels")
    return backend


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtypes that every backend takes."""
    chosen: torch.dtype = request.param
    return chosen
