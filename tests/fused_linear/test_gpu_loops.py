"""A GPU's plan, its chunk loops and its compiled kernels, executed here in small.

Triton's kernels, and those in CUDA C++, run as the PTX that their compilers make of them, with
every check of the executor; the launches are laid out as on an H100. Results are judged against
float64, and what was launched against what `explain_plan` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from ptxsim.triton_device import triton_device
from tests.backends.cuda import devices
from tests.support import divergence_pairs, problems
from tests.support.gpu_loops import planned_for_a_gpu
from unilogit_kernels import LinearOptions, explain_plan
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.cuda.driver import launching_through
from unilogit_kernels.backends.cuda.launch import CudaKernels
from unilogit_kernels.backends.cuda.sources import Kernel
from unilogit_kernels.backends.triton.launch import TritonKernels
from unilogit_kernels.backends.triton.prepared import TritonLaunches
from unilogit_kernels.calls import validation
from unilogit_kernels.functional.explain import ACCELERATORS, COUNTED_ON, PlanReport
from unilogit_kernels.fused_linear import cost
from unilogit_kernels.testing import assert_sum_within_budget

N, H, V = 40, 16, 1100
NARROW, WIDE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call, and the plan that its budget leads to.

    Attributes:
        budget: Bytes for buffers.
        plan: What is said of it: some of its attributes.
        dtype: Of hidden states and lm_head.
        reduction: As of the call; `"none"` projects logits again in the backward.
        pair: Whether there is a reference model.
        rank: Of a low-rank term; 0 for none.
    """

    budget: int
    plan: dict[str, Any]
    dtype: torch.dtype = NARROW
    reduction: str = "sum"
    pair: bool = False
    rank: int = 0

    @property
    def options(self) -> LinearOptions:
        """How it runs: without a look at which rows count, as in a CUDA graph."""
        return LinearOptions(memory_budget=self.budget, compact=False)

    def report(self) -> PlanReport:
        """What `explain_plan` says of it."""
        return explain_plan(
            N,
            H,
            V,
            dtype=self.dtype,
            reduction=self.reduction,
            options=self.options,
            ref_h=H if self.pair else None,
            rank=self.rank,
        )

    def problem(self) -> problems.Problem | divergence_pairs.Pair:
        """Operands, some of whose labels are ignored."""
        if self.pair:
            return divergence_pairs.linear_pair(
                N, H, V, self.dtype, ref_h=H, bias=False, reduction="sum"
            )
        return problems.linear_problem(N, H, V, self.dtype, rank=self.rank, reduction="sum")


CASES = {
    "rows wait inside and beside the gradient": Case(
        1 << 20, {"saves_rows": True, "saved_tokens": 40, "saved_beside": 24, "row_tokens": 16}
    ),
    "sums over token chunks": Case(1 << 18, {"order": "token_chunks", "tokens": 20}),
    "logits wait in the gradient": Case(
        1 << 16, {"order": "vocabulary_chunks", "saved_tokens": 8, "columns": 512}
    ),
    "logits are projected again": Case(1 << 16, {"columns": 512}, reduction="none"),
    "float32": Case(1 << 18, {"order": "token_chunks", "tokens": 20}, WIDE),
    "two models": Case(1 << 18, {}, pair=True),
    "a low-rank term, rows that wait": Case(1 << 20, {"saves_rows": True}, rank=4),
    "a low-rank term, token chunks": Case(1 << 18, {"order": "token_chunks"}, rank=4),
    "a low-rank term, projected again": Case(1 << 16, {}, reduction="none", rank=4),
}


@contextmanager
def _executed(backend: str, arch: int) -> Iterator[list[Any]]:
    """Launches on CPU tensors are laid out for an H100 and executed; yields them."""
    gpu = ACCELERATORS[COUNTED_ON].gpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._DEVICES, backend, "cpu")
        patch.setattr(registry, "unavailable_reason", lambda name: None)
        if backend == "cuda":
            device = devices.PtxLauncher(
                arch=arch, sms=gpu.multiprocessors, l2_bytes=gpu.cache_bytes
            )
            with launching_through(device):
                yield device.launched
            return
        launch = TritonLaunches._launch

        def alone(*args: Any) -> None:
            with _disable_current_modes():  # the executor's memory is none of the loops' business
                launch(*args)

        patch.setattr(TritonLaunches, "_launch", alone)
        with triton_device(arch) as launches:
            yield launches


def check(case: Case, backend: str, arch: int) -> None:
    """Loss and gradients of one call against float64, and its launches against the plan's."""
    problem, report = case.problem(), case.report()
    assert {name: getattr(report.plan, name) for name in case.plan} == case.plan
    with _executed(backend, arch) as rows, planned_for_a_gpu() as loops:
        loss, gradients = problem.ours(backend, options=case.options, reduction=case.reduction)
        launches = loops.operators + [_name(launch) for launch in rows]
    exact_terms, exact = problem.plain(torch.float64)
    plain_terms, plain = problem.plain(case.dtype)
    assert_sum_within_budget(loss.sum(), exact_terms, plain_terms, "loss")
    for i, what in enumerate(("hidden", "weight", "a", "b")[: len(gradients)]):
        divergence_pairs.check_gradient(gradients[i], exact[i], plain[i], f"gradient of {what}")
    # What scales a finished gradient in the backward is no launch of the loops.
    launches = [name for name in launches if name not in SCALING]
    assert len(launches) == report.launches


def _name(launch: Any) -> str:
    """The kernel's, of a launch by either executor."""
    return str(launch.macro if isinstance(launch, Kernel) else launch.name)


SCALING = ("SCALE", "scale_kernel")

WITHOUT_NVCC = pytest.mark.skipif(not devices.NVCC, reason=devices.WITHOUT_NVCC)
LIGHT = ("rows wait inside and beside the gradient", "two models")
"""What a plain run has of Triton, which takes long to compile, and other architectures have."""


def _is_light(backend: str, name: str) -> bool:
    return backend == "cuda" or name in LIGHT


@pytest.fixture(autouse=True)
def _small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MIN_MEMORY_BUDGET", 1)


@pytest.fixture
def gpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either backend for GPUs, whose launches `explain_plan` then counts."""
    kernels = {"triton": TritonKernels, "cuda": CudaKernels}[request.param]
    monkeypatch.setattr(cost, "imagine", kernels)
    monkeypatch.setattr(cost, "_steps", cost._steps.__wrapped__)
    return str(request.param)


@pytest.mark.parametrize(
    ("gpu_backend", "name"),
    [
        pytest.param(
            backend,
            name,
            marks=[
                *([WITHOUT_NVCC] if backend == "cuda" else []),
                *([] if _is_light(backend, name) else [pytest.mark.prove]),
            ],
        )
        for backend in ("triton", "cuda")
        for name in CASES
    ],
    indirect=["gpu_backend"],
)
def test_loops_on_compiled_kernels(gpu_backend: str, name: str) -> None:
    check(CASES[name], gpu_backend, 90)


@pytest.mark.prove
@pytest.mark.parametrize("arch", [80, 100, 120])
@pytest.mark.parametrize(
    "gpu_backend", ["triton", pytest.param("cuda", marks=WITHOUT_NVCC)], indirect=True
)
def test_on_every_architecture(gpu_backend: str, arch: int) -> None:
    for name in LIGHT:
        check(CASES[name], gpu_backend, arch)
