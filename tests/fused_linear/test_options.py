"""Options of a fused linear call: what they change, and that results stay within the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.problems import check, linear_problem
from unilogit_kernels import (
    LinearUnilogitLoss,
    linear_objective_loss,
    linear_target_log_odds,
    linear_unilogit_loss,
    objectives,
    reference,
)
from unilogit_kernels.fused_linear import compaction
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.fused_linear.plan import Plan, plan_linear
from unilogit_kernels.fused_linear.saved import SavedBeside
from unilogit_kernels.testing import (
    AllocationGuard,
    assert_sum_within_budget,
    assert_within_budget,
)

BUDGETS = [1 << 20, 2 << 20, 1 << 30]
V, H = 3001, 40


class GemmCounter(AllocationGuard):
    """Counts the floating-point operations of matrix products, inside our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if name in ("mm", "addmm"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return super().__torch_dispatch__(func, types, args, kwargs)


def _gemms(flops: int, n: int) -> float:
    return flops / (2 * n * H * V)


@pytest.mark.parametrize("memory_budget", BUDGETS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("logits", ["default", "float32", "operands"])
def test_any_budget_and_logits_dtype(
    backend: str, dtype: torch.dtype, memory_budget: int, reduction: str, logits: str
) -> None:
    """Both orders, rows kept as logits and as finished gradients, in chunks of several sizes."""
    chosen = {"default": None, "float32": torch.float32, "operands": dtype}[logits]
    options = {"options": LinearOptions(memory_budget, chosen)}
    problem = linear_problem(90, H, V, dtype, bias=True, softcap=4.0)
    if reduction == "mean":
        check(problem, backend, **options)
        return
    _, gradients = problem.ours(backend, reduction="none", **options)
    _, exact = problem.plain(torch.float64)
    _, plain = problem.plain(dtype)
    count = int((problem.labels != -100).sum())
    for ours, exact_mean, plain_mean in zip(gradients, exact, plain, strict=True):
        if dtype != torch.float16:  # a sum over tokens may overflow it
            assert_within_budget(ours, exact_mean * count, plain_mean * count)


class TestKeptLogits:
    def gemms(self, memory_budget: int, backend: str) -> float:
        n = 64
        hidden = torch.randn(n, H, requires_grad=True)
        weight = torch.randn(V, H, requires_grad=True)
        labels = torch.randint(0, V, (n,))
        with GemmCounter() as counter:
            linear_target_log_odds(
                hidden,
                weight,
                labels,
                options=LinearOptions(memory_budget=memory_budget),
                backend=backend,
            ).sum().backward()
        return _gemms(counter.flops, n)

    def test_spare_the_projection_where_the_budget_has_room(self, backend: str) -> None:
        assert self.gemms(1 << 20, backend) == 4.0
        assert 3.0 < self.gemms(1 << 30, backend) < 3.3

    @pytest.mark.parametrize("frozen", [False, True])
    def test_give_the_same_gradients(self, backend: str, dtype: torch.dtype, frozen: bool) -> None:
        """Bitwise where the cut is the same, whichever rows the backward needs."""
        hidden, weight = torch.randn(50, H).to(dtype), torch.randn(V, H).to(dtype)
        labels = torch.randint(0, V, (50,))
        labels[::7] = -100
        upstream = torch.randn(50)
        upstream[::3] = 0
        results = []
        for keep in (True, False):
            inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
            with pytest.MonkeyPatch.context() as patch:
                if not keep:
                    patch.setattr(SavedBeside, "place", lambda *_: None)
                hidden_, weight_ = inputs
                d = linear_target_log_odds(
                    hidden_,
                    weight_,
                    labels,
                    options=LinearOptions(memory_budget=1 << 30),
                    backend=backend,
                )
                d.backward(upstream)
            results.append([x.grad for x in inputs])
        for kept, projected in zip(*results, strict=True):
            assert (kept is None) == (projected is None)
            if kept is not None and projected is not None:
                tolerance = 4 * torch.finfo(dtype).eps * projected.abs().amax()
                assert (kept - projected).abs().amax() <= tolerance


class TestSkippedRows:
    @pytest.mark.parametrize("logits_dtype", [None, torch.float32])
    def test_zero_slopes_cost_no_gradient_gemm(
        self, backend: str, dtype: torch.dtype, logits_dtype: torch.dtype | None
    ) -> None:
        """Labels that the model is certain of: every second row has a slope of exactly 0."""
        n = 96
        hidden = torch.zeros(n, H)
        hidden[:, 0] = torch.where(torch.arange(n) % 2 == 0, 400.0, 0.0)
        hidden[:, 1:] = 0.1 * torch.randn(n, H - 1)
        weight = 0.1 * torch.randn(V, H)
        weight[:, 0], weight[7, 0] = 0.0, 1.0
        labels = torch.where(torch.arange(n) % 2 == 0, 7, torch.randint(8, V, (n,)))
        for frozen in (False, True):
            inputs = [hidden.to(dtype).requires_grad_(), weight.to(dtype)]
            inputs[1].requires_grad_(not frozen)
            with GemmCounter() as counter:
                loss = linear_objective_loss(
                    inputs[0],
                    inputs[1],
                    labels,
                    "cross_entropy",
                    options=LinearOptions(logits_dtype=logits_dtype),
                    backend=backend,
                )
                loss.backward()
            expected = 1 + 0.5 * (1 if frozen else 2)
            # Rows kept as finished gradients are projected once; others a second time, by half.
            assert expected <= _gemms(counter.flops, n) <= expected + 0.51
            gradient = inputs[0].grad
            assert gradient is not None
            assert (gradient[::2] == 0).all()
            assert (gradient[1::2] != 0).any(1).all()

    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_skip_below_is_within_its_bound(
        self, backend: str, frozen: bool, reduction: str
    ) -> None:
        n, skip = 200, 0.3
        hidden, weight = torch.randn(n, H), torch.randn(V, H)
        labels = torch.randint(0, V, (n,))

        def gradients(skip_below: float) -> list[Tensor]:
            inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
            loss = linear_unilogit_loss(
                inputs[0],
                inputs[1],
                labels,
                reduction=reduction,
                options=LinearOptions(skip_below=skip_below),
                backend=backend,
            )
            return list(torch.autograd.grad(loss.sum(), [x for x in inputs if x.requires_grad]))

        exact, skipped = gradients(0.0), gradients(skip)
        d = linear_target_log_odds(hidden, weight, labels, backend=backend)
        slope = objectives.UnilogitReverse().slope(d, V) / (n if reduction == "mean" else 1)
        largest = slope.abs().amax()
        zero = (skipped[0] == 0).all(1)
        assert 0 < zero.sum() < n
        assert (slope[zero].abs() < skip * largest).all()
        reduced = "sum" if reduction == "none" else "mean"

        def by_plain_torch(dtype: torch.dtype) -> Tensor:
            x = hidden.to(dtype).requires_grad_()
            loss = reference.unilogit_loss(F.linear(x, weight.to(dtype)), labels, reduction=reduced)
            return torch.autograd.grad(loss, x)[0][~zero]

        literal = by_plain_torch(torch.float64), by_plain_torch(torch.float32)
        assert_within_budget(skipped[0][~zero], *literal)
        bound = 2 * skip * largest * weight.norm(dim=1).amax()
        assert (exact[0] - skipped[0]).norm(dim=1).amax() <= bound
        if not frozen:
            bound = 2**0.5 * skip * largest * hidden[zero].norm(dim=1).sum()
            assert (exact[1] - skipped[1]).norm() <= bound

    def test_nan_is_never_skipped(self, backend: str) -> None:
        hidden = torch.randn(20, H)
        hidden[3] = torch.nan
        inputs = hidden.requires_grad_(), torch.randn(V, H, requires_grad=True)
        loss = linear_unilogit_loss(
            *inputs, torch.arange(20), options=LinearOptions(skip_below=0.5), backend=backend
        )
        loss.backward()
        assert loss.isnan()
        assert inputs[0].grad is not None
        assert inputs[0].grad[3].isnan().all()


class TestWithoutCompaction:
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_same_results(
        self, backend: str, dtype: torch.dtype, reduction: str, frozen: bool
    ) -> None:
        """Ignored rows go through every GEMM, and even NaN in them changes nothing."""
        hidden, weight = torch.randn(60, H).to(dtype), torch.randn(V, H).to(dtype)
        labels = torch.randint(0, V, (60,))
        labels[::3] = -100
        hidden[::3] = torch.nan
        counted = labels >= 0

        def literal(dtype: torch.dtype) -> list[Tensor]:
            """The loss's terms and the gradients, of the rows that count alone."""
            inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
            logits = F.linear(inputs[0][counted], inputs[1])
            logits = logits.to(torch.promote_types(dtype, torch.float32))
            terms = reference.unilogit_loss(logits, labels[counted], reduction="none")
            if reduction == "mean":
                terms = terms / len(terms)
            return [terms, *torch.autograd.grad(terms.sum(), inputs[: 1 if frozen else 2])]

        exact, plain = literal(torch.float64), literal(dtype)
        for compact in (True, False):
            inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
            loss = linear_unilogit_loss(
                inputs[0],
                inputs[1],
                labels,
                reduction=reduction,
                options=LinearOptions(compact=compact),
                backend=backend,
            )
            wanted = [x for x in inputs if x.requires_grad]
            gradients = torch.autograd.grad(loss.sum(), wanted)
            if reduction == "mean":
                assert_sum_within_budget(loss, exact[0], plain[0])
            else:
                assert_within_budget(loss[counted], exact[0], plain[0], smallest_scale=1.0)
                assert (loss[~counted] == 0).all()
            for found, true, of_torch in zip(gradients, exact[1:], plain[1:], strict=True):
                assert_within_budget(found, true, of_torch)
            assert (gradients[0][::3] == 0).all()

    def test_asks_for_no_number_on_the_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What would synchronise a GPU is not called: nonzero, item, index by a mask."""
        synchronising = {"nonzero", "_local_scalar_dense", "item", "masked_select", "is_nonzero"}
        seen: set[str] = set()

        class Watch(AllocationGuard):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
            ) -> Any:
                seen.add(func._schema.name.split("::")[1])
                return super().__torch_dispatch__(func, types, args, kwargs)

        hidden = torch.randn(30, H, requires_grad=True)
        weight = torch.randn(V, H, requires_grad=True)
        labels = torch.randint(0, V, (30,))
        # These two look at numbers on CPU only, where they are at hand.
        monkeypatch.setattr("unilogit_kernels.ops.arguments.check_label_range", lambda *_: None)
        monkeypatch.setattr("unilogit_kernels.ops.scaling._has_values", lambda *_: False)
        for reduction in ("mean", "none"):
            for frozen in (False, True):
                weight.requires_grad_(not frozen)
                with Watch():
                    loss = linear_unilogit_loss(
                        hidden,
                        weight,
                        labels,
                        reduction=reduction,
                        options=LinearOptions(compact=False),
                        backend="eager",
                    )
                    loss.sum().backward()
        assert {"mm", "scatter_"} <= seen
        assert not synchronising & seen


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_logits_dtype_reproduces_rounded_logits(backend: str, half: torch.dtype) -> None:
    """As an eager Hugging Face model: logits in the model's dtype, then float32 statistics."""
    hidden, weight = torch.randn(40, H).to(half), torch.randn(V, H).to(half)
    labels = torch.randint(0, V, (40,))
    rounded = F.linear(hidden.float(), weight.float()).to(half)
    d = linear_target_log_odds(
        hidden, weight, labels, options=LinearOptions(logits_dtype=half), backend=backend
    )
    exact = reference.target_log_odds(rounded.double(), labels)
    assert_within_budget(d, exact, reference.target_log_odds(rounded.float(), labels))
    wide = linear_target_log_odds(
        hidden, weight, labels, options=LinearOptions(logits_dtype=torch.float32)
    )
    exact = reference.target_log_odds(F.linear(hidden.double(), weight.double()), labels)
    plain = reference.target_log_odds(F.linear(hidden.float(), weight.float()), labels)
    assert_within_budget(wide, exact, plain)


@pytest.mark.parametrize("objective", ["unilogit", "cross_entropy"])
def test_forward_and_backward_see_the_same_logits(backend: str, objective: str) -> None:
    """Gradient rows sum to 0 only if the backward's logits are those of the statistics.

    A hidden state that is 1 in one place makes the weight's gradient there the row's own sum.
    """
    n = 48
    hidden = torch.randn(n, H).to(torch.bfloat16)
    hidden[:, 0] = 1
    weight = (3 * torch.randn(V, H)).to(torch.bfloat16)
    labels = torch.randint(0, V, (n,))
    for logits_dtype in (None, torch.bfloat16, torch.float32):
        for reduction in ("mean", "none"):
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = linear_objective_loss(
                x,
                w,
                labels,
                objective,
                options=LinearOptions(logits_dtype=logits_dtype),
                reduction=reduction,
                backend=backend,
            )
            (gradient,) = torch.autograd.grad(loss.sum(), w)
            column = gradient[:, 0].double()
            assert column.sum().abs() <= 2**-8 * column.abs().sum()


class TestErrors:
    def loss(self, **options: Any) -> Tensor:
        return linear_unilogit_loss(
            torch.randn(2, 4),
            torch.randn(9, 4),
            torch.arange(2),
            options=LinearOptions(**options),
        )

    def test_messages_say_what_was_given_and_expected(self) -> None:
        with pytest.raises(ValueError, match=r"memory_budget is in bytes, at least .* got 64"):
            self.loss(memory_budget=64)
        with pytest.raises(ValueError, match=r"skip_below must be in \[0, 1\), got 1.5"):
            self.loss(skip_below=1.5)
        with pytest.raises(TypeError, match=r"logits_dtype must be .* got torch.bfloat16"):
            self.loss(logits_dtype=torch.bfloat16)

    def test_the_module_takes_them_too(self) -> None:
        module = LinearUnilogitLoss(
            options=LinearOptions(memory_budget=1 << 20, skip_below=0.1), direction="forward"
        )
        assert "memory_budget=1048576" in repr(module)
        assert "skip_below=0.1" in repr(module)
        assert "direction='forward'" in repr(module)
        assert module(torch.randn(3, 4), torch.randn(9, 4), torch.arange(3)).isfinite()


def test_options_reach_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LinearOptions] = []
    original = plan_linear

    def spy(shape: Any, options: LinearOptions, **more: Any) -> Plan:
        seen.append(options)
        return original(shape, options, **more)

    monkeypatch.setattr(compaction, "plan_linear", spy)
    linear_unilogit_loss(
        torch.randn(20, H),
        torch.randn(V, H),
        torch.arange(20),
        options=LinearOptions(memory_budget=3 << 20),
    )
    assert seen == [LinearOptions(memory_budget=3 << 20)]
