"""The chunk loops: what they never allocate, and that their cut does not show in the result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import UNCUT_LOGITS
from tests.support.problems import Problem, casts_operands, check, linear_problem, saved_tokens
from tests.support.roundings import assert_rounded
from unilogit_kernels import linear_objective_loss, linear_target_log_odds, linear_unilogit_loss
from unilogit_kernels.fused_linear import compaction, loops
from unilogit_kernels.fused_linear import plan as planning
from unilogit_kernels.fused_linear.budget import CHUNK_BYTES, CHUNK_TOKENS, LinearShape
from unilogit_kernels.fused_linear.gemm import GemmDtypes, Needs
from unilogit_kernels.fused_linear.options import MEMORY_BUDGET, LinearOptions
from unilogit_kernels.fused_linear.plan import (
    MIN_TILE_COLUMNS,
    ONLINE_COLUMNS,
    Plan,
    plan_linear,
)
from unilogit_kernels.maths import row_state
from unilogit_kernels.testing import AllocationGuard, assert_within_budget

SHAPES = [(64, 16, 3001), (300, 8, 997), (80, 64, 2053)]


@pytest.mark.parametrize("n_h_v", SHAPES)
@pytest.mark.parametrize("frozen_weight", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_allocates_all_logits(
    backend: str,
    dtype: torch.dtype,
    n_h_v: tuple[int, int, int],
    frozen_weight: bool,
    reduction: str,
) -> None:
    n, h, v = n_h_v
    problem = linear_problem(n, h, v, dtype)
    hidden, weight = (x.requires_grad_() for x in problem.operands)
    weight.requires_grad_(not frozen_weight)
    with AllocationGuard(forbidden_elements=n * v) as guard:
        loss = linear_unilogit_loss(
            hidden, weight, torch.randint(0, v, (n,)), reduction=reduction, backend=backend
        )
        loss.sum().backward()
    assert guard.largest > 0


def test_guard_sees_inside_the_operators() -> None:
    """It would catch a call that did hold all logits."""
    logits = torch.randn(20, 300, requires_grad=True)
    labels = torch.arange(20)
    with pytest.raises(AssertionError, match="6000 elements"), AllocationGuard(6000):
        torch.ops.unilogit_kernels.objective_loss(
            logits,
            labels,
            -100,
            1.0,
            0.0,
            300,
            0,
            300,
            "",
            None,
            False,
            "eager",
            torch.ones(20),
            torch.ones(()),
            "unilogit",
            [],
            [],
            True,
        )


def test_guard_counts_live_bytes() -> None:
    with AllocationGuard() as guard:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b + 1
    assert guard.peak_bytes == 8000
    assert guard.largest == 1000
    assert c.sum() == 2000


def _plans(n: int, most_kept: int, v: int) -> list[Plan]:
    return [
        Plan("vocabulary_chunks", tokens, columns, saved_tokens=kept)
        for tokens in (n, 7, 1)
        for columns in (v, 100, 1)
        for kept in (0, min(n, most_kept))
        if not (tokens == 1 and columns == 1)
    ]


@pytest.mark.parametrize("n_h", [(11, 24), (24, 11)])
def test_any_cut_is_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, n_h: tuple[int, int]
) -> None:
    """Both orders, with chunks down to one row or column, with and without kept logits."""
    n, h = n_h
    v = 130
    problem = linear_problem(n, h, v, dtype, bias=True, softcap=4.0)
    n_active = int((problem.labels != -100).sum())
    plans = _plans(n_active, saved_tokens(dtype, h), v)
    for plan in plans:
        monkeypatch.setattr(compaction, "plan_linear", lambda *_, plan=plan, **__: plan)
        check(problem, backend)
    frozen = [Plan("token_chunks", tokens, v) for tokens in (n_active, 3, 1)]
    if casts_operands(dtype):
        return
    for plan in frozen:
        monkeypatch.setattr(compaction, "plan_linear", lambda *_, plan=plan, **__: plan)
        _check_frozen(problem, backend, (0, 2))


@pytest.fixture
def small_calls_whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans as users have them, which do not cut the smallest calls."""
    monkeypatch.setattr(planning, "UNCUT_LOGITS", UNCUT_LOGITS)
    plan_linear.cache_clear()
    yield
    plan_linear.cache_clear()


