"""Losses of two models inside autograd's machinery: who gets a gradient, twice, compiled, cast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from divergence_pairs import DIVERGENCES, Pair, linear_pair, logits_pair
from torch import Tensor

from unilogit_kernels import Shift, kl_loss, linear_kl_loss


def test_one_head_for_both_models(two_row_backend: str) -> None:
    """A tied or frozen-and-shared lm_head: the teacher's use of it adds no gradient."""
    weight = torch.randn(90, 8, requires_grad=True)
    hidden, ref_hidden = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(6, 8, requires_grad=True),
    )
    loss = linear_kl_loss(hidden, weight, ref_hidden, weight, backend=two_row_backend)
    loss.backward()
    copy = weight.detach().clone().requires_grad_()
    apart = linear_kl_loss(hidden, copy, ref_hidden, weight.detach(), backend=two_row_backend)
    (expected,) = torch.autograd.grad(apart, copy)
    assert ref_hidden.grad is None
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


def test_the_teacher_never_gets_a_gradient(two_row_backend: str) -> None:
    logits, ref_logits = (
        torch.randn(4, 50, requires_grad=True),
        torch.randn(4, 50, requires_grad=True),
    )
    kl_loss(logits, ref_logits, backend=two_row_backend).backward()
    assert ref_logits.grad is None
    assert logits.grad is not None
    assert not kl_loss(logits.detach(), ref_logits, backend=two_row_backend).requires_grad


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_double_backward_in_float64(divergence: dict[str, Any]) -> None:
    for pair in (
        logits_pair(4, 9, torch.float64, **divergence),
        linear_pair(4, 3, 9, torch.float64, **divergence),
    ):
        inputs = tuple(x.requires_grad_() for x in pair.student)
        for reduction in ("mean", "none"):

            def loss(*x: Tensor, pair: Pair = pair, reduction: str = reduction) -> Tensor:
                return pair.loss(x, "eager", reduction=reduction)

            assert torch.autograd.gradcheck(loss, inputs)
            assert torch.autograd.gradgradcheck(loss, inputs)


def test_repeatable_and_backward_twice(two_row_backend: str) -> None:
    pair = linear_pair(40, 16, 500, torch.bfloat16, rewrite=Shift(1.0))
    first, second = pair.ours(two_row_backend), pair.ours(two_row_backend)
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))
    inputs = tuple(x.detach().requires_grad_() for x in pair.student)
    loss = pair.loss(inputs, two_row_backend)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, once, again))


def test_inputs_are_never_written_to(two_row_backend: str) -> None:
    for pair in (logits_pair(9, 99, torch.float32), linear_pair(9, 24, 99, torch.float32)):
        operands = (*pair.student, *pair.teacher)
        before = [x.clone() for x in operands]
        pair.ours(two_row_backend)
        assert all(map(torch.equal, before, operands))


def test_double_backward_elsewhere_says_so(two_row_backend: str) -> None:
    if two_row_backend == "eager":
        pytest.skip("which supports it")
    for pair in (logits_pair(3, 9, torch.float32), linear_pair(3, 4, 9, torch.float32)):
        inputs = tuple(x.requires_grad_() for x in pair.student)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(pair.loss(inputs, two_row_backend), inputs, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_breaks(two_row_backend: str, reduction: str) -> None:
    torch._dynamo.reset()  # each backend compiles the same function again, and there is a limit
    for pair in (logits_pair(9, 99, torch.float32), linear_pair(9, 8, 99, torch.float32)):
        weighted = replace(pair, options={"reduction": reduction, "rewrite": Shift(2.0)})

        def step(*inputs: Tensor, pair: Pair = weighted) -> Tensor:
            return pair.loss(inputs, two_row_backend).sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        inputs = tuple(x.detach().requires_grad_() for x in pair.student)
        expected = torch.autograd.grad(step(*inputs), inputs)
        found = torch.autograd.grad(compiled(*inputs), inputs)
        assert all(map(torch.allclose, found, expected))


def test_operators_are_registered_correctly() -> None:
    logits, ref_logits = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
    pair = (torch.arange(3), 1.0, 0.0, 1.0, 0.0, 9, "forward", "shift", [2.0], "eager")
    options = (0, 0.0, True, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.unilogit_kernels.divergence, (logits, ref_logits, *pair), test_utils=tests
    )
    heads = (torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True), None)
    teacher = (torch.randn(3, 5), torch.randn(9, 5), torch.randn(9))
    torch.library.opcheck(
        torch.ops.unilogit_kernels.linear_divergence,
        (*heads, *teacher, torch.tensor([True, False, True]), *pair, *options, True),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.unilogit_kernels.linear_divergence_loss,
        (*heads, *teacher, *pair, torch.rand(3), torch.ones(()), *options, True, True, False),
        test_utils=tests,
    )


def test_autocast(two_row_backend: str) -> None:
    """Each operand's gradient returns in its own dtype; the teacher is cast like the student."""
    hidden = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    ref_hidden, ref_weight = torch.randn(6, 8), torch.randn(50, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_kl_loss(hidden, weight, ref_hidden, ref_weight, backend=two_row_backend)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(TypeError, match="ref_weight must have ref_hidden's dtype"):
        linear_kl_loss(hidden, weight.bfloat16(), ref_hidden, ref_weight, backend=two_row_backend)
