"""Every provider computes the loss that it claims, by an oracle that knows the literal one."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.bench.shapes import LINEAR, LOGITS
from unilogit_kernels import reference
from unilogit_kernels.bench import peers
from unilogit_kernels.bench.oracle import Oracle
from unilogit_kernels.bench.problems import DTYPES, Problem, Shape
from unilogit_kernels.bench.provider import OURS, Provider
from unilogit_kernels.bench.providers import providers
from unilogit_kernels.testing import FLOAT32_ROUNDINGS, TYPICAL_FACTOR

SHAPES = [
    LOGITS,
    LINEAR,
    replace(LINEAR, frozen_head=True),
    replace(LINEAR, dtype="float32", softcap=30.0),
]
PLAIN = {"unilogit": "eager Unilogit", "cross_entropy": "F.cross_entropy"}


def assert_near(
    oracle: Oracle,
    problem: Problem,
    provider: Provider,
    loss: Tensor | None,
    gradients: list[Tensor] | None = None,
) -> None:
    """Within the error budget of plain torch's provider, by the oracle's measures."""
    assert loss is not None
    by_name = {p.name: p for p in providers(provider.entry)}
    job = by_name[PLAIN[provider.loss]].prepare(problem)
    plain_loss = job.forward()
    assert plain_loss is not None
    plain_gradients = job.backward(plain_loss)
    assert plain_gradients is not None
    roundings = torch.finfo(DTYPES[problem.shape.dtype]).eps
    roundings += FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps
    error, plain = (oracle.loss_error(provider.loss, x.item()) for x in (loss, plain_loss))
    # A loss is a sum of terms of order 1, however small it is.
    scale = max(1.0, 1 / oracle.losses[provider.loss])
    assert error <= TYPICAL_FACTOR * plain + scale * roundings, provider.name
    if gradients is not None:
        error, plain = (
            oracle.gradient_error(provider.loss, x) for x in (gradients, plain_gradients)
        )
        assert error <= TYPICAL_FACTOR * plain + roundings, provider.name


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.title)
def test_every_provider_computes_its_loss(shape: Shape) -> None:
    """Each one that runs here is as accurate as plain torch at the loss that it claims."""
    problem = Problem(shape)
    oracle = Oracle(problem)
    ran = set()
    for provider in providers(shape.entry):
        if provider.unavailable(shape, "cpu") is not None or provider.compiles:
            continue
        job = provider.prepare(problem)
        loss = job.forward()
        gradients = job.backward(loss)
        ran.add(provider.loss)
        if provider.loss == "floor":
            assert loss is None
            assert gradients is None
            continue
        assert loss is not None
        assert gradients is not None
        assert_near(oracle, problem, provider, loss, gradients)
    assert ran == {"unilogit", "cross_entropy", "floor"}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.title)
@pytest.mark.parametrize("block", [1 << 21, 701])
def test_oracle_is_the_literal_definition(
    shape: Shape, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unilogit_kernels.bench.oracle._BLOCK_ELEMENTS", block)
    problem = Problem(shape)
    oracle = Oracle(problem)
    operands = [x.detach().double().requires_grad_(x.requires_grad) for x in problem.operands]
    trained = [x for x in operands if x.requires_grad]
    logits = operands[0] if shape.h is None else operands[0] @ operands[1].t()
    unilogit = reference.unilogit_loss(logits, problem.labels, softcap=shape.softcap)
    capped = reference.transform_logits(logits, softcap=shape.softcap)
    cross_entropy = torch.nn.functional.cross_entropy(capped, problem.labels)
    for name, loss in (("unilogit", unilogit), ("cross_entropy", cross_entropy)):
        gradients = list(torch.autograd.grad(loss, trained, retain_graph=True))
        assert oracle.loss_error(name, loss.item()) < 1e-12
        assert oracle.gradient_error(name, gradients) < 1e-12
        gradients[-1][0] += 0.1 * gradients[-1].norm()
        assert oracle.gradient_error(name, gradients) > 0.05


def test_oracle_samples_rows_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unilogit_kernels.bench.oracle._WEIGHT_ELEMENTS", 2 * 16 * 100)
    problem = Problem(replace(LINEAR, dtype="float32"))
    oracle = Oracle(problem)
    rows = oracle.weight_rows
    assert set(problem.labels.tolist()) <= set(rows.tolist())
    assert len(rows) <= 100
    ours = providers("linear")[0]
    job = ours.prepare(problem)
    loss = job.forward()
    gradients = job.backward(loss)
    assert gradients is not None
    assert_near(oracle, problem, ours, loss, gradients)
    gradients[1][rows[3]] += 1
    assert oracle.gradient_error("unilogit", gradients) > 0.5


def test_those_that_cannot_run_say_why() -> None:
    capped = replace(LINEAR, softcap=30.0)
    found = {
        p.name: p.unavailable(capped, "cpu") for e in ("logits", "linear") for p in providers(e)
    }
    assert found["Liger fused linear"] == "its kernels need a GPU"
    assert found["cut_cross_entropy (cce), through nll"] == "its kernels need a GPU"
    assert found["quack chunked"] == "has no softcap"
    assert found["F.linear_cross_entropy, auto"] == "has no softcap"
    assert found[OURS["unilogit"]] is None
    assert peers._needs("no_such_package")(LINEAR, "cuda") == (
        "the package no_such_package is not installed"
    )


def test_a_newer_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    needs = peers._needs("torch", gpu=True, capability=(9, 0))
    assert needs(LINEAR, "cuda") == "needs compute capability 9.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert needs(LINEAR, "cuda") is None


def test_liger_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger overwrites its input; the problem must survive, and the first result be right."""

    def overwriting(logits: Tensor, labels: Tensor, *, reduction: str, softcap: None) -> Tensor:
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)
        logits.detach().zero_()
        return nll

    module = SimpleNamespace(liger_cross_entropy=overwriting)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    problem = Problem(LOGITS)
    before = problem.operands[0].detach().clone()
    provider = next(p for p in providers("logits") if p.name == "Liger, through nll")
    loss = provider.prepare(problem).forward()
    assert_near(Oracle(problem), problem, provider, loss)
    assert torch.equal(problem.operands[0], before)
