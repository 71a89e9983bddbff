"""Fixtures shared by the suite: every backend goes through the same tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from unilogit_kernels import available_backends
from unilogit_kernels.backends import cpu


def _variants() -> list[str]:
    """The backends that run on a CPU; the C++ one once for each instruction set that is here."""
    if not cpu.is_available():
        return ["eager", "cpu"]
    best = cpu.INSTRUCTION_SETS.index(cpu.instruction_set())
    return ["eager", *(f"cpu-{name}" for name in cpu.INSTRUCTION_SETS[best:])]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_variants())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn. One that cannot run here fails its tests: a skip would hide it."""
    name, _, instruction_set = str(request.param).partition("-")
    reason = available_backends()[name]
    assert reason is None, f"backend {name!r} is not available here: {reason}"
    if instruction_set:
        cpu.select_instruction_set(instruction_set)
    yield name
    if instruction_set:
        cpu.select_instruction_set(os.environ.get(cpu.INSTRUCTION_SET_VARIABLE, ""))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtypes that every backend takes."""
    chosen: torch.dtype = request.param
    return chosen
