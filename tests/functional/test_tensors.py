"""Strides, dtypes, frozen operands, autograd and repeatability (CASES 22 to 29)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.support.problems import check, linear_problem, logits_problem
from unilogit_kernels import linear_unilogit_loss, reference, unilogit_loss
from unilogit_kernels.testing import AllocationGuard, assert_within_budget

LAYOUTS = ["shifted", "inner stride 2", "transposed", "odd offset", "expanded"]


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    n, v = values.shape
    if layout == "shifted":  # logits[:, :-1] of a longer row
        holder = values.new_full((n, v + 3), torch.nan)
        view = holder[:, :v]
    elif layout == "inner stride 2":
        view = values.new_full((n, 2 * v), torch.nan)[:, ::2]
    elif layout == "transposed":
        view = values.new_full((v, n), torch.nan).t()
    elif layout == "odd offset":
        view = values.new_full((n * v + 1,), torch.nan)[1:].view(n, v)
    else:
        return values[:1].expand(n, v)
    return view.copy_(values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_any_strides(backend: str, dtype: torch.dtype, layout: str) -> None:
    problem = logits_problem(6, 203, dtype)
    logits = _laid_out(problem.operands[0], layout)
    check(problem.__class__((logits,), problem.labels), backend)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_hidden_and_weight_of_any_strides(backend: str, dtype: torch.dtype, layout: str) -> None:
    problem = linear_problem(6, 12, 203, dtype)
    hidden, weight = (_laid_out(x, layout) for x in problem.operands)
    check(problem.__class__((hidden, weight), problem.labels), backend)


def test_causal_slice_is_not_copied(backend: str) -> None:
    """logits[:, :-1] enters as it is: nothing of its size is allocated for a loss without grad."""
    logits = torch.randn(2, 9, 5000)[:, :-1]
    with AllocationGuard() as guard, torch.no_grad():
        unilogit_loss(logits[0], torch.arange(8), backend=backend)
    if backend != "eager":
        assert guard.largest < logits[0].numel()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_operands(backend: str, dtype: torch.dtype, frozen: str, reduction: str) -> None:
    """A frozen operand changes nothing for the others, and its gradient is never allocated."""
    problem = linear_problem(40, 8, 1200, dtype, bias=True)
    names = ("hidden", "weight", "bias")
    wanted = [not (name == frozen or (frozen == "both" and name != "bias")) for name in names]
    inputs = [
        x.detach().requires_grad_(want) for x, want in zip(problem.operands, wanted, strict=True)
    ]
    hidden, weight, bias = inputs
    with AllocationGuard() as guard:
        loss = linear_unilogit_loss(
            hidden, weight, problem.labels, bias=bias, reduction=reduction, backend=backend
        )
        got = torch.autograd.grad(loss.sum(), [x for x in inputs if x.requires_grad])
    if not wanted[1]:
        assert guard.largest < 40 * 1200
    summed = replace(problem, options={"reduction": "sum" if reduction == "none" else "mean"})
    _, exact = summed.plain(torch.float64)
    _, plain = summed.plain(dtype)
    found = iter(got)
    for name, want, exact_one, plain_one in zip(names, wanted, exact, plain, strict=True):
        if want:
            assert_within_budget(next(found), exact_one, plain_one, f"gradient of {name}")


def test_nothing_wanted_nothing_saved(backend: str) -> None:
    hidden, weight = torch.randn(7, 8), torch.randn(90, 8)
    labels = torch.arange(7)
    loss = linear_unilogit_loss(hidden, weight, labels, backend=backend)
    assert not loss.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            other = linear_unilogit_loss(
                hidden.clone().requires_grad_(), weight, labels, backend=backend
            )
        assert not other.requires_grad
        # Without gradients the statistics run in vocabulary order alone, in the same arithmetic.
        assert torch.equal(loss, other)


def test_tied_embedding(backend: str) -> None:
    """A weight that is also an operand elsewhere collects both gradients."""
    table = torch.randn(50, 8, requires_grad=True)
    tokens, labels = torch.tensor([3, 4, 5]), torch.tensor([4, 5, 6])
    loss = linear_unilogit_loss(F.embedding(tokens, table), table, labels, backend=backend)
    (gradient,) = torch.autograd.grad(loss, table)

    def by_plain_torch(dtype: torch.dtype) -> Tensor:
        leaf = table.detach().to(dtype).requires_grad_()
        logits = F.linear(F.embedding(tokens, leaf), leaf)
        return torch.autograd.grad(reference.unilogit_loss(logits, labels), leaf)[0]

    assert_within_budget(gradient, by_plain_torch(torch.float64), by_plain_torch(torch.float32))


def test_inputs_are_never_written(backend: str, dtype: torch.dtype) -> None:
    problem = linear_problem(6, 12, 203, dtype, bias=True)
    logits = logits_problem(6, 203, dtype)
    before = [x.clone() for x in (*problem.operands, *logits.operands)]
    problem.ours(backend)
    problem.ours(backend, reduction="none")
    logits.ours(backend)
    for x, copy in zip((*problem.operands, *logits.operands), before, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize("factor", [1.0, -3.0])
@pytest.mark.parametrize("entry", ["logits", "linear"])
def test_backward_twice_is_equal(
    backend: str, dtype: torch.dtype, entry: str, factor: float
) -> None:
    linear = entry == "linear"
    problem = linear_problem(6, 12, 203, dtype) if linear else logits_problem(6, 203, dtype)
    inputs = [x.requires_grad_() for x in problem.operands]
    function: Any = linear_unilogit_loss if linear else unilogit_loss
    loss = factor * function(*inputs, problem.labels, backend=backend)

    def gradients() -> list[Tensor]:
        return [x.grad.clone() for x in inputs if x.grad is not None]

    loss.backward(retain_graph=True)
    first = gradients()
    for x in inputs:
        x.grad = None
    loss.backward(retain_graph=True)
    assert all(map(torch.equal, gradients(), first))
    loss.backward()  # accumulates into .grad, which must not be the saved gradient itself
    assert all(map(torch.equal, gradients(), [g + g for g in first]))


@pytest.mark.parametrize("entry", ["logits", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(backend: str, entry: str, reduction: str) -> None:
    """The eager backend supports it; the others say that it does."""
    labels = torch.tensor([1, 2, -100, 5])
    if entry == "logits":
        inputs = [torch.randn(4, 11)]
        function: Any = unilogit_loss
    else:
        inputs = [torch.randn(4, 3), torch.randn(11, 3)]
        function = linear_unilogit_loss
    if backend == "eager":
        inputs = [x.double().requires_grad_() for x in inputs]

        def loss(*operands: Tensor) -> Tensor:
            losses: Tensor = function(*operands, labels, softcap=3.0, reduction=reduction)
            return losses.sum()

        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)
        return
    inputs = [x.requires_grad_() for x in inputs]
    value = function(*inputs, labels, reduction=reduction, backend=backend).sum()
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="backend='eager'"):
            torch.autograd.grad(gradient.sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend: str, use_reentrant: bool) -> None:
    problem = linear_problem(6, 12, 203, torch.float32)
    expected, gradients = problem.ours(backend)
    hidden, weight = (x.detach().requires_grad_() for x in problem.operands)

    def run(h: Tensor, w: Tensor) -> Tensor:
        return linear_unilogit_loss(h, w, problem.labels, backend=backend)

    loss = checkpoint(run, hidden, weight, use_reentrant=use_reentrant)
    assert torch.equal(loss, expected)
    again = torch.autograd.grad(loss, (hidden, weight)) if not use_reentrant else None
    if again is None:
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        again = hidden.grad, weight.grad
    assert all(map(torch.equal, again, gradients))


def test_autocast_casts_both_and_returns_each_dtype(backend: str) -> None:
    problem = linear_problem(6, 12, 203, torch.float32, bias=True)
    hidden = problem.operands[0].bfloat16().requires_grad_()
    weight, bias = (x.detach().requires_grad_() for x in problem.operands[1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_unilogit_loss(hidden, weight, problem.labels, bias=bias, backend=backend)
        with torch.autocast("cpu", enabled=False):
            inner = linear_unilogit_loss(
                hidden.float(), weight, problem.labels, bias=bias, backend=backend
            )
    loss.backward()
    dtypes = [x.grad.dtype for x in (hidden, weight, bias) if x.grad is not None]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
    same = linear_unilogit_loss(
        hidden, weight.bfloat16(), problem.labels, bias=bias.bfloat16(), backend=backend
    )
    assert torch.equal(loss, same)
    exact = linear_unilogit_loss(hidden.float(), weight, problem.labels, bias=bias, backend=backend)
    assert torch.equal(inner, exact)


def test_two_runs_are_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    problems = [linear_problem(37, 24, 5003, dtype, bias=True), logits_problem(37, 5003, dtype)]
    for problem in problems:
        loss, gradients = problem.ours(backend)
        again, gradients_again = problem.ours(backend)
        assert torch.equal(loss, again)
        assert all(map(torch.equal, gradients, gradients_again))


def test_float16_rows_keep_what_the_mean_would_flush(backend: str) -> None:
    """1/N times a small slope is below float16's range; the rows must not be stored with it."""
    n, v = 64, 64
    logits = torch.randn(n, v).half().requires_grad_()
    labels = torch.arange(n)
    scale = 2.0**12
    loss = scale * unilogit_loss(logits, labels, num_items_in_batch=int(scale), backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact_logits = logits.detach().double().requires_grad_()
    exact = unilogit_loss(exact_logits, labels, reduction="sum")
    (exact_gradient,) = torch.autograd.grad(exact, exact_logits)
    assert_within_budget(gradient, exact_gradient, exact_gradient.half())
