"""The largest logit other than the label's, and the losses that are made of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels import (
    linear_runner_up,
    linear_target_log_odds,
    runner_up,
    target_log_odds,
)
from unilogit_kernels.testing import AllocationGuard, assert_within_budget


def literal(logits: Tensor, labels: Tensor) -> Tensor:
    valid = labels != -100
    others = logits.double().scatter(1, labels.clamp(min=0)[:, None], -math.inf)
    return torch.where(valid, others.argmax(1), -100)


@pytest.mark.parametrize("scale", [None, 2.0, -1.5])
@pytest.mark.parametrize("v", [2, 7, 40_001])
def test_against_argmax(dtype: torch.dtype, v: int, scale: float | None) -> None:
    logits, labels = torch.randn(40, v).to(dtype), torch.randint(0, v, (40,))
    labels[5] = -100
    expected = literal(logits.double() * (scale or 1.0), labels)
    found = runner_up(logits, labels, logit_scale=scale)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_linear_against_logits(dtype: torch.dtype, budget: int | None) -> None:
    hidden, weight = torch.randn(3, 13, 16).to(dtype), torch.randn(900, 16).to(dtype)
    bias, labels = torch.randn(900).to(dtype), torch.randint(0, 800, (3, 13))
    labels[1, 3:6] = -100
    logits = F.linear(hidden.double(), weight.double(), bias.double())[..., :800].flatten(0, 1)
    options: dict[str, Any] = {"memory_budget": budget, "vocab_size": 800}
    found = linear_runner_up(hidden, weight, labels, bias=bias, **options).flatten()
    expected = literal(logits, labels.flatten())
    valid = expected != -100
    assert torch.equal(found == -100, ~valid)
    # Logits of 16 bits have ties that exact ones do not.
    gap = (
        logits.gather(1, expected[:, None].clamp(min=0))
        - logits.gather(1, found[:, None].clamp(min=0))
    )[valid]
    rounding = torch.finfo(dtype).eps * logits.abs().max()
    assert (gap <= 2 * rounding).all()
    assert (found != labels.flatten())[valid].all()


def test_rows_without_another_token() -> None:
    logits = torch.full((3, 5), -math.inf)
    labels = torch.tensor([0, 4, 2])
    logits[2, 3] = math.nan
    found = runner_up(logits, labels)
    assert (found != labels).all()
    assert found[2] == 3


def inverted_hinge(logits: Tensor, labels: Tensor) -> Tensor:
    """Cha et al. 2024 (LoKU), arXiv 2408.06621: 1 + p(x_t) - max_{v != x_t} p(v)."""
    p = torch.softmax(logits, -1)
    others = p.scatter(1, labels[:, None], -1.0)
    return (1 + p.gather(1, labels[:, None])[:, 0] - others.amax(1)).mean()


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_inverted_hinge(backend: str, linear: bool) -> None:
    labels = torch.randint(0, 500, (20,))
    operands = [torch.randn(20, 24), 0.6 * torch.randn(500, 24)]
    operands = operands if linear else [operands[0] @ operands[1].t()]
    leaves = [x.clone().requires_grad_() for x in operands]
    find: Any = linear_runner_up if linear else runner_up
    log_odds: Any = linear_target_log_odds if linear else target_log_odds
    other = find(*leaves, labels)
    d, e = (log_odds(*leaves, y, backend=backend) for y in (labels, other))
    loss = (1 + torch.sigmoid(d) - torch.sigmoid(e)).mean()

    def plain(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = [x.to(dtype).requires_grad_() for x in operands]
        value = inverted_hinge(F.linear(*inputs) if linear else inputs[0], labels)
        return value, torch.autograd.grad(value, inputs)

    (exact, exact_gradients), (other_loss, others) = plain(torch.float64), plain(torch.float32)
    assert_within_budget(loss, exact, other_loss, "loss")
    for got, right, by_torch in zip(
        torch.autograd.grad(loss, leaves), exact_gradients, others, strict=True
    ):
        assert_within_budget(got.flatten(), right.flatten(), by_torch.flatten(), "gradient")


def test_no_logits_are_held() -> None:
    hidden, weight = torch.randn(64, 8), torch.randn(5000, 8)
    with AllocationGuard(forbidden_elements=64 * 5000):
        linear_runner_up(hidden, weight, torch.arange(64))
