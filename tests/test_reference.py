"""The oracle itself, against the paper's statements and a loop in Python."""

from __future__ import annotations

import math

import pytest
import torch

from unilogit_kernels import reference
from unilogit_kernels.objectives import REGISTRY


def test_target_gives_the_label_one_over_v_and_keeps_the_rest() -> None:
    logits, labels = torch.randn(5, 30, dtype=torch.float64) * 4, torch.randint(0, 30, (5,))
    p, q = logits.softmax(-1), reference.unilogit_target(logits, labels).softmax(-1)
    for row, label in enumerate(labels.tolist()):
        assert q[row, label].item() == pytest.approx(1 / 30, rel=1e-13)
        others = [j for j in range(30) if j != label]
        ratio = q[row, others] / p[row, others]
        assert torch.allclose(ratio, ratio[:1], rtol=1e-12)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_loss_is_the_kl_divergence(direction: str) -> None:
    logits, labels = torch.randn(2, 3, 7, dtype=torch.float64), torch.randint(0, 7, (2, 3))
    labels[0, 1] = -100
    losses = reference.unilogit_loss(logits, labels, direction=direction, reduction="none")
    for index in [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]:
        z, y = logits[index].tolist(), int(labels[index])
        total = sum(map(math.exp, z))
        p = [math.exp(x) / total for x in z]
        scale = (1 - 1 / 7) / (1 - p[y])
        q = [1 / 7 if j == y else scale * x for j, x in enumerate(p)]
        a, b = (p, q) if direction == "reverse" else (q, p)
        expected = sum(x * math.log(x / y_) for x, y_ in zip(a, b, strict=True))
        assert losses[index].item() == pytest.approx(expected, rel=1e-12)
    assert losses[0, 1] == 0
    mean = reference.unilogit_loss(logits, labels, direction=direction)
    assert mean.item() == pytest.approx(losses.sum().item() / 5)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_closed_form_in_the_log_odds(direction: str) -> None:
    """The KL over V entries is one over two, and the stop-gradient changes no first derivative."""
    logits = (torch.randn(6, 40, dtype=torch.float64) * 2).requires_grad_()
    labels = torch.randint(0, 40, (6,))
    literal = reference.unilogit_loss(logits, labels, direction=direction, reduction="sum")
    objective = REGISTRY["unilogit" if direction == "reverse" else "unilogit_forward"]()
    closed = objective(reference.target_log_odds(logits, labels), 40).sum()
    assert literal.item() == pytest.approx(closed.item(), rel=1e-12)
    a, b = (torch.autograd.grad(x, logits)[0] for x in (literal, closed))
    assert (a - b).abs().max() <= 1e-13 * a.abs().max()


def test_twice_differentiable() -> None:
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 4])
    assert torch.autograd.gradgradcheck(
        lambda x: reference.target_log_odds(x, labels, softcap=3.0, logit_scale=0.5), (logits,)
    )
    loss = reference.unilogit_loss(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    assert second.isfinite().all()


def test_order_of_scale_and_cap() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    z = reference.transform_logits(logits, softcap=2.0, logit_scale=3.0, vocab_size=2)
    assert torch.allclose(z, 2 * torch.tanh(torch.tensor([[3.0, 6.0]]) / 2))


def test_unknown_direction() -> None:
    with pytest.raises(ValueError, match="'reverse' or 'forward', got 'up'"):
        reference.unilogit_loss(torch.randn(1, 3), torch.tensor([0]), direction="up")
