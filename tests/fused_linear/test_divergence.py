"""The chunk loops on two lm_heads: what they never hold, their cuts, and options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fused_linear.test_options import GemmCounter
from tests.support.divergence_pairs import DIVERGENCES, check, check_gradient, linear_pair
from tests.support.problems import casts_operands, saved_tokens
from unilogit_kernels import Shift, linear_kl_loss
from unilogit_kernels.backends.contract import LogitTransform, TilePair
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.fused_linear.budget import HeadShape, LinearShape
from unilogit_kernels.fused_linear.gemm import GemmDtypes, LinearHead, Needs
from unilogit_kernels.fused_linear.loops import linear_loss
from unilogit_kernels.fused_linear.options import MEMORY_BUDGET, LinearOptions
from unilogit_kernels.fused_linear.plan import Plan, plan_linear
from unilogit_kernels.fused_linear.tiles import Gradients
from unilogit_kernels.maths.divergence import Divergence
from unilogit_kernels.rows.divergence import PairLoss, PairProblem
from unilogit_kernels.testing import (
    AllocationGuard,
    assert_sum_within_budget,
    assert_within_budget,
)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_holds_either_models_logits(
    backend: str, dtype: torch.dtype, divergence: dict[str, Any], reduction: str
) -> None:
    n, h, v = 64, 16, 3001
    pair = linear_pair(n, h, v, dtype, **divergence)
    for frozen in (False, True):
        inputs = tuple(x.detach().requires_grad_() for x in pair.student)
        inputs[1].requires_grad_(not frozen)
        full = replace(pair, labels=torch.randint(0, v, (n,)))
        with AllocationGuard(forbidden_elements=n * v) as guard:
            full.loss(inputs, backend, reduction=reduction).sum().backward()
        assert guard.largest > 0


@pytest.mark.parametrize("n_h", [(11, 24), (24, 11)])
def test_any_cut_is_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    n_h: tuple[int, int],
) -> None:
    n, h = n_h
    v = 130
    pair = linear_pair(n, h, v, dtype, rewrite=Shift(2.0), softcap=4.0)
    assert pair.labels is not None
    active, most_kept = int((pair.labels != -100).sum()), saved_tokens(dtype, h)
    plans = [
        Plan("vocabulary_chunks", tokens, columns, saved_tokens=kept)
        for tokens, columns in ((active, v), (active, 31), (7, 100), (3, 7))
        for kept in (0, min(active, most_kept // 2))
    ]
    # Finished rows of all that fit, and of some; tiles narrower than chunks.
    plans += [
        Plan("vocabulary_chunks", tokens, 50, 20, kept, 0, True, 5, 30)
        for tokens in (active, 7)
        for kept in (min(active, most_kept), min(4, most_kept))
    ]
    if not casts_operands(dtype):
        plans += [Plan("token_chunks", tokens, v, 40) for tokens in (active, 7, 1)]
    for plan in plans:
        monkeypatch.setattr(
            "unilogit_kernels.fused_linear.compaction.plan_linear", lambda *_, plan=plan, **__: plan
        )
        check(pair, backend)
    if casts_operands(dtype):
        return
    _, exact = pair.plain(torch.float64)
    _, plain = pair.plain(dtype)
    hidden, weight, bias = pair.student
    for tokens in (active, 3, 1):
        plan = Plan("token_chunks", tokens, v)
        monkeypatch.setattr(
            "unilogit_kernels.fused_linear.compaction.plan_linear", lambda *_, plan=plan, **__: plan
        )
        for reduction in ("mean", "none"):
            inputs = hidden.detach().requires_grad_(), weight, bias.detach().requires_grad_()
            loss = pair.loss(inputs, backend, reduction=reduction)
            if reduction == "none":
                loss = loss.sum() / active
            gradients = torch.autograd.grad(loss, (inputs[0], inputs[2]))
            for i, ours in zip((0, 2), gradients, strict=True):
                check_gradient(ours, exact[i], plain[i])


def test_memory_is_flat_in_the_vocabulary(backend: str) -> None:
    """Beside results and their float32 sums, a call takes its budget of buffers and no more."""
    peaks = []
    for v in (20_000, 80_000):
        n, h = 256, 8
        pair = linear_pair(n, h, v, torch.bfloat16, bias=False)
        hidden, weight = pair.student
        with AllocationGuard() as guard:
            pair.loss((hidden.requires_grad_(), weight), backend).backward()
        peaks.append(guard.peak_bytes)
    assert max(peaks) <= MEMORY_BUDGET["cpu"] * 1.5
    assert max(peaks) < 2 * 256 * 80_000 * 2


# ---- options -------------------------------------------------------------------------------------

V, H = 3001, 40


@pytest.mark.parametrize("memory_budget", [1 << 20, 2 << 20, 1 << 30])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("logits", ["default", "float32", "operands"])
def test_any_budget_and_logits_dtype(
    backend: str, dtype: torch.dtype, memory_budget: int, reduction: str, logits: str
) -> None:
    """Both orders, with what is kept as logits and as finished rows, and nothing kept."""
    chosen = {"default": None, "float32": torch.float32, "operands": dtype}[logits]
    pair = linear_pair(50, H, V, dtype, rewrite=Shift(2.0), softcap=4.0, reduction="sum")
    options = {"options": LinearOptions(memory_budget, chosen)}
    if reduction == "sum":
        check(pair, backend, **options)
        return
    _, exact = pair.plain(torch.float64)
    _, plain = pair.plain(dtype)
    _, gradients = pair.ours(backend, reduction="none", **options)
    for ours, right, other in zip(gradients, exact, plain, strict=True):
        check_gradient(ours, right, other)


def counted_gemms(
    n: int,
    *,
    v: int = V,
    ref_h: int = H,
    train_weight: bool = True,
    weights: Any = None,
    **options: Any,
) -> float:
    """Matrix products of a call and its backward, in units of 2 n H v."""
    hidden = torch.randn(n, H, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, H, dtype=torch.bfloat16, requires_grad=train_weight)
    ref_hidden, ref_weight = torch.randn(n, ref_h), torch.randn(v, ref_h)
    with GemmCounter() as counter:
        linear_kl_loss(
            hidden,
            weight,
            ref_hidden.bfloat16(),
            ref_weight.bfloat16(),
            token_weights=weights,
            **options,
        ).sum().backward()
    return float(counter.flops / (2 * n * H * v))


@pytest.mark.parametrize("n", [H // 2, H])
def test_no_gemm_beyond_its_own(backend: str, n: int) -> None:
    """Both heads' logits, dH and dW: kept as logits up to H / 2 tokens, as rows up to H."""
    assert counted_gemms(n, backend=backend) == 4.0
    assert counted_gemms(n, ref_h=2 * H, backend=backend) == 5.0
    assert counted_gemms(64, train_weight=False, backend=backend) == 3.0


