"""bfloat16 on a CPU without instructions for it: float32 GEMMs of operands cast chunk by chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fused_linear.test_explain import CASES, PAIR_CASES, measured, predicted
from tests.support.divergence_pairs import DIVERGENCES, check_gradient, linear_pair
from tests.support.problems import Problem, linear_problem
from unilogit_kernels import LinearOptions, linear_objective_loss, linear_unilogit_loss
from unilogit_kernels.fused_linear import compaction, gemm
from unilogit_kernels.fused_linear.gemm import GemmDtypes
from unilogit_kernels.fused_linear.plan import Plan
from unilogit_kernels.testing import AllocationGuard, assert_within_budget

BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _without_bfloat16_gemms(_bfloat16_gemms: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "multiplies_bfloat16", lambda: False)


def _gradients(problem: Problem, trained: tuple[int, ...], **options: Any) -> list[torch.Tensor]:
    operands = [x.detach().requires_grad_(i in trained) for i, x in enumerate(problem.operands)]
    hidden, weight, *bias = operands
    loss = linear_objective_loss(
        hidden,
        weight,
        problem.labels,
        problem.objective,
        bias=bias[0] if bias else None,
        **problem.options,
        **options,
    )
    return list(torch.autograd.grad(loss.sum(), [operands[i] for i in trained]))


def test_the_dtypes() -> None:
    float32 = torch.float32
    assert GemmDtypes.of(BFLOAT16, "cpu")[:3] == (float32, float32, BFLOAT16)
    assert GemmDtypes.of(BFLOAT16, "cpu", BFLOAT16)[:3] == (float32, BFLOAT16, BFLOAT16)
    assert GemmDtypes.of(BFLOAT16, "cuda")[:3] == (BFLOAT16, float32, BFLOAT16)


@pytest.mark.parametrize("trained", [(0, 1, 2), (0,), (1,), (0, 2)])
@pytest.mark.parametrize("logits_dtype", [None, BFLOAT16])
@pytest.mark.parametrize("n_h", [(11, 24), (40, 12)])
def test_gradients_are_within_the_budget(
    trained: tuple[int, ...], logits_dtype: torch.dtype | None, n_h: tuple[int, int]
) -> None:
    problem = linear_problem(*n_h, 130, BFLOAT16, bias=True, softcap=4.0)
    _, exact = problem.plain(torch.float64)
    _, plain = problem.plain(BFLOAT16)
    for reduction in ("mean", "sum"):
        scale = 1 if reduction == "mean" else int((problem.labels != -100).sum())
        found = _gradients(
            problem, trained, reduction=reduction, options=LinearOptions(logits_dtype=logits_dtype)
        )
        for i, ours in zip(trained, found, strict=True):
            assert ours.dtype == BFLOAT16
            assert_within_budget(ours, scale * exact[i], scale * plain[i])


@pytest.mark.parametrize("kept", [0, 12])
@pytest.mark.parametrize(("tokens", "columns"), [(40, 130), (40, 50), (7, 50), (7, 1)])
def test_any_cut_is_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, kept: int, tokens: int, columns: int
) -> None:
    problem = linear_problem(40, 24, 130, BFLOAT16)
    plan = Plan("vocabulary_chunks", tokens, columns, saved_tokens=kept)
    monkeypatch.setattr(compaction, "plan_linear", lambda *_, **__: plan)
    _, exact = problem.plain(torch.float64)
    _, plain = problem.plain(BFLOAT16)
    for ours, truth, baseline in zip(_gradients(problem, (0, 1)), exact, plain, strict=True):
        assert_within_budget(ours, truth, baseline)


def test_logits_are_more_accurate_than_bfloat16_ones() -> None:
    """As in a model that runs in float32 after its last layer, and unlike `F.linear`."""
    problem = linear_problem(64, 48, 300, BFLOAT16, objective="cross_entropy")
    _, exact = problem.plain(torch.float64)
    errors = []
    for dtype in (None, BFLOAT16):
        gradient = _gradients(problem, (0, 1), options=LinearOptions(logits_dtype=dtype))[
            1
        ].double()
        errors.append((gradient - exact[1]).norm() / exact[1].norm())
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("case", [case for case in CASES if "float32 logits" not in case])
def test_operations_and_peak_are_predicted(case: str) -> None:
    n, h, options = CASES[case]
    flops, peak = measured(n, h, BFLOAT16, **options)
    report = predicted(n, h, BFLOAT16, **options)
    assert report.gemm_flops == flops
    assert 0.9 * peak <= report.peak_bytes <= 1.2 * peak


@pytest.mark.parametrize("case", [case for case in PAIR_CASES if "float32 logits" not in case])
def test_operations_and_peak_against_a_reference_model(case: str) -> None:
    n, h, options = PAIR_CASES[case]
    options = {"ref_h": h, **options}
    flops, peak = measured(n, h, BFLOAT16, **options)
    report = predicted(n, h, BFLOAT16, **options)
    assert report.gemm_flops == flops
    assert 0.9 * peak <= report.peak_bytes <= 1.2 * peak


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("memory_budget", [1 << 20, 1 << 30])
def test_two_models_are_within_the_budget(
    divergence: dict[str, Any], frozen: bool, memory_budget: int
) -> None:
    pair = linear_pair(40, 24, 503, BFLOAT16, **divergence)
    _, exact = pair.plain(torch.float64)
    _, plain = pair.plain(BFLOAT16)
    hidden, weight, bias = (x.detach().requires_grad_() for x in pair.student)
    weight.requires_grad_(not frozen)
    loss = pair.loss((hidden, weight, bias), "cpu", options=LinearOptions(memory_budget))
    trained = [0, 2] if frozen else [0, 1, 2]
    operands = [hidden, weight, bias]
    for i, ours in zip(
        trained, torch.autograd.grad(loss, [operands[i] for i in trained]), strict=True
    ):
        check_gradient(ours, exact[i], plain[i])


@pytest.mark.parametrize("frozen", [False, True])
def test_never_allocates_all_logits(frozen: bool) -> None:
    hidden = torch.randn(300, 8).bfloat16().requires_grad_()
    weight = torch.randn(997, 8).bfloat16().requires_grad_(not frozen)
    with AllocationGuard(forbidden_elements=300 * 997):
        linear_unilogit_loss(hidden, weight, torch.randint(0, 997, (300,))).backward()


@pytest.mark.parametrize("train_weight", [True, False])
def test_hidden_states_are_cast_by_groups_of_tokens(train_weight: bool) -> None:
    """Of everything that grows with the tokens, only sums of the gradient and vectors are left."""
    n, h, budget = 6000, 64, 5 << 20
    options = {"train_weight": train_weight, "memory_budget": budget}
    peak = measured(n, h, BFLOAT16, **options)[1]
    report = predicted(n, h, BFLOAT16, **options)
    assert report.plan.tokens < n
    assert peak <= budget
    assert 0.9 * peak <= report.peak_bytes <= 1.2 * peak
