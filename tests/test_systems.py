"""Imports, torch.compile, DataParallel hooks, available and missing backends (CASES 30 to 34)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch.library import opcheck

from tests.support.problems import assert_equal_steps
from unilogit_kernels import (
    LowRank,
    available_backends,
    linear_objective_loss,
    linear_unilogit_loss,
    objective_loss,
    objectives,
    unilogit_loss,
)
from unilogit_kernels.backends import registry
from unilogit_kernels.testing import force_backend


def _python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light() -> None:
    """No triton, no transformers, no compiled library, no command line."""
    loaded = json.loads(
        _python(
            """
            import json, sys, torch
            before = set(sys.modules)
            import unilogit_kernels
            print(json.dumps(sorted(set(sys.modules) - before)))
            """
        )
    )
    roots = {name.split(".")[0] for name in loaded}
    assert not roots & {"triton", "transformers", "typer", "rich", "cuda", "hypothesis"}
    assert "unilogit_kernels.backends.cpu" not in loaded
    assert "unilogit_kernels.testing" not in loaded


@pytest.fixture
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("entry", ["logits", "linear", "low rank"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph_dynamic(backend: str, entry: str, reduction: str) -> None:
    """Same value and gradients as eager execution, no recompilation for another n."""
    function = unilogit_loss if entry == "logits" else linear_unilogit_loss
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(*inputs: Tensor) -> Tensor:
        more: dict[str, Any] = {"reduction": reduction, "backend": backend}
        if entry == "low rank":
            hidden, a, b, labels = inputs
            adapter = LowRank(a, b, scale=0.5)
            return linear_unilogit_loss(hidden, weight, labels, adapter=adapter, **more).sum()
        return function(*inputs, **more).sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    weight = torch.randn(90, 8, requires_grad=True)
    low = torch.randn(2, 8, requires_grad=True), torch.randn(90, 2, requires_grad=True)
    graphs = []
    for n in (5, 9, 33):
        labels = torch.randint(0, 90, (n,))
        labels[1] = -100
        if entry == "logits":
            inputs: tuple[Tensor, ...] = (torch.randn(n, 90, requires_grad=True),)
        else:
            others = low if entry == "low rank" else (weight,)
            inputs = (torch.randn(n, 8, requires_grad=True), *others)
        values = [f(*inputs, labels) for f in (compiled, loss)]
        assert_equal_steps(values, inputs)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("entry", ["logits", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_sequences_of_any_size(entry: str, reduction: str) -> None:
    """One graph for any number and length of sequences but one, as for tokens."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight = torch.randn(40, 8, requires_grad=True)

    def loss(x: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        objective = objectives.DPO(reference=reference)
        if entry == "logits":
            return objective_loss(x, labels, objective, reduction=reduction).sum()
        return linear_objective_loss(x, weight, labels, objective, reduction=reduction).sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for sequences, length in ((4, 5), (6, 6), (8, 9), (4, 3)):
        labels = torch.randint(0, 40, (sequences, length))
        labels[0, 1] = -100
        width = 40 if entry == "logits" else 8
        x = torch.randn(sequences, length, width, requires_grad=True)
        trained = (x,) if entry == "logits" else (x, weight)
        reference = torch.randn(sequences)
        assert_equal_steps([f(x, labels, reference) for f in (compiled, loss)], trained)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


@pytest.mark.usefixtures("_compiler")
def test_compile_with_a_function_of_the_log_odds(backend: str) -> None:
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        focal = lambda d: torch.sigmoid(-d) ** 2 * nn.functional.softplus(-d)  # noqa: E731
        return objective_loss(x, labels, focal, backend=backend)

    x, labels = torch.randn(6, 40, requires_grad=True), torch.arange(6)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, labels), loss(x, labels))


