"""Inputs, and the same loss three ways: ours, plain torch in the same dtype, float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import literal
from unilogit_kernels import LowRank, linear_objective_loss, objective_loss, reference
from unilogit_kernels.fused_linear.gemm import GemmDtypes
from unilogit_kernels.testing import assert_sum_within_budget, assert_within_budget

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.25},
    "softcap and scale": {"softcap": 5.0, "logit_scale": -1.5},
    "padded vocabulary": {"vocab_size": 480},
}

SCALE = 0.75
"""Of a low-rank term."""


@dataclass(frozen=True)
class Problem:
    """A loss and its operands: logits alone, or hidden, weight and perhaps bias."""

    operands: tuple[Tensor, ...]
    labels: Tensor
    objective: str = "unilogit"
    options: dict[str, Any] = field(default_factory=dict)
    adapter: tuple[Tensor, ...] = ()  # A and B of a low-rank term of scale `SCALE`, or nothing

    @property
    def linear(self) -> bool:
        return len(self.operands) > 1

    def ours(self, backend: str, **more: Any) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients by the package."""
        inputs, adapter = (
            [x.detach().requires_grad_() for x in part] for part in (self.operands, self.adapter)
        )
        options = {**self.options, **more, "backend": backend}
        if self.linear:
            hidden, weight, *bias = inputs
            loss = linear_objective_loss(
                hidden,
                weight,
                self.labels,
                self.objective,
                bias=bias[0] if bias else None,
                adapter=LowRank(adapter[0], adapter[1], SCALE) if adapter else None,
                **options,
            )
        else:
            loss = objective_loss(inputs[0], self.labels, self.objective, **options)
        return loss, list(torch.autograd.grad(loss.sum(), [*inputs, *adapter]))

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Terms of the loss, which sum to it, and gradients by plain torch.

        Operands in `dtype`, statistics as transformers does: the GEMM in the operands' dtype, its
        logits upcast to at least float32.
        """
        inputs, adapter = (
            [x.detach().to(dtype).requires_grad_() for x in part]
            for part in (self.operands, self.adapter)
        )
        logits = F.linear(*inputs) if self.linear else inputs[0]
        if adapter:
            a, b = adapter
            logits = logits + SCALE * F.linear(F.linear(inputs[0], a), b)
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        terms = plain_terms(logits, self.labels, self.objective, **self.options)
        return terms, list(torch.autograd.grad(terms.sum(), [*inputs, *adapter]))


def plain_terms(
    logits: Tensor,
    labels: Tensor,
    objective: str,
    *,
    token_weights: Tensor | None = None,
    num_items_in_batch: int | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    **transform: Any,
) -> Tensor:
    """What the loss is the sum of, from its definition, in the dtype of the logits."""
    valid = labels != ignore_index
    z = reference.transform_logits(logits[valid], **transform)
    losses = literal.TOKEN[objective](z, labels[valid])
    if token_weights is not None:
        losses = losses * token_weights[valid].to(losses.dtype)
    if reduction == "sum":
        return losses
    return losses / (num_items_in_batch or max(int(valid.sum()), 1))


def logits_problem(
    n: int,
    v: int,
    dtype: torch.dtype,
    objective: str = "unilogit",
    spread: float = 3.0,
    **options: Any,
) -> Problem:
    """Random logits, one position in five ignored (but never all)."""
    limit = options.get("vocab_size") or v
    return Problem(
        ((spread * torch.randn(n, v)).to(dtype),), labels_for(n, limit), objective, options
    )


def linear_problem(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    objective: str = "unilogit",
    *,
    bias: bool = False,
    rank: int = 0,
    **options: Any,
) -> Problem:
    """Random hidden states and lm_head with logits of a few units."""
    operands = [torch.randn(n, h), 3 / h**0.5 * torch.randn(v, h)]
    if bias:
        operands.append(torch.randn(v))
    limit = options.get("vocab_size") or v
    labels = labels_for(n, limit)
    adapter = [torch.randn(rank, h) / h**0.5, torch.randn(v, rank)] if rank else []
    given = [tuple(x.to(dtype) for x in part) for part in (operands, adapter)]
    return Problem(given[0], labels, objective, options, given[1])


def labels_for(n: int, v: int) -> Tensor:
    labels = torch.randint(0, v, (n,))
    labels[3::5] = -100
    return labels


def casts_operands(dtype: torch.dtype) -> bool:
    """Whether GEMMs on a CPU cast them chunk by chunk; such calls are never cut by tokens."""
    return GemmDtypes.of(dtype, "cpu").operands != dtype


def saved_tokens(dtype: torch.dtype, h: int) -> int:
    """Of how many tokens the logits fit into the memory of the weight's gradient, on a CPU."""
    dtypes = GemmDtypes.of(dtype, "cpu")
    tokens, rest = divmod(h * dtypes.results.itemsize, dtypes.logits.itemsize)
    return 0 if rest else tokens


def check(problem: Problem, backend: str, **more: Any) -> None:
    """Assert that loss and gradients are within the error budget."""
    dtype = problem.operands[0].dtype
    loss, gradients = problem.ours(backend, **more)
    exact_terms, exact_gradients = problem.plain(torch.float64)
    plain_terms_, plain_gradients = problem.plain(dtype)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_sum_within_budget(loss, exact_terms, plain_terms_, "loss")
    names = ["hidden", "weight", "bias"][: len(problem.operands)] if problem.linear else ["logits"]
    if problem.adapter:
        names += ["a", "b"]
    for name, ours, exact, plain in zip(
        names, gradients, exact_gradients, plain_gradients, strict=True
    ):
        assert ours.dtype == dtype
        assert_within_budget(ours, exact, plain, f"gradient of {name}")


OBJECTIVES = ["cross_entropy", "gradient_ascent", "unilogit", "unilogit_forward"]
"""Those that a sweep may know; test_methods has the others."""


def assert_equal_steps(values: list[Tensor], trained: tuple[Tensor, ...]) -> None:
    """Two values of a loss, and the gradients of each, are equal to the last bit."""
    assert torch.equal(*values)
    gradients = [torch.autograd.grad(value, trained) for value in values]
    for pair in zip(*gradients, strict=True):
        assert torch.equal(*pair)