def test_a_budget_that_holds_the_sums_needs_none_either(backend: str) -> None:
    assert (
        counted_gemms(4 * H, backend=backend, options=LinearOptions(memory_budget=1 << 30)) == 4.0
    )
    # Without, tokens beyond those that are kept are projected twice by both heads.
    small = LinearOptions(memory_budget=1 << 20)
    assert 5.0 < counted_gemms(4 * H, v=6 * V, backend=backend, options=small) < 6.0


def test_kept_logits_spare_projections_of_a_backward_of_its_own(backend: str) -> None:
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    assert counted_gemms(64, options=LinearOptions(memory_budget=1 << 20), **options) == 6.0
    assert 4.0 < counted_gemms(64, options=LinearOptions(memory_budget=1 << 30), **options) < 4.5


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("train_weight", [True, False])
def test_rows_of_weight_0_cost_nothing(backend: str, reduction: str, train_weight: bool) -> None:
    weights = (torch.arange(50) % 5 < 2).float()
    options: dict[str, Any] = {
        "backend": backend,
        "train_weight": train_weight,
        "reduction": reduction,
        "options": LinearOptions(memory_budget=1 << 20),
    }
    some, every = counted_gemms(50, weights=weights, **options), counted_gemms(20, **options)
    assert some == pytest.approx(0.4 * every)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [True, False])
def test_without_compaction(backend: str, dtype: torch.dtype, reduction: str, frozen: bool) -> None:
    """The same results, though rows that hold NaN go through every GEMM."""
    pair = linear_pair(30, H, 300, dtype, rewrite=Shift(1.0), bias=False)
    assert pair.labels is not None
    ignored = pair.labels == -100
    for operands in (pair.student, pair.teacher):
        operands[0][ignored] = torch.nan
    results = []
    for compact in (True, False):
        hidden, weight = (x.detach().requires_grad_() for x in pair.student)
        weight.requires_grad_(not frozen)
        loss = pair.loss(
            (hidden, weight),
            backend,
            options=LinearOptions(compact=compact),
            reduction=reduction,
        )
        wanted = [hidden] if frozen else [hidden, weight]
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), wanted)))
    counted = replace(
        pair,
        student=(pair.student[0][~ignored], pair.student[1]),
        teacher=(pair.teacher[0][~ignored], pair.teacher[1]),
        labels=pair.labels[~ignored],
        options={**pair.options, "reduction": "sum" if reduction == "none" else "mean"},
    )
    (exact, right), (plain, other) = (counted.plain(t) for t in (torch.float64, dtype))
    for loss, *gradients in results:
        if reduction == "none":
            assert (loss[ignored] == 0).all()
            assert_within_budget(loss[~ignored], exact, plain, "losses", smallest_scale=1.0)
        else:
            assert_sum_within_budget(loss, exact / len(exact), plain / len(plain), "loss")
        assert (gradients[0][ignored] == 0).all()
        gradients[0] = gradients[0][~ignored]
        for got, a, b in zip(gradients, right, other, strict=False):
            check_gradient(got, a, b)


