"""Streams, graphs, devices, memory and cuBLAS: what neither interpreter nor executor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from unilogit_kernels import linear_unilogit_loss, unilogit_loss
from unilogit_kernels.backends import registry
from unilogit_kernels.testing import assert_within_budget

N, V = 512, 50_257


def _inputs(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(N, V, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), device=device)
    labels[::7] = -100
    return logits, labels


def _loss_and_gradient(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    loss = unilogit_loss(logits, labels, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_triton_is_the_default() -> None:
    assert registry.choose(None, "cuda", torch.bfloat16) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_of_large_logits(gpu_backend: str, dtype: torch.dtype) -> None:
    logits, labels = _inputs(dtype)
    loss, gradient = _loss_and_gradient(logits, labels, gpu_backend)
    plain_loss, plain = _loss_and_gradient(logits, labels, "eager")
    exact_loss, exact = _loss_and_gradient(
        logits.detach().double().requires_grad_(), labels, "eager"
    )
    assert_within_budget(loss, exact_loss, plain_loss, "loss", smallest_scale=1.0)
    assert_within_budget(gradient, exact, plain, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_linear_with_float32_logits_out_of_the_gemm(
    gpu_backend: str, dtype: torch.dtype
) -> None:
    """`torch.mm(..., out_dtype=torch.float32)`: cuBLAS writes what the kernels read."""
    operands = [torch.randn(N, 256, device="cuda"), torch.randn(V, 256, device="cuda") / 16]
    labels = torch.randint(0, V, (N,), device="cuda")

    def run(to: torch.dtype, backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = [x.to(dtype).to(to).requires_grad_() for x in operands]
        loss = linear_unilogit_loss(inputs[0], inputs[1], labels, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, inputs)

    loss, gradients = run(dtype, gpu_backend)
    exact_loss, exact = run(torch.float64, "eager")
    plain_loss, plain = run(dtype, "eager")
    assert_within_budget(loss, exact_loss, plain_loss, "loss", smallest_scale=1.0)
    for i, name in enumerate(("hidden", "weight")):
        assert_within_budget(gradients[i], exact[i], plain[i], f"gradient of {name}")


def test_no_host_synchronisation(gpu_backend: str) -> None:
    logits, labels = _inputs()
    _loss_and_gradient(logits, labels, gpu_backend)  # compiles
    with _no_synchronisation():
        _loss_and_gradient(logits, labels, gpu_backend)


def test_another_stream(gpu_backend: str) -> None:
    logits, labels = _inputs()
    expected = _loss_and_gradient(logits, labels, gpu_backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        copy = (logits.detach() + 0).requires_grad_()  # after the sleep, on this stream only
        found = _loss_and_gradient(copy, labels, gpu_backend)
    torch.cuda.current_stream().wait_stream(stream)
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours, other)


def test_cuda_graph(gpu_backend: str) -> None:
    """Full logits have no rows to compact, so that the whole step can be captured."""
    logits, labels = _inputs()
    for _ in range(2):
        _loss_and_gradient(logits, labels, gpu_backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _loss_and_gradient(logits, labels, gpu_backend)
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
        labels.copy_(torch.randint_like(labels, V))
    graph.replay()
    for ours, other in zip(captured, _loss_and_gradient(logits, labels, gpu_backend), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_other_device(gpu_backend: str) -> None:
    logits, labels = _inputs(device="cuda:1")
    torch.cuda.set_device(0)
    loss, gradient = _loss_and_gradient(logits, labels, gpu_backend)
    assert torch.cuda.current_device() == 0
    assert loss.device == gradient.device == logits.device
    at_home = logits.detach().to("cuda:0").requires_grad_()
    expected = _loss_and_gradient(at_home, labels.to("cuda:0"), gpu_backend)
    assert torch.equal(gradient.to("cuda:0"), expected[1])


def test_an_upstream_of_one_allocates_nothing(gpu_backend: str) -> None:
    """The saved gradient itself is handed on: a scaled copy would double the peak."""
    logits, labels = _inputs()
    loss = unilogit_loss(logits, labels, backend=gpu_backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes // 2


def test_fused_linear_holds_no_logits(gpu_backend: str) -> None:
    n, v, h = 8192, 131_072, 256
    hidden = torch.randn(n, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, v, (n,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_unilogit_loss(hidden, weight, labels, backend=gpu_backend).backward()
    results = hidden.nbytes + weight.nbytes
    assert torch.cuda.max_memory_allocated() - before < results + (1 << 30) < n * v * 2


def test_two_runs_are_bitwise_equal(gpu_backend: str) -> None:
    logits, labels = _inputs()
    first, second = (_loss_and_gradient(logits, labels, gpu_backend) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("n", [1, 5, 200, 5000])
def test_any_number_of_rows(gpu_backend: str, n: int) -> None:
    """Rows that are split, swept, and in many waves."""
    logits = torch.randn(n, 32_003, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 32_003, (n,), device="cuda")
    _, gradient = _loss_and_gradient(logits, labels, gpu_backend)
    _, plain = _loss_and_gradient(logits, labels, "eager")
    _, exact = _loss_and_gradient(logits.detach().double().requires_grad_(), labels, "eager")
    assert_within_budget(gradient, exact, plain, "gradient")


def test_compiled(gpu_backend: str) -> None:
    logits, labels = _inputs()

    def loss(x: Tensor) -> Tensor:
        return unilogit_loss(x, labels, backend=gpu_backend)

    compiled = torch.compile(loss, fullgraph=True)
    expected, found = loss(logits), compiled(logits)
    assert torch.equal(expected, found)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (expected, found)]
    assert torch.equal(*gradients)
