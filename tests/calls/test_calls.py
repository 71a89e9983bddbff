"""Labels, weights, reductions, and the errors for what cannot be right (CASES 15 to 21)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.problems import check, linear_problem, logits_problem
from unilogit_kernels import (
    LinearUnilogitLoss,
    UnilogitLoss,
    linear_target_log_odds,
    linear_unilogit_loss,
    objective_loss,
    shift_labels,
    target_log_odds,
    unilogit_loss,
)
from unilogit_kernels.objectives import CrossEntropy
from unilogit_kernels.testing import assert_sum_within_budget


@pytest.mark.parametrize("entry", ["logits", "linear"])
class TestReductions:
    def problem(self, entry: str, dtype: torch.dtype, **options: Any) -> Any:
        if entry == "logits":
            return logits_problem(12, 301, dtype, **options)
        return linear_problem(12, 8, 301, dtype, **options)

    def test_sum(self, backend: str, dtype: torch.dtype, entry: str) -> None:
        check(self.problem(entry, dtype, reduction="sum"), backend)

    def test_token_weights_of_either_sign(
        self, backend: str, dtype: torch.dtype, entry: str
    ) -> None:
        weights = torch.randn(12)
        weights[2] = 0.0
        check(self.problem(entry, dtype, token_weights=weights), backend)

    @pytest.mark.parametrize("as_tensor", [False, True])
    def test_num_items_in_batch(
        self, backend: str, dtype: torch.dtype, entry: str, as_tensor: bool
    ) -> None:
        problem = self.problem(entry, dtype, num_items_in_batch=37)
        more = {"num_items_in_batch": torch.tensor(37)} if as_tensor else {}
        check(problem, backend, **more)

    def test_none_equals_sum_of_its_parts(
        self, backend: str, dtype: torch.dtype, entry: str
    ) -> None:
        problem = self.problem(entry, dtype)
        losses, _ = problem.ours(backend, reduction="none")
        total, _ = problem.ours(backend, reduction="sum")
        assert losses.shape == problem.labels.shape
        assert (losses[problem.labels == -100] == 0).all()
        terms = losses.detach().flatten()
        assert_sum_within_budget(total, terms.double(), terms, smallest_scale=len(terms))

    @pytest.mark.parametrize("upstream", ["random", "zero", "nan", "expanded", "strided"])
    def test_none_under_any_upstream(
        self, backend: str, dtype: torch.dtype, entry: str, upstream: str
    ) -> None:
        """The gradient of `none` under an upstream equals that of `sum` with it as weights."""
        problem = self.problem(entry, dtype)
        grads: Tensor = {
            "random": torch.randn(12),
            "zero": torch.zeros(12),
            "nan": torch.full((12,), math.nan),
            "expanded": torch.tensor(-2.5).expand(12),
            "strided": torch.randn(24)[::2],
        }[upstream]
        inputs = [x.detach().requires_grad_() for x in problem.operands]
        function: Any = unilogit_loss if entry == "logits" else linear_unilogit_loss
        losses = function(*inputs, problem.labels, reduction="none", backend=backend)
        gradients = torch.autograd.grad(losses, inputs, grads)
        ignored = problem.labels == -100
        assert (gradients[0][ignored] == 0).all()
        if upstream == "nan":
            assert gradients[0][~ignored].isnan().all()
        elif upstream == "zero":
            assert all((gradient == 0).all() for gradient in gradients)
        else:
            weights = grads.clone()
            _, expected = problem.ours(backend, reduction="sum", token_weights=weights)
            for ours, other in zip(gradients, expected, strict=True):
                rounding = 4 * torch.finfo(dtype).eps * other.abs().max()
                assert (ours - other).abs().max() <= rounding


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_ignored_rows_contribute_nothing_whatever_they_hold(
    backend: str, dtype: torch.dtype, reduction: str, poison: float
) -> None:
    labels = torch.tensor([3, 7, 5, 7, 1])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    clean = torch.randn(5, 200).to(dtype)
    hidden, weight = torch.randn(5, 8).to(dtype), torch.randn(200, 8).to(dtype)
    results = []
    for value in (0.0, poison):
        logits, states = clean.clone(), hidden.clone()
        logits[1:4], states[1:4] = value, value  # 7 is ignored, 5 has weight 0
        inputs = [x.requires_grad_() for x in (logits, states, weight.clone())]
        of_logits, of_states, of_weight = inputs
        options: dict[str, Any] = {
            "ignore_index": 7,
            "token_weights": weights,
            "reduction": reduction,
            "backend": backend,
        }
        loss = unilogit_loss(of_logits, labels, **options).sum()
        loss = loss + linear_unilogit_loss(of_states, of_weight, labels, **options).sum()
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for with_zero, with_poison in zip(*results, strict=True):
        assert torch.equal(with_zero, with_poison)
        assert with_zero.isfinite().all()
    assert (results[1][1][1:4] == 0).all()
    assert (results[1][2][1:4] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 4])
def test_all_ignored_or_empty(backend: str, dtype: torch.dtype, reduction: str, n: int) -> None:
    labels = torch.full((n,), -100)
    logits = torch.randn(n, 50).to(dtype).requires_grad_()
    hidden = torch.randn(n, 8).to(dtype).requires_grad_()
    weight = torch.randn(50, 8).to(dtype).requires_grad_()
    bias = torch.randn(50).to(dtype).requires_grad_()
    options: dict[str, Any] = {"reduction": reduction, "backend": backend}
    by_logits = unilogit_loss(logits, labels, **options)
    by_linear = linear_unilogit_loss(hidden, weight, labels, bias=bias, **options)
    for loss, inputs in ((by_logits, [logits]), (by_linear, [hidden, weight, bias])):
        assert loss.shape == (labels.shape if reduction == "none" else ())
        assert (loss == 0).all()
        assert loss.requires_grad
        for x, gradient in zip(inputs, torch.autograd.grad(loss.sum(), inputs), strict=True):
            assert gradient.shape == x.shape
            assert gradient.dtype == x.dtype
            assert (gradient == 0).all()


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
def test_labels_of_either_width_at_any_alignment(backend: str, labels_dtype: torch.dtype) -> None:
    logits = torch.randn(6, 70)
    labels = torch.randint(0, 70, (6,))
    holder = torch.empty(13, dtype=labels_dtype)
    holder[1::2] = labels.to(labels_dtype)
    loss = unilogit_loss(logits, holder[1::2], backend=backend)
    assert loss.item() == unilogit_loss(logits, labels, backend=backend).item()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_leading_shape(backend: str, shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 40)
    hidden, weight = torch.randn(*shape, 8), torch.randn(40, 8)
    labels = torch.randint(0, 40, shape)
    flat = labels.reshape(-1)
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    loss = unilogit_loss(logits, labels, **options)
    expected = unilogit_loss(logits.reshape(-1, 40), flat, **options)
    assert torch.equal(loss, expected.reshape(shape))
    loss = linear_unilogit_loss(hidden, weight, labels, **options)
    expected = linear_unilogit_loss(hidden.reshape(-1, 8), weight, flat, **options)
    assert torch.equal(loss, expected.reshape(shape))
    assert target_log_odds(logits, labels, backend=backend).shape == shape
    assert linear_target_log_odds(hidden, weight, labels, backend=backend).shape == shape


def test_log_odds_at_ignored_positions_are_zero(backend: str) -> None:
    logits = torch.randn(3, 20)
    logits[1] = math.nan
    logits.requires_grad_()
    d = target_log_odds(logits, torch.tensor([1, -100, 2]), backend=backend)
    assert d[1] == 0
    (gradient,) = torch.autograd.grad(d.sum(), logits)
    assert (gradient[1] == 0).all()
    assert gradient.isfinite().all()


class TestObjectives:
    def test_name_instance_and_function_agree(self, backend: str) -> None:
        logits, labels = torch.randn(9, 80), torch.randint(0, 80, (9,))
        hidden, weight = torch.randn(9, 8), torch.randn(80, 8)
        from unilogit_kernels import linear_objective_loss

        def function(d: Tensor) -> Tensor:
            return torch.nn.functional.softplus(-d)

        def both(objective: Any) -> list[Tensor]:
            x, h, w = (t.clone().requires_grad_() for t in (logits, hidden, weight))
            loss = objective_loss(x, labels, objective, backend=backend)
            loss = loss + linear_objective_loss(h, w, labels, objective, backend=backend)
            return [loss, *torch.autograd.grad(loss, (x, h, w))]

        named = both("cross_entropy")
        for other in (CrossEntropy(), function):
            for a, b in zip(named, both(other), strict=True):
                assert (a - b).abs().max() <= 8 * torch.finfo(torch.float32).eps * b.abs().max()

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"objective 'npo2' is unknown.*cross_entropy"):
            objective_loss(torch.randn(2, 5), torch.tensor([0, 1]), "npo2")

    def test_not_an_objective(self) -> None:
        with pytest.raises(TypeError, match="objective must be a name"):
            objective_loss(torch.randn(2, 5), torch.tensor([0, 1]), 3)  # type: ignore[arg-type]

    def test_function_of_wrong_shape(self) -> None:
        with pytest.raises(ValueError, match=r"one loss per token, shape \[2\], got \[\]"):
            objective_loss(torch.randn(2, 5), torch.tensor([0, 1]), lambda d: d.sum())


def test_modules_are_the_functions(backend: str) -> None:
    logits, labels = torch.randn(5, 60), torch.tensor([1, 2, 3, 9, 4])
    hidden, weight, bias = torch.randn(5, 8), torch.randn(60, 8), torch.randn(60)
    options: dict[str, Any] = {
        "direction": "forward",
        "ignore_index": 9,
        "reduction": "sum",
        "softcap": 4.0,
        "logit_scale": 0.5,
        "vocab_size": 55,
        "backend": backend,
    }
    module = UnilogitLoss(**options)
    weights = torch.rand(5)
    assert torch.equal(
        module(logits, labels, token_weights=weights),
        unilogit_loss(logits, labels, token_weights=weights, **options),
    )
    assert torch.equal(
        LinearUnilogitLoss(**options)(hidden, weight, labels, bias=bias),
        linear_unilogit_loss(hidden, weight, labels, bias=bias, **options),
    )
    assert repr(UnilogitLoss()) == "UnilogitLoss()"
    assert "direction='forward'" in repr(module)


def test_shift_labels() -> None:
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert shift_labels(labels).tolist() == [[2, 3, -100], [5, 6, -100]]
    assert shift_labels(labels, ignore_index=0).tolist() == [[2, 3, 0], [5, 6, 0]]
    with pytest.raises(ValueError, match=r"shape \[\.\.\., T\]"):
        shift_labels(torch.tensor(1))


LOGITS, LABELS = torch.zeros(2, 5), torch.tensor([0, 1])
HIDDEN, WEIGHT = torch.zeros(2, 4), torch.zeros(5, 4)
MISTAKES: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "logits must be float32.*got torch.int64", (LOGITS.long(), LABELS), {}),
    (TypeError, "logits must be a tensor, got list", ([1.0], LABELS), {}),
    (TypeError, "labels must be an int64 or int32 tensor, got torch.float32",
     (LOGITS, LABELS.float()), {}),
    (ValueError, r"leading shape \[2\], got \[3\] for logits \[2, 5\]",
     (LOGITS, torch.tensor([0, 1, 2])), {}),
    (ValueError, "labels must be on logits's device cpu, got meta",
     (LOGITS, LABELS.to("meta")), {}),
    (ValueError, "reduction must be one of mean, sum, none, got 'avg'",
     (LOGITS, LABELS), {"reduction": "avg"}),
    (ValueError, "direction must be 'reverse' or 'forward', got 'both'",
     (LOGITS, LABELS), {"direction": "both"}),
    (ValueError, r"vocab_size must be between 2 and logits' last dimension \(5\), got 6",
     (LOGITS, LABELS), {"vocab_size": 6}),
    (ValueError, "vocab_size must be between 2", (LOGITS[:, :1], LABELS), {}),
    (ValueError, "softcap must be a positive finite number", (LOGITS, LABELS), {"softcap": 0.0}),
    (ValueError, "softcap must be a positive", (LOGITS, LABELS), {"softcap": math.nan}),
    (ValueError, "logit_scale must be a non-zero", (LOGITS, LABELS), {"logit_scale": 0.0}),
    (ValueError, r"token_weights must have the labels' shape \[2\], got \[2, 5\]",
     (LOGITS, LABELS), {"token_weights": LOGITS}),
    (TypeError, "token_weights must be a float or bool tensor, got torch.int64",
     (LOGITS, LABELS), {"token_weights": LABELS}),
    (ValueError, "no gradient flows to it",
     (LOGITS, LABELS), {"token_weights": torch.ones(2, requires_grad=True)}),
    (ValueError, "num_items_in_batch is the denominator of reduction='mean'",
     (LOGITS, LABELS), {"num_items_in_batch": 3, "reduction": "sum"}),
    (ValueError, "num_items_in_batch must be >= 0, got -1",
     (LOGITS, LABELS), {"num_items_in_batch": -1}),
    (ValueError, r"num_items_in_batch must hold one number, got shape \[2\]",
     (LOGITS, LABELS), {"num_items_in_batch": LABELS}),
    (ValueError, "backend must be one of .* got 'gpu'", (LOGITS, LABELS), {"backend": "gpu"}),
    (TypeError, r"ignore_index must be an int, .* got None",
     (LOGITS, LABELS), {"ignore_index": None}),
    (ValueError, r"H >= 1, the same H, got hidden \[2, 0\] and weight \[5, 0\]",
     (HIDDEN[:, :0], WEIGHT[:, :0], LABELS), {}),
    (IndexError, r"labels must be in \[0, 5\) or ignore_index, got 5 at flat position 1",
     (LOGITS, torch.tensor([0, 5])), {}),
    (IndexError, "got -1 at flat position 0", (LOGITS, torch.tensor([-1, 5])), {}),
    (ValueError, r"same H, got hidden \[2, 4\] and weight \[5, 3\]",
     (HIDDEN, WEIGHT[:, :3], LABELS), {}),
    (ValueError, r"bias must have shape \[V\] = \[5\], got \[4\]",
     (HIDDEN, WEIGHT, LABELS), {"bias": torch.zeros(4)}),
    (TypeError, "weight must have hidden's dtype torch.bfloat16 outside torch.autocast",
     (HIDDEN.bfloat16(), WEIGHT, LABELS), {}),
    (TypeError, "weight must be float32.*dequantise it first",
     (HIDDEN, WEIGHT.to(torch.int8), LABELS), {}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "args", "options"), MISTAKES)
def test_errors_name_what_was_given_and_what_was_expected(
    error: type[Exception], message: str, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    function = unilogit_loss if len(args) == 2 else linear_unilogit_loss
    with pytest.raises(error, match=message):
        function(*args, **options)
