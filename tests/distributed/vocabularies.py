"""Losses of a vocabulary that ranks share: what each rank computes, and what one process does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import unilogit_kernels as uk
from tests.support import literal
from tests.support.divergence_pairs import Pair
from tests.support.problems import Problem
from unilogit_kernels import VocabParallel, objectives, reference
from unilogit_kernels.rows import ranks

CUTS = {
    2: {"uneven": [0, 700, 1003], "label apart": [0, 3, 1003], "padding": [0, 1000, 1003]},
    4: {"uneven": [0, 400, 401, 1000, 1003], "empty": [0, 400, 400, 900, 1003]},
}
"""Where the columns of each rank begin, by the number of ranks."""
COLUMNS, VOCAB_SIZE = 1003, 1000
"""All of them, and those that are real."""


class Sent(NamedTuple):
    """A collective: `"gather"` or `"sum"`, and the bytes that a rank gave."""

    what: str
    bytes: int


@contextmanager
def recorded() -> Iterator[list[Sent]]:
    """Every collective of the losses inside."""
    found: list[Sent] = []
    start = ranks._start

    def recording(group: Any, what: str, part: Tensor, out: Any) -> Any:
        found.append(Sent(what, part.nbytes))
        return start(group, what, part, out)

    ranks._start = recording
    try:
        yield found
    finally:
        ranks._start = start


def own_columns(cut: Sequence[int]) -> slice:
    rank = dist.get_rank()
    return slice(cut[rank], cut[rank + 1])


def part_of(operands: tuple[Tensor, ...], own: slice) -> tuple[Tensor, ...]:
    """This rank's part of logits, or of hidden states, weight and bias."""
    if len(operands) == 1:
        return (operands[0][:, own].clone(),)
    return operands[0], *(x[own].clone() for x in operands[1:])


class Result(NamedTuple):
    """What a rank found."""

    loss: Tensor
    gradients: list[Tensor]
    sent: list[Sent]


def of_problem(problem: Problem | Pair, cut: Sequence[int], backend: str) -> Result:
    """A problem's loss and gradients, as a rank computes them from its columns."""
    own = own_columns(cut)
    options = {**problem.options, "vocab_parallel": VocabParallel()}
    part: Problem | Pair
    if isinstance(problem, Pair):
        student, teacher = part_of(problem.student, own), part_of(problem.teacher, own)
        part = Pair(student, teacher, problem.labels, options)
    else:
        operands = part_of(problem.operands, own)
        adapter = part_of(problem.adapter, own) if problem.adapter else ()
        part = dataclasses.replace(problem, operands=operands, options=options, adapter=adapter)
    with recorded() as sent:
        loss, gradients = part.ours(backend)
    return Result(loss.detach(), [x.detach() for x in gradients], sent)


def of_frozen_problem(problem: Problem, cut: Sequence[int], backend: str) -> Result:
    """A problem's loss and the gradient of hidden states, where the lm_head is frozen."""
    hidden, weight, *bias = part_of(problem.operands, own_columns(cut))
    hidden = hidden.clone().requires_grad_()
    with recorded() as sent:
        loss = uk.linear_objective_loss(
            hidden,
            weight,
            problem.labels,
            problem.objective,
            bias=bias[0] if bias else None,
            backend=backend,
            vocab_parallel=VocabParallel(),
            **problem.options,
        )
        gradient = torch.autograd.grad(loss, hidden)[0]
    return Result(loss.detach(), [gradient], sent)


def of_frozen_problems(problems: Sequence[Problem], cut: Sequence[int]) -> list[Result]:
    """The same of several."""
    backends = [name for name in ("cpu", "eager") if name in uk.available_backends()]
    return [of_frozen_problem(p, cut, backends[i % len(backends)]) for i, p in enumerate(problems)]


def of_problems(problems: Sequence[Problem | Pair], cut: Sequence[int]) -> list[Result]:
    """The same of several, on the backends that run here in turn."""
    backends = [name for name in ("cpu", "eager") if name in uk.available_backends()]
    return [of_problem(p, cut, backends[i % len(backends)]) for i, p in enumerate(problems)]


# ---- what is more than a loss ------------------------------------------------------------------


Function = Callable[..., Tensor]
"""From operands (logits, or hidden states and weight), labels and options to `[k, n]`."""


def _entry(name: str) -> Callable[[tuple[Tensor, ...]], Callable[..., Any]]:
    return lambda operands: getattr(uk, name if len(operands) == 1 else f"linear_{name}")


def _log_odds(operands: tuple[Tensor, ...], labels: Tensor, **options: Any) -> Tensor:
    found: Tensor = _entry("target_log_odds")(operands)(*operands, labels, **options)
    return found[None]


def _runner_up(operands: tuple[Tensor, ...], labels: Tensor, **options: Any) -> Tensor:
    found = _entry("target_and_runner_up")(operands)(*operands, labels, **options)
    return torch.stack((found.log_odds, found.runner_up_log_prob, found.runner_up.float()))


