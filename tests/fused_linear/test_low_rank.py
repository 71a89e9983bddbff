"""The low-rank term of an lm_head: every cut within the budget, nothing of size V x h, its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.divergence_pairs import plain_loss
from tests.support.problems import SCALE, casts_operands, check, linear_problem, saved_tokens
from unilogit_kernels import (
    LinearOptions,
    LinearUnilogitLoss,
    LowRank,
    Shift,
    explain_plan,
    linear_kl_loss,
    linear_objective_loss,
    linear_target_log_odds,
    linear_unilogit_loss,
)
from unilogit_kernels.functional.explain import PlanReport
from unilogit_kernels.fused_linear import compaction
from unilogit_kernels.fused_linear.plan import Plan
from unilogit_kernels.testing import (
    AllocationGuard,
    assert_sum_within_budget,
    assert_within_budget,
)

N, H, V, R = 24, 16, 130, 3


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan], None]:
    """Have calls cut in this way."""

    def choose(chosen: Plan) -> None:
        monkeypatch.setattr(compaction, "plan_linear", lambda *_, **__: chosen)

    return choose


@pytest.mark.parametrize("options", [{"softcap": 4.0}, {"vocab_size": 111}], ids=str)
def test_any_cut_is_within_the_budget(
    plan: Callable[[Plan], None], backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """A trained weight beside it: logits saved, rows finished, and all of it projected again."""
    problem = linear_problem(N, H, V, dtype, bias=True, rank=R, **options)
    v = options.get("vocab_size", V)
    n, kept = int((problem.labels != -100).sum()), saved_tokens(dtype, H)
    plans = [
        Plan("vocabulary_chunks", tokens, columns, saved_tokens=saved)
        for tokens, columns in ((n, v), (7, 50), (1, 64))
        for saved in (0, min(n, kept))
    ]
    plans.append(Plan("vocabulary_chunks", 7, 50, 20, min(n, kept), 0, True, 5, 30))
    if not casts_operands(dtype):
        plans += [Plan("token_chunks", tokens, v, 40) for tokens in (n, 7, 1)]
    for each in plans:
        plan(each)
        check(problem, backend)
    check(linear_problem(N, H, V, dtype, rank=R, **options), backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["hidden, a, b", "a, b", "b", "hidden", "a"])
def test_a_frozen_weight(backend: str, dtype: torch.dtype, reduction: str, trained: str) -> None:
    """What LoRA on an lm_head is; the plan's own cut, several chunks of it."""
    problem = linear_problem(96, 64, 5000, dtype, rank=R)
    names = ("hidden", "weight", "a", "b")
    given = dict(zip(names, (*problem.operands, *problem.adapter), strict=True))
    inputs = {k: x.detach().requires_grad_(k in trained.split(", ")) for k, x in given.items()}
    adapter = LowRank(inputs["a"], inputs["b"], SCALE)
    with AllocationGuard(forbidden_elements=5000 * 64) as guard:
        losses = linear_objective_loss(
            inputs["hidden"],
            inputs["weight"],
            problem.labels,
            adapter=adapter,
            objective="unilogit",
            reduction=reduction,
            backend=backend,
            options=LinearOptions(memory_budget=1 << 20),
        )
        loss = losses if reduction == "mean" else losses.sum() / (problem.labels != -100).sum()
        learning = [x for x in inputs.values() if x.requires_grad]
        gradients = torch.autograd.grad(loss, learning)
    assert guard.largest > 0
    exact_terms, exact = problem.plain(torch.float64)
    plain_terms, plain = problem.plain(dtype)
    assert_sum_within_budget(loss, exact_terms, plain_terms, "loss")
    at = [i for i, k in enumerate(names) if inputs[k].requires_grad]
    for i, ours in zip(at, gradients, strict=True):
        assert_within_budget(ours, exact[i], plain[i], f"gradient of {names[i]}")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_against_another_model(backend: str, dtype: torch.dtype, reduction: str) -> None:
    """Either head may have a term; the teacher's gets no gradient."""
    student, teacher = (linear_problem(N, H, V, dtype, rank=R) for _ in range(2))
    labels = student.labels

    def logits(problem: Any, a: Tensor, b: Tensor) -> Tensor:
        hidden, weight = (x.to(a.dtype) for x in problem.operands)
        z = F.linear(hidden, weight) + SCALE * F.linear(F.linear(hidden, a), b)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def plain(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        low = tuple(x.detach().to(dtype).requires_grad_() for x in student.adapter)
        against = logits(teacher, *(x.to(dtype) for x in teacher.adapter))
        losses, loss = plain_loss(logits(student, *low), against, labels, rewrite=Shift(2.0))
        return losses, torch.autograd.grad(loss, low)

    low = tuple(x.detach().requires_grad_() for x in student.adapter)
    theirs = tuple(x.detach().requires_grad_() for x in teacher.adapter)
    losses = linear_kl_loss(
        student.operands[0],
        student.operands[1],
        teacher.operands[0],
        teacher.operands[1],
        labels,
        adapter=LowRank(low[0], low[1], SCALE),
        ref_adapter=LowRank(theirs[0], theirs[1], SCALE),
        rewrite=Shift(2.0),
        reduction=reduction,
        backend=backend,
    )
    loss = losses if reduction == "mean" else losses.sum() / (labels != -100).sum()
    loss.backward()
    assert theirs[0].grad is None is theirs[1].grad
    (_, exact), (_, in_dtype) = plain(torch.float64), plain(dtype)
    for name, x, right, wrong in zip("ab", low, exact, in_dtype, strict=True):
        assert x.grad is not None
        assert_within_budget(x.grad, right, wrong, f"gradient of {name}")


def test_an_adapter_in_float32_beside_16_bit_weights(backend: str) -> None:
    """As PEFT keeps it: its gradients come in float32."""
    problem = linear_problem(N, H, V, torch.bfloat16, rank=R)
    hidden, weight = problem.operands
    low = [x.float().requires_grad_() for x in problem.adapter]
    loss = linear_unilogit_loss(
        hidden, weight, problem.labels, adapter=LowRank(low[0], low[1], SCALE), backend=backend
    )
    loss.backward()
    _, exact = problem.plain(torch.float64)
    _, plain = problem.plain(torch.bfloat16)
    for x, right, wrong in zip(low, exact[2:], plain[2:], strict=True):
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert_within_budget(x.grad.bfloat16(), right, wrong)


def test_a_row_that_does_not_count_reaches_no_gradient(backend: str) -> None:
    for compact in (True, False):
        problem = linear_problem(N, H, V, torch.float32, rank=R)
        hidden = problem.operands[0].clone()
        hidden[problem.labels == -100] = torch.nan
        low = [x.detach().clone().requires_grad_() for x in problem.adapter]
        linear_unilogit_loss(
            hidden.requires_grad_(),
            problem.operands[1],
            problem.labels,
            adapter=LowRank(low[0], low[1], SCALE),
            backend=backend,
            options=LinearOptions(compact=compact),
        ).backward()
        for x in (hidden, *low):
            assert x.grad is not None
            assert bool(x.grad.isfinite().all())


def test_rows_that_are_skipped(backend: str) -> None:
    """Where few rows have a gradient, the others' are exactly 0 in the low-rank space too."""
    problem = linear_problem(64, H, 997, torch.float32, rank=R)
    weights = torch.zeros(64)
    weights[::4] = 1.0
    for reduction in ("sum", "none"):
        hidden = problem.operands[0].clone().requires_grad_()
        low = [x.detach().clone().requires_grad_() for x in problem.adapter]
        losses = linear_unilogit_loss(
            hidden,
            problem.operands[1],
            problem.labels,
            token_weights=weights if reduction == "sum" else None,
            adapter=LowRank(low[0], low[1], SCALE),
            reduction=reduction,
            backend=backend,
        )
        (losses * (1.0 if reduction == "sum" else weights)).sum().backward()
        assert hidden.grad is not None
        assert bool(hidden.grad[weights == 0].eq(0).all())
        problem.options.update(token_weights=weights, reduction="sum")
        _, exact = problem.plain(torch.float64)
        _, plain = problem.plain(torch.float32)
        for x, right, wrong in zip(low, exact[2:], plain[2:], strict=True):
            assert x.grad is not None
            assert_within_budget(x.grad, right, wrong)


def test_dropout_is_of_what_enters_a() -> None:
    problem = linear_problem(N, H, V, torch.float64, rank=R)
    (hidden, weight), (a, b) = problem.operands, problem.adapter
    torch.manual_seed(1)
    ours = linear_target_log_odds(
        hidden, weight, problem.labels, adapter=LowRank(a, b, SCALE, dropout=0.5)
    )
    torch.manual_seed(1)
    entering = F.dropout(hidden.masked_fill((problem.labels == -100)[:, None], 0.0), 0.5)
    logits = hidden @ weight.T + SCALE * (entering @ a.T) @ b.T
    counted = problem.labels != -100
    chosen = logits.gather(1, problem.labels.clamp(0)[:, None])
    rest = logits.scatter(1, problem.labels.clamp(0)[:, None], -torch.inf).logsumexp(1)
    torch.testing.assert_close(ours[counted], (chosen[:, 0] - rest)[counted])


def test_module_and_autocast(backend: str) -> None:
    hidden, weight = torch.randn(5, H), torch.randn(V, H)
    a, b = torch.randn(R, H, requires_grad=True), torch.randn(V, R, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LinearUnilogitLoss(backend=backend)(
            hidden, weight, torch.arange(5), adapter=LowRank(a, b)
        )
    loss.backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.dtype, b.grad.dtype) == (torch.float32, torch.float32)
    half = [x.detach().bfloat16() for x in (hidden, weight, a, b)]
    expected = linear_unilogit_loss(
        half[0], half[1], torch.arange(5), adapter=LowRank(half[2], half[3]), backend=backend
    )
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ((torch.randn(R, H), torch.randn(V, R)), TypeError, "must be one LowRank"),
        ([LowRank(torch.randn(R, H), torch.randn(V, R))] * 2, TypeError, "side by side"),
        (LowRank(torch.randn(R, H + 1), torch.randn(V, R)), ValueError, "adapter.a must have"),
        (LowRank(torch.randn(R, H), torch.randn(V, R + 1)), ValueError, r"\[130, 4\]"),
        (LowRank(torch.randn(R, H).bfloat16(), torch.randn(V, R)), TypeError, "adapter.b must"),
        (LowRank(torch.randn(R, H), torch.randn(V, R), torch.nan), ValueError, "adapter.scale"),
        (LowRank(torch.randn(R, H), torch.randn(V, R), 1.0, 1.0), ValueError, "adapter.dropout"),
        (LowRank(torch.randn(R, H), torch.ones(V, R).to("meta")), ValueError, "device"),
    ],
    ids=["tuple", "list", "A", "B", "dtype", "scale", "dropout", "device"],
)
def test_mistakes_are_named(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_unilogit_loss(torch.randn(4, H), torch.randn(V, H), torch.arange(4), adapter=change)
    with pytest.raises(error, match="ref_adapter" if "device" not in message else message):
        linear_kl_loss(
            *(torch.randn(4, H), torch.randn(V, H)) * 2, torch.arange(4), ref_adapter=change
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_its_cost_is_explained(device: str, reduction: str) -> None:
    n, h, v, r = 4096, 2048, 32_000, 64

    def report(**more: Any) -> PlanReport:
        return explain_plan(n, h, v, train_weight=False, reduction=reduction, device=device, **more)

    plain, adapted, frozen = report(), report(rank=r), report(rank=r, train_adapter=False)
    unit = 2 * n * r * v
    assert adapted.gemm_flops - frozen.gemm_flops == unit
    if device == "cuda":
        # The product itself, and those of two gradients; once more where logits are made again.
        assert (adapted.gemm_flops - plain.gemm_flops) / unit == {"mean": 3, "none": 4}[reduction]
    assert "with a term of rank 64" in str(adapted)
    assert "a low-rank term" in str(adapted).splitlines()[0]
    assert adapted.peak_bytes <= adapted.memory_budget


def test_the_explained_memory_is_what_is_taken() -> None:
    n, h, v, r = 256, 32, 20_000, 8
    report = explain_plan(n, h, v, train_weight=False, rank=r, device="cpu", dtype=torch.float32)
    problem = linear_problem(n, h, v, torch.float32, rank=r)
    hidden, weight = problem.operands
    low = [x.requires_grad_() for x in problem.adapter]
    with AllocationGuard() as guard:
        linear_unilogit_loss(
            hidden.requires_grad_(),
            weight,
            torch.randint(v, (n,)),
            adapter=LowRank(low[0], low[1]),
            backend="cpu",
        )
    results = 4 * (n * h + n * r + v * r)
    around = 4 * (2 * n * h + 4 * n * r)  # hidden states that enter A, and the way there
    assert report.peak_bytes <= guard.peak_bytes <= report.peak_bytes + results + around
