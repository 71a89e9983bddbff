"""What a provider is: a problem in, a job of two halves out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels import reference
from unilogit_kernels.bench.problems import DTYPES, Problem, Shape

OURS = {"unilogit": "unilogit_kernels", "cross_entropy": "unilogit_kernels, cross-entropy"}
"""This package's providers by loss: a peer is compared with the one that does the same job."""


MODES = ("forward", "backward", "both")
"""Loss alone without gradients, the backward of a training step, and the whole of one."""


Loss = Callable[..., Tensor]
"""From the operands, the labels and `softcap=` to the mean loss, differentiable."""


@dataclass(frozen=True)
class Job:
    """One training step, in two halves.

    Attributes:
        forward: The loss; None for a bound, which has none.
        backward: From what `forward` returned to the gradients of the trained operands.
    """

    forward: Callable[[], Tensor | None]
    backward: Callable[[Tensor | None], list[Tensor] | None]


@dataclass(frozen=True)
class Provider:
    """Somebody who can do the job, or a bound on it.

    Attributes:
        name: For tables.
        entry: `"logits"` or `"linear"`.
        loss: What it computes: `"unilogit"`, `"cross_entropy"` or `"floor"` (no loss at all).
        prepare: Builds the job of a problem.
        unavailable: Why it cannot run a shape on a type of device, or None.
        logits_copies: How many float32 copies of the logits it holds at its peak; decides whether
            it fits into memory.
        compiles: Whether its first call on a shape compiles.
        modes: Which of `MODES` it has.
    """

    name: str
    entry: str
    loss: str
    prepare: Callable[[Problem], Job]
    unavailable: Callable[[Shape, str], str | None] = lambda shape, device: None
    logits_copies: float = 0
    compiles: bool = False
    modes: tuple[str, ...] = MODES

    @property
    def is_ours(self) -> bool:
        """Whether it is this package."""
        return self.name in OURS.values()

    def extra_bytes(self, shape: Shape) -> int:
        """About how much memory a step takes beyond the operands."""
        logits = int(self.logits_copies * 4 * shape.n * shape.vocab_size)
        # Some finish the weight's gradient in float32 before they round it.
        exact = 4 * (shape.h or 0) * shape.rows if not shape.frozen_head else 0
        narrow = DTYPES[shape.dtype].itemsize < 4
        return shape.gradient_bytes + logits + (exact if narrow and self.loss != "floor" else 0)


def by_autograd(loss: Loss) -> Callable[[Problem], Job]:
    """The job of a differentiable loss."""

    def prepare(problem: Problem) -> Job:
        def forward() -> Tensor:
            return loss(*problem.operands, problem.labels, softcap=problem.shape.softcap)

        def backward(value: Tensor | None) -> list[Tensor]:
            assert value is not None
            return list(torch.autograd.grad(value, problem.trained))

        return Job(forward, backward)

    return prepare


def unilogit_from_nll(nll: Tensor, vocab_size: int) -> Tensor:
    """Mean Unilogit from per-token negative log-likelihoods, through what is left of d in them."""
    d = -torch.log(torch.expm1(nll.float()))
    delta = d + math.log(vocab_size - 1)
    constant = math.log1p(1 / (vocab_size - 1))
    return (torch.sigmoid(d) * delta - F.softplus(d) + constant).mean()


def cross_entropy(logits: Tensor, labels: Tensor, *, softcap: float | None) -> Tensor:
    """Plain `F.cross_entropy` in the dtype of the logits."""
    return F.cross_entropy(reference.transform_logits(logits, softcap=softcap), labels)


def on_linear(loss: Loss) -> Loss:
    """A loss on logits, after `F.linear`."""

    def linear(hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None) -> Tensor:
        return loss(F.linear(hidden, weight), labels, softcap=softcap)

    return linear
