"""Who is timed: this package, plain torch, and bounds on both, behind one signature.

A provider turns a problem into a job: a forward that returns the mean loss, and a backward that
returns the gradients. `peers` holds those of other packages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels import (
    linear_objective_loss,
    linear_unilogit_loss,
    objective_loss,
    reference,
    unilogit_loss,
)
from unilogit_kernels.backends import cpu
from unilogit_kernels.bench.problems import DTYPES, Problem, Shape
from unilogit_kernels.memory import allocate

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


def providers(entry: str) -> list[Provider]:
    """All providers for an entry: ours first, then torch, other packages, bounds."""
    from unilogit_kernels.bench import peers

    everybody = [*_OURS, *_torch_providers(), *peers.PEERS, *_FLOORS]
    return [provider for provider in everybody if provider.entry == entry]


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


def _eager_unilogit(logits: Tensor, labels: Tensor, *, softcap: float | None) -> Tensor:
    return reference.unilogit_loss(logits.float(), labels, softcap=softcap)


def _compilable_unilogit(logits: Tensor, labels: Tensor, *, softcap: float | None) -> Tensor:
    """The literal loss without the row selection, which no graph can hold."""
    logits = reference.transform_logits(logits.float(), softcap=softcap)
    log_q = torch.log_softmax(reference.unilogit_target(logits, labels), dim=-1)
    log_p = torch.log_softmax(logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _through_nll(logits: Tensor, labels: Tensor, *, softcap: float | None) -> Tensor:
    logits = reference.transform_logits(logits.float(), softcap=softcap)
    nll = F.cross_entropy(logits, labels, reduction="none")
    return unilogit_from_nll(nll, logits.shape[-1])


def _compiled(loss: Loss) -> Callable[[Problem], Job]:
    def prepare(problem: Problem) -> Job:
        return by_autograd(torch.compile(loss, fullgraph=True, dynamic=False))(problem)

    return prepare


# ---- bounds ------------------------------------------------------------------------------------


def _bound(step: Callable[[], None]) -> Job:
    """A bound that has no halves."""
    return Job(lambda: None, lambda _: step())


def _copy_into_existing(problem: Problem) -> Job:
    """One read and one write of the logits: no loss with a gradient can do less."""
    source = problem.operands[0].detach()
    target = torch.empty_like(source)
    return _bound(lambda: _copy(source, target))


def _copy_into_new(problem: Problem) -> Job:
    """The same into a new tensor in each call, allocated as this package does."""
    source = problem.operands[0].detach()
    return _bound(lambda: _copy(source, allocate(source.shape, source.dtype, source.device)))


def _clone(problem: Problem) -> Job:
    source = problem.operands[0].detach()

    def step() -> None:
        source.clone()

    return _bound(step)


def _copy(source: Tensor, target: Tensor) -> None:
    if source.is_cuda:
        target.copy_(source)
    else:
        cpu.stream_copy(source, target)


def _bare_gemms(problem: Problem, *, new_gradients: bool) -> Job:
    """The GEMMs of forward and backward alone, on logits in memory that is there already."""
    hidden, weight = (x.detach() for x in problem.operands)
    logits = hidden.new_empty(problem.shape.n, problem.shape.vocab_size)
    old = None if new_gradients else [torch.empty_like(x) for x in problem.trained]

    def forward() -> None:
        torch.mm(hidden, weight.t(), out=logits)

    def backward(_: Tensor | None) -> None:
        if old is None:
            out = [allocate(x.shape, x.dtype, x.device) for x in problem.trained]
        else:
            out = old
        torch.mm(logits, weight, out=out[0])
        if len(out) > 1:
            torch.mm(logits.t(), hidden, out=out[1])

    return Job(forward, backward)


def _needs_the_library(shape: Shape, device: str) -> str | None:
    return cpu.unavailable_reason() if device == "cpu" else None


def _torch_providers() -> list[Provider]:
    """Plain torch, eager and compiled, on logits and after `F.linear`."""
    found = []
    # The copies are those of the peaks that this harness measures, rounded up.
    for name, loss, computes, copies in (
        ("eager Unilogit", _eager_unilogit, "unilogit", 12),
        ("F.cross_entropy", cross_entropy, "cross_entropy", 2),
        ("F.cross_entropy, through nll", _through_nll, "unilogit", 3),
    ):
        prepare = by_autograd(loss)
        found.append(Provider(name, "logits", computes, prepare, logits_copies=copies))
        prepare = by_autograd(on_linear(loss))
        found.append(Provider(name, "linear", computes, prepare, logits_copies=copies + 2))
    for name, loss, computes in (
        ("compiled Unilogit", _compilable_unilogit, "unilogit"),
        ("compiled F.cross_entropy", cross_entropy, "cross_entropy"),
    ):
        logits = Provider(name, "logits", computes, _compiled(loss), logits_copies=4, compiles=True)
        found += [logits, replace(logits, entry="linear", prepare=_compiled(on_linear(loss)))]
    return found


_OURS = [
    Provider(OURS["unilogit"], "logits", "unilogit", by_autograd(unilogit_loss)),
    Provider(OURS["unilogit"], "linear", "unilogit", by_autograd(linear_unilogit_loss)),
    Provider(
        OURS["cross_entropy"],
        "logits",
        "cross_entropy",
        by_autograd(partial(objective_loss, objective="cross_entropy")),
    ),
    Provider(
        OURS["cross_entropy"],
        "linear",
        "cross_entropy",
        by_autograd(partial(linear_objective_loss, objective="cross_entropy")),
    ),
]
_FLOORS = [
    Provider(
        "copy into existing memory",
        "logits",
        "floor",
        _copy_into_existing,
        _needs_the_library,
        modes=("both",),
    ),
    Provider(
        "copy into new memory",
        "logits",
        "floor",
        _copy_into_new,
        _needs_the_library,
        modes=("both",),
    ),
    Provider("torch.clone", "logits", "floor", _clone, modes=("both",)),
    Provider(
        "bare GEMMs", "linear", "floor", partial(_bare_gemms, new_gradients=False), logits_copies=1
    ),
    Provider(
        "bare GEMMs into new gradients",
        "linear",
        "floor",
        partial(_bare_gemms, new_gradients=True),
        logits_copies=1,
    ),
]
