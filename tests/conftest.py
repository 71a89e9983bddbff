"""Fixtures shared by the suite: every backend goes through the same tests."""

from __future__ import annotations

import pytest
import torch

from unilogit_kernels import available_backends
from unilogit_kernels.backends import BACKENDS

AVAILABLE = [name for name, reason in available_backends().items() if reason is None]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn. One that cannot run here fails its tests: a skip would hide it."""
    name = str(request.param)
    reason = available_backends()[name]
    assert reason is None, f"backend {name!r} is not available here: {reason}"
    return name


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtypes that every backend takes."""
    chosen: torch.dtype = request.param
    return chosen