@pytest.mark.parametrize(
    "name",
    [
        "log_odds",
        "linear_log_odds",
        "runner-up",
        "linear runner-up",
        "objective",
        "linear_objective",
        "objective with tensors",
        "linear_objective with tensors",
    ],
)
def test_operators_pass_torchs_own_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch."""
    # Memory for logits to keep is not all written, and two runs would differ there.
    monkeypatch.setattr("unilogit_kernels.fused_linear.compaction.saved_capacity", lambda *_: 0)
    logits, hidden, weight = torch.randn(4, 30), torch.randn(4, 6), torch.randn(30, 6)
    head = (hidden, weight, None, torch.randn(4, 2), torch.randn(30, 2))
    for x in (logits, *head):
        if x is not None:
            x.requires_grad_()
    labels = torch.arange(4)
    rows = (labels, -100, 1.0, 0.0, 30, 0, 30, "", None, False, "eager")
    with_runner_up = (*rows[:9], True, "eager")
    weighted: tuple[object, ...] = (torch.ones(4), torch.tensor(0.25), "unilogit", [], [])
    with_tensors = (torch.ones(4), torch.tensor(0.25), "tnpo", [0.1, 1.0], [torch.randn(4)])
    options = (0, None, 0.0, True)
    active = labels >= 0
    arguments: dict[str, tuple[str, tuple[object, ...]]] = {
        "log_odds": ("log_odds", (logits, *rows)),
        "linear_log_odds": (
            "linear_log_odds",
            (*head, active, *rows, *options, True),
        ),
        "runner-up": ("log_odds", (logits, *with_runner_up)),
        "linear runner-up": (
            "linear_log_odds",
            (*head, active, *with_runner_up, *options, True),
        ),
        "objective": ("objective_loss", (logits, *rows, *weighted, True)),
        "linear_objective": (
            "linear_objective_loss",
            (*head, *rows, *weighted, *options, True, True, False, True, True),
        ),
        "objective with tensors": ("objective_loss", (logits, *rows, *with_tensors, True)),
        "linear_objective with tensors": (
            "linear_objective_loss",
            (*head, *rows, *with_tensors, *options, True, True, False, True, True),
        ),
    }
    operator, args = arguments[name]
    opcheck(getattr(torch.ops.unilogit_kernels, operator), args)


def test_distributed_data_parallel(backend: str, tmp_path: object) -> None:
    """Gradients arrive in DDP's buckets: equal to those without it."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 90, bias=False)

            def forward(self, x: Tensor, labels: Tensor) -> Tensor:
                return linear_unilogit_loss(
                    self.body(x), self.lm_head.weight, labels, backend=backend
                )

        model = Model()
        x, labels = torch.randn(5, 8), torch.arange(5)
        expected = torch.autograd.grad(model(x, labels), list(model.parameters()))
        nn.parallel.DistributedDataParallel(model)(x, labels).backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradient)
    finally:
        dist.destroy_process_group()


class TestRegistry:
    def test_eager_is_always_there(self) -> None:
        assert available_backends()["eager"] is None

    def test_missing_backend_raises_with_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "unavailable_reason", lambda name: "no such library")
        with pytest.raises(RuntimeError, match="'cpu' is not available: no such library"):
            unilogit_loss(torch.randn(2, 5), torch.tensor([0, 1]), backend="cpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the backend is there")
    def test_triton_without_a_gpu_raises_the_reason(self) -> None:
        with pytest.raises(RuntimeError, match=r"'triton' is not available: .* no NVIDIA or AMD"):
            unilogit_loss(torch.randn(2, 5), torch.tensor([0, 1]), backend="triton")

    def test_gpus_run_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "unavailable_reason", lambda name: None)
        assert registry.choose(None, "cuda", torch.bfloat16) == "triton"
        assert registry.choose(None, "cuda", torch.float64) == "eager"
        with pytest.raises(ValueError, match="'triton' runs on cuda tensors, got cpu"):
            registry.choose("triton", "cpu", torch.float32)

    def test_fallback_is_never_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry._warn_once.cache_clear()
        monkeypatch.setattr(
            registry, "unavailable_reason", lambda name: "broken" if name == "cpu" else None
        )
        logits, labels = torch.randn(2, 5), torch.tensor([0, 1])
        with pytest.warns(UserWarning, match="eager backend, since .*'cpu'.* broken") as warned:
            loss = unilogit_loss(logits, labels)
        assert warned[0].filename == __file__
        assert torch.equal(loss, unilogit_loss(logits, labels, backend="eager"))
        registry._warn_once.cache_clear()

    def test_float64_is_not_for_the_fused_backends(self) -> None:
        logits, labels = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 1])
        with pytest.raises(TypeError, match=r"backend 'cpu' takes .* got torch\.float64"):
            unilogit_loss(logits, labels, backend="cpu")

    def test_forced_backend_wins(self, backend: str) -> None:
        logits, labels = torch.randn(2, 5, requires_grad=True), torch.tensor([0, 1])
        expected = unilogit_loss(logits, labels, backend=backend)
        with force_backend(backend):
            assert torch.equal(unilogit_loss(logits, labels, backend="eager"), expected)


def test_tensors_without_data_have_the_right_shapes() -> None:
    """Fake kernels: what torch.compile and memory planners see."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden = torch.empty(3, 4, 8, dtype=torch.float16, requires_grad=True)
        weight = torch.empty(100, 8, dtype=torch.float16, requires_grad=True)
        inner, up = torch.empty(12, 2), torch.empty(100, 2)
        labels = torch.empty(3, 4, dtype=torch.int64)
        rows = (labels.reshape(-1), -100, 1.0, 0.0, 100, 0, 100, "", None, False, "eager")
        weighted: tuple[object, ...] = (torch.empty(12), torch.empty(()), "unilogit", [], [])
        options = (0, None, 0.0, True)
        loss, losses, *gradients = torch.ops.unilogit_kernels.linear_objective_loss(
            *(hidden.reshape(-1, 8), weight, None, inner, up),
            *(*rows, *weighted, *options, True, True, False, True, True),
        )
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        assert (losses.shape, losses.dtype) == ((12,), torch.float32)
        assert [g.shape for g in gradients] == [(12, 8), (100, 8), (0,), (12, 2), (100, 2)]
