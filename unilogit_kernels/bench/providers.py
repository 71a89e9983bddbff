"""Who is timed: this package, its peers and the floors, behind one signature.

A provider turns a problem into a function that runs one forward and backward and returns the loss
and the gradients. Peers that return a per-token negative log-likelihood are composed to Unilogit
through `d = -log(expm1(nll))`; peers that only return a mean stay cross-entropy, the lighter job.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels import linear_unilogit_loss, reference, unilogit_loss
from unilogit_kernels.backends import cpu
from unilogit_kernels.bench.problems import Problem

Step = Callable[[], tuple[Tensor, list[Tensor]] | None]
"""One forward and backward: the loss and the gradients, or None for a floor without a result."""


@dataclass(frozen=True)
class Provider:
    """Somebody who can do the job, or a bound on it.

    Attributes:
        name: For tables.
        entry: `"logits"` or `"linear"`.
        loss: What it computes: `"unilogit"`, `"cross_entropy"` or `"floor"` (no loss at all).
        prepare: Builds the step for a problem.
        missing: Why it cannot run here, or None.
    """

    name: str
    entry: str
    loss: str
    prepare: Callable[[Problem], Step]
    missing: Callable[[], str | None] = lambda: None


OURS = "unilogit_kernels"


def providers(entry: str) -> list[Provider]:
    """All providers for an entry, ours first."""
    return [p for p in _PROVIDERS if p.entry == entry]


def _autograd(loss: Callable[..., Tensor]) -> Callable[[Problem], Step]:
    """The step of a differentiable `loss(operands, labels)`."""

    def prepare(problem: Problem) -> Step:
        def step() -> tuple[Tensor, list[Tensor]]:
            value = loss(*problem.operands, problem.labels)
            return value, list(torch.autograd.grad(value, problem.trained))

        return step

    return prepare


def _compiled(loss: Callable[..., Tensor]) -> Callable[[Problem], Step]:
    def prepare(problem: Problem) -> Step:
        torch._dynamo.reset()
        return _autograd(torch.compile(loss, fullgraph=True, dynamic=False))(problem)

    return prepare


def _eager_unilogit(logits: Tensor, labels: Tensor) -> Tensor:
    return reference.unilogit_loss(logits.float(), labels)


def _compilable_unilogit(logits: Tensor, labels: Tensor) -> Tensor:
    """The literal loss without the row selection, which no graph can hold."""
    logits = logits.float()
    log_q = torch.log_softmax(reference.unilogit_target(logits, labels), dim=-1)
    log_p = torch.log_softmax(logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _on_linear(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return loss(F.linear(hidden, weight), labels)

    return linear


def _from_nll(nll: Tensor, vocab_size: int) -> Tensor:
    """Unilogit from per-token negative log-likelihoods: what is left of d in them."""
    d = -torch.log(torch.expm1(nll.float()))
    delta = d + math.log(vocab_size - 1)
    constant = math.log1p(1 / (vocab_size - 1))
    return (torch.sigmoid(d) * delta - F.softplus(d) + constant).mean()


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")
    return _from_nll(nll, weight.shape[0])


def _torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(hidden, weight, labels, options=options)
    return loss


def _stream_copy(problem: Problem) -> Step:
    """One read and one streaming write of the logits: no loss with a gradient can do less."""
    source = problem.operands[0].detach()
    target = torch.empty_like(source)

    def step() -> None:
        cpu.stream_copy(source, target)

    return step


def _bare_gemms(problem: Problem) -> Step:
    """The GEMMs of forward and backward alone, into buffers that are there already."""
    hidden, weight = (x.detach() for x in problem.operands)
    logits = hidden.new_empty(problem.shape.n, problem.shape.vocab_size)
    d_hidden = torch.empty_like(hidden)
    d_weight = None if problem.shape.frozen_head else torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_hidden)
        if d_weight is not None:
            torch.mm(logits.t(), hidden, out=d_weight)

    return step


def _needs(module: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        return None if importlib.util.find_spec(module) else f"{module} is not installed"

    return missing


def _needs_torch_chunked() -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "needs torch >= 2.13"


_PROVIDERS = [
    Provider(OURS, "logits", "unilogit", _autograd(unilogit_loss)),
    Provider("eager Unilogit", "logits", "unilogit", _autograd(_eager_unilogit)),
    Provider("compiled Unilogit", "logits", "unilogit", _compiled(_compilable_unilogit)),
    Provider("F.cross_entropy", "logits", "cross_entropy", _autograd(F.cross_entropy)),
    Provider("compiled F.cross_entropy", "logits", "cross_entropy", _compiled(F.cross_entropy)),
    Provider("streaming copy", "logits", "floor", _stream_copy, cpu.unavailable_reason),
    Provider(OURS, "linear", "unilogit", _autograd(linear_unilogit_loss)),
    Provider("eager Unilogit", "linear", "unilogit", _autograd(_on_linear(_eager_unilogit))),
    Provider(
        "compiled Unilogit", "linear", "unilogit", _compiled(_on_linear(_compilable_unilogit))
    ),
    Provider("F.cross_entropy", "linear", "cross_entropy", _autograd(_on_linear(F.cross_entropy))),
    Provider(
        "compiled F.cross_entropy",
        "linear",
        "cross_entropy",
        _compiled(_on_linear(F.cross_entropy)),
    ),
    Provider(
        "F.linear_cross_entropy, chunked",
        "linear",
        "cross_entropy",
        _autograd(_torch_chunked),
        _needs_torch_chunked,
    ),
    Provider(
        "cut_cross_entropy (torch_compile), through nll",
        "linear",
        "unilogit",
        _autograd(_cut_cross_entropy),
        _needs("cut_cross_entropy"),
    ),
    Provider("bare GEMMs", "linear", "floor", _bare_gemms),
]