def _statistics(operands: tuple[Tensor, ...], labels: Tensor, **options: Any) -> Tensor:
    fields = ("log_prob", "logsumexp", "entropy", "log_prob_variance", "mean_logit", "argmax")
    found = _entry("token_statistics")(operands)(*operands, labels, fields=fields, **options)
    return torch.stack([getattr(found, field).to(found.log_prob.dtype) for field in fields])


def _sequences(operands: tuple[Tensor, ...], labels: Tensor, **options: Any) -> Tensor:
    rows, *others = operands
    batch = labels.reshape(2, -1)
    rows = rows.reshape(*batch.shape, -1)
    found: Tensor = _entry("sequence_log_probs")(operands)(rows, *others, batch, **options)
    return found[None]


def _mixture(operands: tuple[Tensor, ...], labels: Tensor, **options: Any) -> Tensor:
    segments = torch.arange(len(labels)) % 2
    parts = ["unilogit", objectives.CrossEntropy(label_smoothing=0.1)]
    found = _entry("mixed_loss")(operands)(
        *operands, labels, parts=parts, segments=segments, weights=[0.3, 1.0], **options
    )
    loss: Tensor = found.loss
    return loss[None, None]


def _cross_entropy(operands: tuple[Tensor, ...], labels: Tensor, **options: Any) -> Tensor:
    found = _entry("cross_entropy_loss")(operands)(
        *operands, labels, z_loss=1e-2, label_smoothing=0.1, **options
    )
    return torch.stack((found.loss, found.z_loss))[:, None]


def _npo(operands: tuple[Tensor, ...], labels: Tensor, **options: Any) -> Tensor:
    rows, *others = operands
    batch = labels.reshape(2, -1)
    npo = objectives.NPO(reference=torch.tensor([-200.0, -150.0]), beta=0.01)
    entry = _entry("objective_loss")(operands)
    loss: Tensor = entry(rows.reshape(*batch.shape, -1), *others, batch, npo, **options)
    return loss[None, None]


FUNCTIONS: dict[str, Function] = {
    "log-odds": _log_odds,
    "runner-up": _runner_up,
    "statistics": _statistics,
    "sequences": _sequences,
    "mixture": _mixture,
    "cross-entropy": _cross_entropy,
    "npo": _npo,
}


def literal_function(name: str, z: Tensor, labels: Tensor) -> Tensor:
    """What each function is of logits, by its definition."""
    if name == "log-odds":
        return reference.target_log_odds(z, labels)[None]
    if name == "runner-up":
        largest = literal.without_label(z, labels).argmax(-1)
        d, log_p = reference.target_log_odds(z, labels), literal.log_runner_up(z, labels)
        return torch.stack((d, log_p, largest.to(z.dtype)))
    if name == "statistics":
        moments = literal.log_p(z, labels), z.logsumexp(-1), literal.entropy(z)
        others = reference.log_prob_variance(z), z.mean(-1), z.argmax(-1).to(z.dtype)
        return torch.stack((*moments, *others))
    log_p = literal.log_p(z, labels)
    sums = log_p.reshape(2, -1).sum(-1)
    if name == "sequences":
        return sums[None]
    if name == "mixture":
        forget, retain = literal.TOKEN["unilogit"](z, labels), literal.cross_entropy(0.1)(z, labels)
        return (0.3 * forget[::2].mean() + retain[1::2].mean())[None, None]
    if name == "cross-entropy":
        both = literal.cross_entropy(0.1, 1e-2)(z, labels).mean(), 1e-2 * z.logsumexp(-1).square()
        return torch.stack((both[0], both[1].mean()))[:, None]
    losses = literal.npo(sums, torch.tensor([-200.0, -150.0], dtype=z.dtype), 0.01)
    return losses.mean()[None, None]


DIFFERENTIABLE = {"runner-up": 2, "statistics": 3, "cross-entropy": 1}
"""How many of the values are, from the first one on, where not all of them are."""


def gradients_of(name: str, values: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a sum of a function's values."""
    values = values[: DIFFERENTIABLE.get(name)]
    return list(torch.autograd.grad((values * slopes_of(values)).sum(), inputs))


def slopes_of(values: Tensor) -> Tensor:
    """An upstream gradient of order 1, the same everywhere."""
    return torch.linspace(-1, 1, values.numel(), dtype=values.dtype).reshape(values.shape)


def of_function(
    name: str, operands: tuple[Tensor, ...], labels: Tensor, cut: Sequence[int], backend: str
) -> Result:
    """A function's values and gradients, as a rank computes them from its columns."""
    inputs = [x.requires_grad_() for x in part_of(operands, own_columns(cut))]
    options = {"backend": backend, "vocab_parallel": VocabParallel(vocab_size=VOCAB_SIZE)}
    with recorded() as sent:
        values = FUNCTIONS[name](tuple(inputs), labels, **options)
        gradients = gradients_of(name, values, inputs)
    return Result(values.detach(), gradients, sent)


def of_functions(
    operands: tuple[Tensor, ...], labels: Tensor, cut: Sequence[int]
) -> dict[str, Result]:
    """Every function's."""
    return {name: of_function(name, operands, labels, cut, "cpu") for name in FUNCTIONS}
