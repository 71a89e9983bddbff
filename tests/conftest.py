"""Fixtures shared by the suite: every backend goes through the same tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from unilogit_kernels import available_backends
from unilogit_kernels.backends import cpu

# Whether Triton's kernels are interpreted is decided once, when they are imported: they have the
# suite for themselves, in a process that `triton_kernels/test_interpreter.py` starts.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from triton_kernels import interpreter

    interpreter.install()


def _variants() -> list[str]:
    """The backends that run on a CPU; the C++ one once for each instruction set that is here."""
    if INTERPRETED:
        return [f"triton-{share}" for share in interpreter.SHARES]
    if not cpu.is_available():
        return ["eager", "cpu"]
    best = cpu.INSTRUCTION_SETS.index(cpu.instruction_set())
    return ["eager", *(f"cpu-{name}" for name in cpu.INSTRUCTION_SETS[best:])]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    cpu.select_instruction_set(name)
    yield
    cpu.select_instruction_set(os.environ.get(cpu.INSTRUCTION_SET_VARIABLE, ""))


def _variant(variant: str) -> AbstractContextManager[None]:
    return interpreter.small_problems(variant) if INTERPRETED else _instruction_set(variant)


@pytest.fixture(params=_variants())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn. One that cannot run here fails its tests: a skip would hide it."""
    name, _, variant = str(request.param).partition("-")
    with _variant(variant) if variant else nullcontext():
        reason = available_backends()[name]
        assert reason is None, f"backend {name!r} is not available here: {reason}"
        yield name


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtypes that every backend takes."""
    chosen: torch.dtype = request.param
    return chosen