@pytest.mark.usefixtures("small_calls_whole")
def test_a_small_call_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype
) -> None:
    """One GEMM an operand, whatever is trained, and right; where no copy of the weight grows."""
    plans: list[Plan] = []

    def planned(*args: Any, **options: Any) -> Plan:
        plans.append(plan_linear(*args, **options))
        return plans[-1]

    monkeypatch.setattr(compaction, "plan_linear", planned)
    problem = linear_problem(23, 24, 130, dtype, bias=True, softcap=4.0)
    check(problem, backend)
    whole = Plan("token_chunks", int((problem.labels != -100).sum()), 130)
    assert (whole in plans) == (dtype == torch.float32)
    plans.clear()
    _check_frozen(problem, backend, (0, 2))
    assert (whole in plans) != casts_operands(dtype)


@pytest.mark.usefixtures("small_calls_whole")
def test_what_is_small_has_a_bound() -> None:
    """In logits and in columns, whose weight would be read twice."""

    def order(n: int, v: int, **options: Any) -> str:
        float32 = GemmDtypes.of(torch.float32, "cpu")
        needs = Needs(hidden=True, weight=False, bias=False)
        shape = LinearShape(n, 8, v, float32, torch.float32, "cpu", needs)
        return plan_linear(shape, passes=2, **options).order

    assert order(32, 2048) == "token_chunks"
    assert order(33, 2048) == "online"
    assert order(2, 2049) == "online"
    assert order(2, 100, coupled=True) == "vocabulary_chunks"


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_one_visit_is_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, softcap: float | None
) -> None:
    """Any cut of the order that a frozen lm_head takes on CPU."""
    v = 130
    problem = linear_problem(17, 24, v, dtype, bias=True, softcap=softcap)
    for tokens, columns in ((17, v), (17, 50), (5, 17), (1, 7), (3, 1)):
        plan = Plan("online", tokens, columns)
        monkeypatch.setattr(compaction, "plan_linear", lambda *_, plan=plan, **__: plan)
        _check_frozen(problem, backend, (0,))