def test_options_reach_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[LinearShape, LinearOptions]] = []

    def spy(shape: LinearShape, options: LinearOptions, **more: Any) -> Plan:
        seen.append((shape, options))
        return plan_linear(shape, options, **more)

    monkeypatch.setattr("unilogit_kernels.fused_linear.compaction.plan_linear", spy)
    operands = torch.randn(9, H), torch.randn(V, H), torch.randn(9, 7), torch.randn(V, 7)
    linear_kl_loss(*operands, options=LinearOptions(memory_budget=3 << 20, compact=False))
    ((shape, options),) = seen
    assert options == LinearOptions(memory_budget=3 << 20, compact=False)
    assert shape.reference is not None
    assert shape.reference.h == 7


def test_errors_of_options() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
    teacher = hidden.bfloat16(), weight.bfloat16()
    with pytest.raises(ValueError, match=r"memory_budget is in bytes, at least .* got 64"):
        linear_kl_loss(hidden, weight, *teacher, options=LinearOptions(memory_budget=64))
    with pytest.raises(TypeError, match=r"logits_dtype must be the operands' dtype"):
        linear_kl_loss(hidden, weight, *teacher, options=LinearOptions(logits_dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"logits_dtype is of both models' logits: with hidden"):
        linear_kl_loss(*teacher, hidden, weight, options=LinearOptions(logits_dtype=torch.bfloat16))
    linear_kl_loss(hidden, weight, *teacher, options=LinearOptions(logits_dtype=torch.float32))


@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_plan_of_a_gpu_runs_on_tensors_without_data(
    monkeypatch: pytest.MonkeyPatch, train_weight: bool, dtype: torch.dtype
) -> None:
    """At 8192 x 128,256 x 4096: shapes, dtypes and GEMMs of what a GPU would run."""
    n, h, v = 8192, 4096, 128_256
    monkeypatch.setattr("unilogit_kernels.fused_linear.gemm.writes_wider", lambda _: True)
    dtypes = GemmDtypes.of(dtype, "cuda")
    needs = Needs(hidden=True, weight=train_weight, bias=False)
    shape = LinearShape(n, h, v, dtypes, dtype, "cuda", needs, HeadShape(h, dtypes, dtype))
    plan = plan_linear(shape, passes=2)
    with FakeTensorMode():
        hidden, weight = (torch.empty(size, h, dtype=dtype, device="meta") for size in (n, v))
        heads = (LinearHead(hidden, weight, None, dtypes),) * 2
        gradients = Gradients(
            torch.empty_like(hidden, dtype=dtypes.results),
            torch.empty_like(weight, dtype=dtypes.results) if train_weight else None,
            None,
        )
        rows = PairProblem(
            torch.empty(n, dtype=torch.int64, device="meta"),
            True,
            LogitTransform(),
            LogitTransform(),
            v,
            Divergence("forward", Shift(1.0)),
            _NoKernels(),
        )
        ones = torch.ones(n, device="meta")
        loss = PairLoss(rows, ones, torch.ones((), device="meta"))
        values = linear_loss(heads, loss, plan, gradients, LinearOptions(compact=False))
        assert values.shape == (n,)


class _NoKernels(EagerKernels):
    """Two-row kernels that check what they are given and compute nothing."""

    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        assert pair.a.shape == pair.b.shape
        assert state.shape == (7, pair.a.shape[0]) == (7, pair.labels.shape[0])

    def divergence_gradient(
        self,
        pair: TilePair,
        state: Tensor,
        coefficients: Tensor,
        student: Literal["a", "b"],
        out: Tensor,
    ) -> None:
        assert pair.a.shape == pair.b.shape == out.shape
        assert coefficients.shape == (4, out.shape[0])
        assert state.shape == (7, pair.labels.shape[0])
