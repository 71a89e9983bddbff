"""CUDA C++ through nvcc: correct kernels run, and every seeded bug is caught."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptxsim import InstructionClass, KernelFaultError, PtxModule, Schedule, UnsupportedPtxError
from ptxsim.cuda_source import compile_cuda, launch_cuda

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="CUDA sources are compiled by nvcc, which is not on PATH"
)

SOURCE = Path(__file__).with_name("cuda_kernels.cu")
ROWS, V = 3, 1003
SCHEDULES = (Schedule(), Schedule("reversed"), Schedule("random", 1), Schedule("random", 2))


@pytest.fixture(scope="module", params=[80, 90])
def module(request: pytest.FixtureRequest) -> PtxModule:
    return compile_cuda(SOURCE, request.param)


def cross_entropy(module: PtxModule, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits before, labels, losses, and the gradient that has replaced the logits."""
    storage = (4 * torch.randn(ROWS * V + 512)).bfloat16()
    logits = storage[: ROWS * V].view(ROWS, V)
    before = logits.double()
    labels, losses = torch.tensor([5, 384, 763]), torch.zeros(ROWS)
    launch_cuda(
        module,
        "cross_entropy",
        (ROWS, 1, 1),
        (256, 1, 1),
        [logits, labels, losses, V, V],
        schedule=schedule,
        read_only=(labels,),
    )
    return before, labels, losses, logits


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_cross_entropy(module: PtxModule, schedule: Schedule) -> None:
    logits, labels, losses, gradient = cross_entropy(module, schedule)
    logits.requires_grad_()
    exact = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    exact.sum().backward()
    assert logits.grad is not None
    assert (losses - exact).abs().max() < 1e-5
    assert (gradient - logits.grad).abs().max() < 2**-8


@pytest.mark.parametrize(
    ("bug", "match"),
    [
        (1, "data race, .* in shared memory"),
        (2, "data race, .* in shared memory"),
        (3, "data race, write after unordered read.* on 'cross_entropy_param_0'"),
        (4, "data race|out-of-bounds"),
        (5, "divergent barrier"),
    ],
)
def test_bugs_are_caught(bug: int, match: str) -> None:
    module = compile_cuda(SOURCE, options=[f"-DBUG={bug}"])
    with pytest.raises(KernelFaultError, match=match):
        cross_entropy(module, Schedule())


def test_two_dimensions_and_dynamic_shared_memory(module: PtxModule) -> None:
    a, b, c = torch.randn(50, 37), torch.randn(37, 29), torch.zeros(50, 29)
    grid, block = (2, 4, 1), (16, 16, 1)
    launch = launch_cuda(
        module, "matmul", grid, block, [a, b, c, 50, 29, 37], shared_bytes=2048, read_only=(a, b)
    )
    assert (c - a.double() @ b.double()).abs().max() < 1e-5
    # Each thread of a full tile reads one element of either matrix for each of three steps.
    assert launch.counters.global_bytes_stored == 4 * 50 * 29
    assert launch.counters.global_bytes_loaded == 4 * (2 * 50 * 37 + 4 * 37 * 29)
    assert launch.counters.instructions[InstructionClass.BARRIER] == 8 * 256 * 3 * 2
    with pytest.raises(KernelFaultError, match="outside the allocation"):
        launch_cuda(module, "matmul", grid, block, [a, b, c, 50, 29, 37], shared_bytes=1024)


def test_atomics(module: PtxModule) -> None:
    x = torch.arange(1000, dtype=torch.int32)
    bins = torch.zeros(65, dtype=torch.int32)
    launch_cuda(module, "histogram", (4, 1, 1), (256, 1, 1), [x, bins, 1000])
    assert bins[:64].tolist() == torch.bincount(x % 64).tolist()
    assert bins[64] == 1000


def test_local_memory_and_vectors(module: PtxModule) -> None:
    x, out = torch.arange(128.0), torch.zeros(128)
    launch = launch_cuda(module, "rotate", (1, 1, 1), (32, 1, 1), [x, out, -1])
    assert torch.equal(out.view(32, 4), x.view(32, 4).roll(1, 1))
    assert launch.counters.instructions[InstructionClass.GLOBAL_LOAD] == 32
    assert launch.counters.sectors_loaded == 512 // 32


def test_wrong_number_of_arguments(module: PtxModule) -> None:
    with pytest.raises(UnsupportedPtxError, match="takes 3 arguments, got 1"):
        launch_cuda(module, "rotate", (1, 1, 1), (32, 1, 1), [torch.zeros(4)])