def test_one_visit_never_launders(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """A row that overflows or holds NaN poisons its own gradient; a column of -inf, none."""
    plan = Plan("online", 3, 100)
    monkeypatch.setattr(compaction, "plan_linear", lambda *_, **__: plan)
    hidden = torch.tensor([[1.0, 0.0], [0.0, 10.0], [2.0, 0.0], [torch.nan, 1.0]]).requires_grad_()
    weight, bias = torch.randn(400, 2), torch.zeros(400)
    weight[200] = torch.tensor([0.5, 3e38])
    bias[:150] = -torch.inf
    labels = torch.tensor([151, 152, 399, 153])
    options: dict[str, Any] = {"num_items_in_batch": 4, "backend": backend}
    loss = linear_objective_loss(hidden, weight, labels, "cross_entropy", bias=bias, **options)
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected = [False, True, False, True]
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == expected

    def without_impossible_columns(dtype: torch.dtype) -> torch.Tensor:
        x = hidden.detach()[::2].to(dtype).requires_grad_()
        logits = F.linear(x, weight[150:].to(dtype))
        loss = F.cross_entropy(logits, labels[::2] - 150, reduction="sum") / 4
        return torch.autograd.grad(loss, x)[0]

    exact, plain = (without_impossible_columns(t) for t in (torch.float64, torch.float32))
    assert_within_budget(gradient[::2], exact, plain)


def _check_frozen(problem: Problem, backend: str, trained: tuple[int, ...]) -> None:
    hidden, weight, bias = (x.detach() for x in problem.operands)
    inputs = [x.requires_grad_() for i, x in enumerate((hidden, weight, bias)) if i in trained]
    loss = linear_unilogit_loss(
        hidden, weight, problem.labels, bias=bias, backend=backend, **problem.options
    )
    gradients = torch.autograd.grad(loss, inputs)
    _, exact = problem.plain(torch.float64)
    _, plain = problem.plain(hidden.dtype)
    for i, ours in zip(trained, gradients, strict=True):
        assert_within_budget(ours, exact[i], plain[i])


def test_weight_gradient_error_does_not_grow_with_chunks(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Adding up in bfloat16 would: 64 chunks lose several digits of it."""
    problem = linear_problem(256, 16, 64, torch.bfloat16)
    errors = []
    for tokens in (256, 4):
        plan = Plan("vocabulary_chunks", tokens, 16)
        monkeypatch.setattr(compaction, "plan_linear", lambda *_, plan=plan, **__: plan)
        _, (_, gradient) = problem.ours(backend)
        _, (_, exact) = problem.plain(torch.float64)
        errors.append((gradient.double() - exact).norm() / exact.norm())
    assert errors[1] <= 1.5 * errors[0]


class TestPlan:
    def plan(
        self, n: int, h: int, v: int, *, weight: bool, device: str = "cpu", **options: Any
    ) -> Plan:
        dtypes = GemmDtypes.of(torch.bfloat16, device)
        needs = Needs(hidden=True, weight=weight, bias=False)
        shape = LinearShape(n, h, v, dtypes, torch.bfloat16, device, needs)
        return plan_linear(shape, LinearOptions(**options), passes=2)

    def test_frozen_weight_goes_by_tokens_within_the_budget(self) -> None:
        for n in (1024, 65_536):
            plan = self.plan(n, 1024, 131_072, weight=False, device="cuda")
            assert plan.order == "token_chunks"
            assert plan.tokens <= CHUNK_TOKENS
            assert plan.tile_columns == plan.columns

    def test_token_chunks_are_of_one_size(self) -> None:
        """A last chunk of a few tokens would read the weights as all others do."""
        for n in (511, 1024, 8192, 10_000):
            plan = self.plan(n, 4096, 128_256, weight=False, device="cuda")
            chunks = -(-n // plan.tokens)
            assert n - (chunks - 1) * plan.tokens > plan.tokens - 64 * chunks
            assert plan.tokens % 64 == 0

    def test_frozen_weight_takes_one_visit_on_a_cpu(self) -> None:
        plan = self.plan(1024, 1024, 131_072, weight=False)
        assert plan.order == "online"
        assert plan.tokens == 1024
        assert plan.tokens * plan.columns * 2 <= CHUNK_BYTES["cpu"]

    def test_one_visit_takes_tokens_in_groups_of_one_size(self) -> None:
        plan = self.plan(100_001, 64, 131_072, weight=False)
        assert plan.order == "online"
        groups = -(-100_001 // plan.tokens)
        assert groups > 1
        assert plan.tokens - (100_001 - (groups - 1) * plan.tokens) < groups
        assert plan.columns >= ONLINE_COLUMNS

    def test_rows_to_be_skipped_go_by_tokens(self) -> None:
        """One visit knows the slopes only when every GEMM is done."""
        plan = self.plan(1024, 1024, 131_072, weight=False, skip_below=1e-6)
        assert plan.order == "token_chunks"

    def test_trainable_weight_goes_by_columns_and_keeps_the_logits(self) -> None:
        plan = self.plan(1024, 1024, 131_072, weight=True)
        assert plan.order == "vocabulary_chunks"
        assert plan.saved_tokens == 1024
        assert plan.tokens * plan.columns * 2 <= CHUNK_BYTES["cpu"]

    def test_float32_logits_are_kept_as_finished_bfloat16_rows(self) -> None:
        plan = self.plan(2048, 4096, 128_256, weight=True, device="cuda")
        assert plan.saves_rows
        assert (plan.saved_tokens, plan.saved_beside) == (2048, 0)

    def test_rows_wait_beside_the_gradient_too_where_its_sums_do_not_fit(self) -> None:
        plan = self.plan(8192, 4096, 128_256, weight=True, device="cuda", memory_budget=1 << 30)
        assert plan.saves_rows
        assert plan.saved_inside == 4096
        assert 2048 <= plan.saved_beside < 4096
        assert plan.saved_beside % 64 == plan.row_tokens % 64 == 0

    def test_on_a_gpu_many_tokens_add_up_in_few_launches(self) -> None:
        for n in (8192, 65_536):
            plan = self.plan(n, 4096, 128_256, weight=True, device="cuda")
            assert plan.order == "token_chunks"
            assert 1024 <= plan.tokens <= CHUNK_TOKENS

    def test_a_gradient_row_holds_whole_logits(self) -> None:
        """Float32 logits of a coupled loss, which finishes no rows, in 33 bfloat16 numbers."""
        dtypes = GemmDtypes.of(torch.bfloat16, "cuda")
        shape = LinearShape(64, 33, 1000, dtypes, torch.bfloat16, "cuda", Needs(True, True, False))
        assert plan_linear(shape, passes=2, coupled=True).saved_tokens == 0
        # Few tokens more: with many, adding the weight's gradient up is cheaper.
        assert self.plan(36, 33, 1000, weight=True, device="cpu").saved_tokens == 33

    def test_a_vocabulary_too_long_for_a_token_chunk(self) -> None:
        plan = self.plan(4096, 64, 1 << 23, weight=False, device="cuda", memory_budget=256 << 20)
        assert plan.order == "vocabulary_chunks"

    def test_many_tokens_are_cut_too(self) -> None:
        plan = self.plan(1 << 20, 64, 1 << 17, weight=True)
        assert plan.tokens * plan.columns * 2 <= MEMORY_BUDGET["cpu"]
        assert plan.columns >= MIN_TILE_COLUMNS


def test_skips_rows_without_a_gradient(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Rows whose slope is 0 do not reach a GEMM of the backward."""
    sizes: list[int] = []
    original = loops.linear_gradient

    def spy(loop, *args):  # type: ignore[no-untyped-def]
        sizes.append(loop.heads[0].hidden.shape[0])
        return original(loop, *args)

    monkeypatch.setattr(compaction, "linear_gradient", spy)
    hidden, weight = torch.randn(20, 8), torch.randn(90, 8, requires_grad=True)
    d = linear_target_log_odds(hidden, weight, torch.arange(20), backend=backend)
    d[4:7].sum().backward()
    assert sizes == [3]


class TestRowState:
    def test_merge_is_what_one_pass_gives(self) -> None:
        logits, labels = torch.randn(3, 90, dtype=torch.float64) * 30, torch.tensor([0, 40, 89])
        from unilogit_kernels.backends.contract import Tile
        from unilogit_kernels.backends.registry import load

        eager, cpu = load("eager"), torch.device("cpu")

        def state(first: int, last: int) -> torch.Tensor:
            part = row_state.empty_state(3, cpu, torch.float64)
            eager.log_odds_update(Tile(logits[:, first:last], labels, first), part)
            return part

        whole = row_state.log_odds(state(0, 90), labels, 90)
        parts = [state(0, 41), state(41, 41), state(41, 60), state(60, 90)]
        left = row_state.merge(row_state.merge(parts[0], parts[1]), parts[2])
        for merged in (
            row_state.merge(left, parts[3]),
            row_state.merge(parts[3], left),
            row_state.merge_parts(torch.stack(parts)),
        ):
            assert torch.allclose(row_state.log_odds(merged, labels, 90), whole, rtol=1e-14)

    def test_share_of_a_part(self) -> None:
        inf, nan = torch.inf, torch.nan
        part = torch.tensor([[1.0, -inf, -inf, 900.0, inf], [2.0, 0.0, 0.0, 1.0, nan], [0.0] * 5])
        whole = torch.tensor([[3.0, 2.0, -inf, 900.0, inf], [2.0, 5.0, 0.0, 4.0, nan], [0.0] * 5])
        share = row_state.rest_share(part, whole)
        exact = torch.tensor([math.exp(-2), 0.0, 0.0, 0.25, nan], dtype=torch.float64)
        assert_rounded(share, exact)

    def test_empty_is_neutral(self) -> None:
        state = torch.tensor([[1.0], [2.0], [-3.0]])
        empty = row_state.empty_state(1, torch.device("cpu"))
        assert torch.equal(row_state.merge(state, empty), state)
        assert torch.equal(row_state.merge(empty, empty), empty)
