"""Rows that break naive code, labels that are nowhere, and what no kernel alone can show."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_session.cases import Case, Missing, Report, name_of
from benchmarks.gpu_session.judge import Judge
from benchmarks.gpu_session.rows import Problem
from benchmarks.gpu_session.target import SHARES, Target
from tests.support.layouts import place
from unilogit_kernels import linear_unilogit_loss, unilogit_loss
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import Tile
from unilogit_kernels.bench.problems import DTYPES
from unilogit_kernels.testing import hard_rows

Check = Callable[[Target, str, str], dict[str, Any]]
"""Of a target, a backend and a dtype."""


def cases(target: Target) -> list[Case]:
    """Each check on each backend, float32 first."""
    found = []
    for name, check in CHECKS.items():
        for dtype in ("float32", "bfloat16", "float16"):
            for backend, missing in target.backends().items():
                run = partial(_run, check, target, backend, missing, dtype)
                found.append(Case(name_of(backend, name, dtype=dtype), run))
    return found


def _run(
    check: Check, target: Target, backend: str, missing: str | None, dtype: str, report: Report
) -> dict[str, Any]:
    if missing is not None:
        raise Missing(missing)
    return check(target, backend, dtype)


def _hard_rows(target: Target, backend: str, dtype: str) -> dict[str, Any]:
    """-inf, +inf, NaN, certain and impossible labels: what follows from the definition."""
    judge = Judge()
    for share in SHARES[1:]:
        _, v = target.sizes(share)
        rows = hard_rows(v)
        if dtype != "float32":  # of which 1e8 is not exact in bfloat16, and infinite in float16
            rows = [row for row in rows if "offset" not in row.name]
        logits = torch.stack([row.logits for row in rows]).to(target.device, DTYPES[dtype])
        labels = torch.tensor([row.label for row in rows], device=target.device)
        weight = torch.ones(len(rows), device=target.device)
        out = torch.full_like(logits, 7.0)
        with target.launching(backend, share):
            kernels = registry.load(backend)
            values = kernels.log_odds_sweep(Tile(logits, labels), weight, "unilogit", v, out)
        expected = torch.tensor([row.loss for row in rows], dtype=torch.float64)
        values = values.cpu()
        undefined = expected.isnan()
        assert torch.equal(values.isnan(), undefined), "NaN in other rows"
        exact = expected[~undefined]
        judge.near(values[~undefined], exact, exact.float(), "losses", smallest_scale=1.0)
        for i, row in enumerate(rows):
            if row.zero_gradient:
                assert int(out[i].count_nonzero()) == 0, f"{row.name}: the gradient is not 0"
            if undefined[i]:
                assert bool(out[i].isnan().any()), f"{row.name}: NaN was laundered"
    return judge.found()


def _bad_labels(target: Target, backend: str, dtype: str) -> dict[str, Any]:
    """A label that is in no column reads nothing, and gives NaN for its row alone."""
    for share in SHARES[:2]:
        n, v = target.sizes(share)
        bad = [-1, -100, v, v + 1, 2**40]
        n = max(n, len(bad) + 1)
        problem = Problem.of(n, v, dtype, "random", target.device)
        problem.labels[: len(bad)] = torch.tensor(bad)
        problem.weight.fill_(1.0)
        view, _ = place(problem.logits, "odd")
        with target.launching(backend, share):
            tile = Tile(view, problem.labels)
            kernels = registry.load(backend)
            values = kernels.log_odds_sweep(tile, problem.weight, "unilogit", v, view)
        for found in (values, view):
            assert bool(found[: len(bad)].isnan().all()), "no NaN for a label that is nowhere"
            assert bool(found[len(bad) :].isfinite().all()), "NaN in other rows"
    return {}


def _ignored(target: Target, backend: str, dtype: str) -> dict[str, Any]:
    """With every label ignored: loss 0 and gradients 0, on both entries."""
    device = target.device
    labels = torch.full((8,), -100, device=device)
    hidden = torch.randn(8, 16, device=device).to(DTYPES[dtype]).requires_grad_()
    weight = torch.randn(301, 16, device=device).to(DTYPES[dtype]).requires_grad_()
    logits = torch.randn(8, 301, device=device).to(DTYPES[dtype]).requires_grad_()
    with target.launching(backend, "split rows"):
        losses = (
            unilogit_loss(logits, labels, backend=backend),
            linear_unilogit_loss(hidden, weight, labels, backend=backend),
        )
        gradients = torch.autograd.grad(losses[0] + losses[1], [logits, hidden, weight])
    assert all(float(x.detach()) == 0.0 for x in losses)
    assert all(int(x.count_nonzero()) == 0 for x in gradients)
    return {}


def _steps(target: Target, backend: str, dtype: str) -> tuple[Tensor, Tensor, Callable[[], Any]]:
    """A step on logits: the logits, the labels, and the function."""
    n, v = target.sizes("split rows")
    problem = Problem.of(n, v, dtype, "random", target.device)
    logits, labels = problem.logits.requires_grad_(), problem.labels

    def step() -> tuple[Tensor, Tensor]:
        loss = unilogit_loss(logits, labels, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    return logits, labels, step


def _bitwise(target: Target, backend: str, dtype: str) -> dict[str, Any]:
    """Two runs are equal to the last bit, on both entries."""
    _, _, step = _steps(target, backend, dtype)
    hidden, weight = (
        torch.randn(n, 64, device=target.device).to(DTYPES[dtype]).requires_grad_()
        for n in (48, 3001 if not target.rehearses else 301)
    )
    labels = torch.arange(48, device=target.device)

    def linear() -> tuple[Tensor, ...]:
        loss = linear_unilogit_loss(hidden, weight, labels, backend=backend)
        return (loss.detach(), *torch.autograd.grad(loss, [hidden, weight]))

    with target.launching(backend, "split rows"):
        for run in (step, linear):
            first, second = run(), run()
            for one, other in zip(first, second, strict=True):
                assert torch.equal(one, other), f"{run.__name__}: two runs differ"
    return {}


def _no_waiting(target: Target, backend: str, dtype: str) -> dict[str, Any]:
    """A step on logits never waits for the device."""
    _needs_gpu(target)
    _, _, step = _steps(target, backend, dtype)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def _graph(target: Target, backend: str, dtype: str) -> dict[str, Any]:
    """A step on logits is captured by a CUDA graph, and replayed on other logits."""
    _needs_gpu(target)
    logits, labels, step = _steps(target, backend, dtype)
    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
        labels.copy_(labels.flip(0))
    graph.replay()
    for ours, other in zip(captured, step(), strict=True):
        assert torch.equal(ours, other), "a replayed graph gives something else"
    return {}


def _needs_gpu(target: Target) -> None:
    if target.rehearses:
        raise Missing("needs a GPU")


CHECKS: dict[str, Check] = {
    "hard rows": _hard_rows,
    "bad labels": _bad_labels,
    "all ignored": _ignored,
    "bitwise equal": _bitwise,
    "no waiting": _no_waiting,
    "CUDA graph": _graph,
}
