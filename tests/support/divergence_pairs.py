"""Two models' operands, and their divergence three ways: ours, plain torch, and in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels import Mask, Shift, Uniform, kl_loss, linear_kl_loss, reference
from unilogit_kernels.maths.rewrites import Rewrite
from unilogit_kernels.testing import assert_sum_within_budget, assert_within_budget

DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"direction": "reverse"},
    "forward shift": {"rewrite": Shift(3.0)},
    "reverse shift": {"rewrite": Shift(3.0), "direction": "reverse"},
    "forward uniform": {"rewrite": Uniform()},
    "reverse uniform": {"rewrite": Uniform(), "direction": "reverse"},
    "forward mask": {"rewrite": Mask()},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.5},
    "softcaps": {"softcap": 3.0, "ref_softcap": 5.0, "temperature": 0.7},
    "scales": {"logit_scale": 0.25, "ref_logit_scale": -1.5},
    "padded vocabulary": {"vocab_size": 480},
    "sum": {"reduction": "sum"},
    "items": {"num_items_in_batch": 31},
}


@dataclass(frozen=True)
class Pair:
    """A loss and its operands: both models' logits, or heads as (hidden, weight[, bias])."""

    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]
    labels: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def loss(self, student: tuple[Tensor, ...], backend: str, **more: Any) -> Tensor:
        options: dict[str, Any] = {**self.options, **more, "backend": backend}
        if len(student) == 1:
            return kl_loss(student[0], self.teacher[0], self.labels, **options)
        biases = [
            operands[2] if len(operands) > 2 else None for operands in (student, self.teacher)
        ]
        return linear_kl_loss(
            student[0],
            student[1],
            self.teacher[0],
            self.teacher[1],
            self.labels,
            bias=biases[0],
            ref_bias=biases[1],
            **options,
        )

    def ours(self, backend: str, **more: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = tuple(x.detach().requires_grad_() for x in self.student)
        loss = self.loss(inputs, backend, **more)
        return loss, torch.autograd.grad(loss.sum(), inputs)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Losses per token, and gradients of the reduced loss, by plain torch.

        Operands in `dtype`, logits upcast to at least float32.
        """
        inputs = tuple(x.detach().to(dtype).requires_grad_() for x in self.student)
        teacher = tuple(x.to(dtype) for x in self.teacher)
        losses, loss = plain_loss(
            logits_of(inputs), logits_of(teacher), self.labels, **self.options
        )
        return losses, torch.autograd.grad(loss, inputs)


def logits_of(operands: tuple[Tensor, ...]) -> Tensor:
    logits = F.linear(*operands) if len(operands) > 1 else operands[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def plain_loss(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None,
    *,
    rewrite: Rewrite | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    num_items_in_batch: int | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted losses per token, and the reduced loss."""
    valid = torch.ones(logits.shape[0], dtype=torch.bool) if labels is None else labels != -100
    losses = reference.kl_divergence(
        reference.transform_logits(
            logits[valid], softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size
        ),
        reference.transform_logits(
            ref_logits[valid],
            softcap=ref_softcap,
            logit_scale=ref_logit_scale,
            vocab_size=vocab_size,
        ),
        None if labels is None else labels[valid],
        rewrite=rewrite,
        direction=direction,
        temperature=temperature,
    )
    if token_weights is not None:
        losses = losses * token_weights[valid].to(losses.dtype)
    total = losses.sum()
    if reduction != "sum":
        total = total / (num_items_in_batch or int(valid.sum()))
    return torch.zeros(valid.shape, dtype=losses.dtype).masked_scatter(valid, losses), total


def labels_for(n: int, v: int) -> Tensor:
    labels = torch.randint(0, v, (n,))
    labels[3::5] = -100
    return labels


def logits_pair(n: int, v: int, dtype: torch.dtype, **options: Any) -> Pair:
    student = 3 * torch.randn(n, v)
    teacher = student + torch.randn(n, v)
    labels = labels_for(n, options.get("vocab_size") or v)
    return Pair((student.to(dtype),), (teacher.to(dtype),), labels, options)


def linear_pair(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    *,
    ref_h: int = 13,
    bias: bool = True,
    **options: Any,
) -> Pair:
    def head(h: int) -> tuple[Tensor, ...]:
        operands = [torch.randn(n, h), 3 / h**0.5 * torch.randn(v, h), torch.randn(v)]
        return tuple(x.to(dtype) for x in operands[: 3 if bias else 2])

    labels = labels_for(n, options.get("vocab_size") or v)
    return Pair(head(h), head(ref_h), labels, options)


def check(pair: Pair, backend: str, **more: Any) -> None:
    """Assert that losses and gradients are within the error budget.

    Losses token by token, and their sum. Gradients as a whole: p - q cancels, so that a row's own
    error is a matter of luck for plain torch too.
    """
    dtype = pair.student[0].dtype
    loss, gradients = pair.ours(backend, **more)
    exact_losses, exact = pair.plain(torch.float64)
    plain_losses, plain = pair.plain(dtype)
    apart = {"reduction": "none", "num_items_in_batch": None}
    losses = pair.loss(pair.student, backend, **{**more, **apart})
    assert loss.dtype == losses.dtype == torch.promote_types(dtype, torch.float32)
    assert_within_budget(losses, exact_losses, plain_losses, "losses", smallest_scale=1.0)
    valid = len(losses) if pair.labels is None else int((pair.labels != -100).sum())
    items = pair.options.get("num_items_in_batch") or valid
    items = 1 if pair.options.get("reduction") == "sum" else items
    assert_sum_within_budget(loss, exact_losses / items, plain_losses / items, "loss")
    for i, ours in enumerate(gradients):
        assert ours.dtype == dtype
        check_gradient(ours, exact[i], plain[i], f"gradient {i}")


def check_gradient(ours: Tensor, exact: Tensor, plain: Tensor, what: str = "gradient") -> None:
    """Within the error budget, all entries together."""
    assert_within_budget(ours.flatten(), exact.flatten(), plain.flatten(), what)
