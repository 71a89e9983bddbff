"""Fixtures shared by the suite: every backend goes through the same tests."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.cuda import devices
from tests.backends.triton.small_problems import SHARES, small_problems
from tests.support.selection import mark_selection
from unilogit_kernels import available_backends
from unilogit_kernels.backends.cpu import library
from unilogit_kernels.fused_linear import gemm, plan

# Triton's kernels have the suite for themselves, in processes that backends/triton starts: whether
# they are interpreted is decided once, when they are imported, and to compile them takes long.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXECUTED_FOR = os.environ.get("UNILOGIT_KERNELS_EXECUTE_PTX")
"""Compute capability times ten for which Triton's kernels are compiled, and then executed here."""

DEVICE = os.environ.get("UNILOGIT_KERNELS_TEST_DEVICE", "cpu")
"""Where the tests' tensors live; `make gpu` says cuda, on which the backends for GPUs run."""

if INTERPRETED:
    from tests.backends.triton import interpreter

    interpreter.install()


UNCUT_LOGITS, plan.UNCUT_LOGITS = plan.UNCUT_LOGITS, 0
"""Calls of the suite are small, and cut all the same: the loops are what it is about. Tests of
calls that are not cut set it back."""

IMITATES_A_PROCESSOR = library.INSTRUCTION_SET_VARIABLE in os.environ
"""Whether test_instruction_sets.py has begun this run."""

TESTS = Path(__file__).parent
INSTRUCTION_SETS: list[str] = []
"""Of the C++ kernels, those that this processor has; the best one, which comes first, is in use."""
if library.is_available():
    INSTRUCTION_SETS += library.INSTRUCTION_SETS[
        library.INSTRUCTION_SETS.index(library.instruction_set()) :
    ]


def _variants() -> list[Any]:
    """The backends that run on a CPU; the C++ one once for each instruction set that is here.

    The CUDA kernels run as the PTX that nvcc makes of them, on an executor that checks each access.
    """
    if DEVICE == "cuda":
        return ["triton"] if torch.version.hip else ["triton", "cuda"]
    if INTERPRETED or EXECUTED_FOR:
        return [f"triton-{share}" for share in SHARES]
    names: list[Any] = ["eager"]
    names += [f"cpu-{name}" for name in INSTRUCTION_SETS] or ["cpu"]
    without_nvcc = pytest.mark.skipif(devices.NVCC is None, reason=devices.WITHOUT_NVCC)
    names += (pytest.param(f"cuda-{share}", marks=without_nvcc) for share in devices.SHARES)
    return names


SPLIT_ROWS_AND_OLDER_PROCESSORS = ("cuda-split rows", "cpu-")
ABOVE_THE_KERNELS = {
    "calls/test_calls.py": SPLIT_ROWS_AND_OLDER_PROCESSORS,
    "fused_linear/test_chunking.py": ("cuda-split rows",),
    "test_systems.py": SPLIT_ROWS_AND_OLDER_PROCESSORS,
    "functional/test_kl.py": SPLIT_ROWS_AND_OLDER_PROCESSORS,
    "ops/test_divergence.py": ("cuda-", "cpu-"),
    "functional/test_kl_extremes.py": SPLIT_ROWS_AND_OLDER_PROCESSORS,
    "fused_linear/test_divergence.py": ("cuda-", "cpu-"),
    "fused_linear/test_low_rank.py": ("cuda-", "cpu-"),
    "functional/test_kl_methods.py": SPLIT_ROWS_AND_OLDER_PROCESSORS,
    "fused_linear/test_options.py": SPLIT_ROWS_AND_OLDER_PROCESSORS,
    "functional/test_methods.py": SPLIT_ROWS_AND_OLDER_PROCESSORS,
    "functional/test_token_statistics.py": SPLIT_ROWS_AND_OLDER_PROCESSORS,
}
"""Tests of what lies above the kernels, and how variants of a backend begin that are nothing to
them, but for the best instruction set: the kernels have every variant in backends, and in
functional/test_accuracy.py, test_tensors.py and test_runner_up.py."""

LONGEST = (
    *("test_instruction_sets.py", "test_compilers.py", "test_seeded_bugs.py"),
    *("test_gpu_session.py", "test_sanitizers.py"),
)
"""Files with tests that take a minute; they begin at once, so that no worker waits in the end."""


def _is_spared(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    parameters = callspec.params if callspec else {}
    if parameters.get("dtype") == CAST_BFLOAT16 and "linear" not in item.nodeid:
        return True
    # Kernels for GPUs, which are executed, round alike on every processor.
    if IMITATES_A_PROCESSOR and "cuda" in item.name:
        return True
    variant, best = str(parameters.get("backend")), f"cpu-{(*INSTRUCTION_SETS, '')[0]}"
    spared = ABOVE_THE_KERNELS.get(item.path.relative_to(TESTS).as_posix(), ())
    return variant != best and variant.startswith(spared)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spare tests what they cannot tell apart, and mark what a run may leave out."""
    items[:] = [item for item in items if not _is_spared(item)]
    mark_selection(items)
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """See `tests.support.frozen`, for which all modules of tests are imported now."""
    importlib.import_module("tests.support.frozen")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device(DEVICE) if DEVICE != "cpu" else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _bfloat16_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan for bfloat16 on every machine; `CAST_BFLOAT16` has the other one."""
    monkeypatch.setattr(gemm, "multiplies_bfloat16", lambda: True)


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    library.select_instruction_set(name)
    yield
    library.select_instruction_set(os.environ.get(library.INSTRUCTION_SET_VARIABLE, ""))


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the C++ kernels in turn."""
    with _instruction_set(request.param):
        yield request.param


@pytest.fixture
def instruction_sets() -> Iterator[list[str]]:
    """All of them, for a test that selects one after the other."""
    with _instruction_set(""):
        yield INSTRUCTION_SETS


@contextmanager
def _triton(share: str) -> Iterator[None]:
    with small_problems(share), ExitStack() as stack:
        if EXECUTED_FOR:
            from ptxsim.triton_device import triton_device

            stack.enter_context(triton_device(int(EXECUTED_FOR)))
        yield


def _variant(name: str, variant: str) -> AbstractContextManager[Any]:
    if name == "cuda":
        return devices.small_problems(variant)
    return _triton(variant) if name == "triton" else _instruction_set(variant)


@pytest.fixture(params=_variants())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn. One that cannot run here fails its tests: a skip would hide it."""
    name, _, variant = str(request.param).partition("-")
    with _variant(name, variant) if variant else nullcontext():
        reason = available_backends()[name]
        assert reason is None, f"backend {name!r} is not available here: {reason}"
        yield name


CAST_BFLOAT16 = "cast torch.bfloat16"
"""bfloat16 on a CPU that does not multiply it: a plan of its own for fused linear calls."""


@pytest.fixture(params=[torch.float32, torch.bfloat16, CAST_BFLOAT16, torch.float16], ids=str)
def dtype(
    request: pytest.FixtureRequest, _bfloat16_gemms: None, monkeypatch: pytest.MonkeyPatch
) -> torch.dtype:
    """The dtypes that every backend takes."""
    if request.param == CAST_BFLOAT16:
        monkeypatch.setattr(gemm, "multiplies_bfloat16", lambda: False)
        return torch.bfloat16
    chosen: torch.dtype = request.param
    return chosen
