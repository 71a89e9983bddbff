"""Who is timed: this package, plain torch, and bounds on both, behind one signature.

A provider turns a problem into a job: a forward that returns the mean loss, and a backward that
returns the gradients. `peers` holds those of other packages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from unilogit_kernels.backends.cpu import library
from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.provider import (
    OURS,
    Job,
    Loss,
    Provider,
    by_autograd,
    cross_entropy,
    on_linear,
    unilogit_from_nll,
)


def providers(entry: str) -> list[Provider]:
    """All providers for an entry: ours first, then torch, other packages, bounds."""
    from unilogit_kernels.bench import peers

    everybody = [*_OURS, *_torch_providers(), *peers.PEERS, *_FLOORS]
    return [provider for provider in everybody if provider.entry == entry]


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
        library.stream_copy(source, target)


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
    return library.unavailable_reason() if device == "cpu" else None


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
