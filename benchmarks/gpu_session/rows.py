"""The kernels for one row of logits, each with every flag, against the eager ones in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_session.judge import Judge
from tests.support.layouts import assert_only_written, place
from tests.support.row_statistics import found_statistics, literal_statistics, transformed
from unilogit_kernels import objectives
from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.bench.problems import DTYPES
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import RowNeeds

EAGER = EagerKernels()
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=-1.5),
    "capped": LogitTransform(scale=0.7, softcap=5.0),
}
NEEDS = {
    "plain": RowNeeds(),
    "runner-up": RowNeeds(runner_up=True),
    "logsumexp": RowNeeds(logsumexp=True),
    "mean": RowNeeds(mean=True),
    "entropy": RowNeeds(entropy=True),
    "variance": RowNeeds(entropy=True, variance=True),
    "everything": RowNeeds(*[True] * len(RowNeeds._fields)),
}
DATA = ("random", "memorised", "holes", "offset")
"""`memorised`: the label has nearly all probability; `holes`: every third logit is -inf; `offset`:
of a size that float32 has few digits left beside."""
_MEMORISED, _OFFSET = 30.0, 1000.0
_EXACT, _PLAIN = torch.float64, torch.float32


class Problem(NamedTuple):
    """Rows of logits `[n, v]`, their labels and weights; the last row of several has weight 0."""

    logits: Tensor
    labels: Tensor
    weight: Tensor

    @staticmethod
    def of(n: int, v: int, dtype: str, data: str, device: str, transform: str = "plain") -> Problem:
        """Seeded. The first labels lie where the ends of rows are.

        `transform` is what is done to the logits later: holes are what it makes -inf.
        """
        generator = torch.Generator(device).manual_seed(7)
        logits = 3 * torch.randn(n, v, generator=generator, device=device)
        labels = torch.randint(0, v, (n,), generator=generator, device=device)
        labels[0] = v - 1
        if n > 1:
            labels[1] = 0
        at = labels[:, None]
        if data == "memorised":
            logits.scatter_(1, at, logits.logsumexp(1, keepdim=True) + _MEMORISED)
        elif data == "holes":
            own = logits.gather(1, at)
            logits[:, ::3] = -math.copysign(math.inf, TRANSFORMS[transform].scale)
            logits.scatter_(1, at, own)
        elif data == "offset":
            logits += _OFFSET
        return Problem(logits.to(DTYPES[dtype]), labels, torch.linspace(-1.5, 2.0, n).to(device))

    def with_an_unread_row(self) -> Problem:
        """The last row of several is NaN, without a label or a weight: it must become 0."""
        if len(self.labels) > 1:
            self.logits[-1], self.labels[-1], self.weight[-1] = math.nan, -100, 0.0
        return self


def chunks_of(v: int, chunks: int) -> list[slice]:
    """So many pieces of a vocabulary, of unequal and odd widths."""
    if chunks == 1 or v < 8:
        return [slice(0, v)]
    return [slice(0, v // 7), slice(v // 7, v // 2 + 1), slice(v // 2 + 1, v)]


def fold(
    kernels: RowKernels,
    problem: Problem,
    needs: RowNeeds,
    transform: LogitTransform,
    dtype: torch.dtype = _PLAIN,
    chunks: int = 1,
    layout: str = "contiguous",
) -> Tensor:
    """The complete state, chunk by chunk."""
    n, v = problem.logits.shape
    state = row_state.empty_state(n, problem.logits.device, dtype, needs)
    for columns in chunks_of(v, chunks):
        view = problem.logits[:, columns]
        if layout != "contiguous":
            view, _ = place(view, layout)
        kernels.log_odds_update(Tile(view, problem.labels, columns.start, transform), state, needs)
    return state


def check_statistics(
    kernels: RowKernels,
    size: tuple[int, int],
    device: str,
    *,
    dtype: str,
    transform: str,
    needs: str,
    layout: str,
    chunks: int,
    data: str,
) -> Judge:
    """Everything that a state tells, beside what the definitions give in float64 and float32."""
    judge, asked, chosen = Judge(), NEEDS[needs], TRANSFORMS[transform]
    problem = Problem.of(*size, dtype, data, device, transform)
    v = size[1]
    state = fold(kernels, problem, asked, chosen, chunks=chunks, layout=layout)
    z = [transformed(problem.logits, chosen, to) for to in (_EXACT, _PLAIN)]
    exact, plain = (literal_statistics(each, problem.labels) for each in z)
    # A mean is found from the largest logit, whose size is that of its rounding.
    size_of_mean = float(z[0].masked_fill(z[0].isinf(), 0.0).abs().max())
    scales = {"mean_logit": max(1.0, size_of_mean)}
    for name, value in found_statistics(state, problem.labels, v, asked).items():
        scale = scales.get(name, 1.0)
        judge.near(value, exact[name], plain[name], name, smallest_scale=scale)
    if asked.runner_up:
        _judge_runner_up(judge, row_state.runner_up(state, problem.labels), z, problem.labels)
    return judge


def _judge_runner_up(judge: Judge, found: Tensor, z: list[Tensor], labels: Tensor) -> None:
    """Its logit is the largest but for rounding, and of equal ones it is the first."""
    exact, plain = (each.scatter(1, labels[:, None], -math.inf) for each in z)
    best = exact.argmax(1)
    values, largest, by_torch = (
        exact.gather(1, columns[:, None])[:, 0] for columns in (found, best, plain.argmax(1))
    )
    judge.near(values.float(), largest, by_torch.float(), "runner-up", smallest_scale=1.0)
    equal = values == largest
    assert torch.equal(found[equal], best[equal]), "not the first of equal runners-up"


def check_gradient(
    kernels: RowKernels,
    size: tuple[int, int],
    device: str,
    *,
    dtype: str,
    transform: str,
    state: str,
    layout: str,
    out: str,
    chunks: int,
) -> Judge:
    """Gradient rows of the statistics that `state` names, of random slopes.

    `out` is `in place`, or the dtype of another matrix in the same layout.
    """
    judge, needs, chosen = Judge(), NEEDS[state], TRANSFORMS[transform]
    problem = Problem.of(*size, dtype, "random", device).with_an_unread_row()
    n, v = size
    slope = problem.weight
    if needs.runner_up or needs.general:
        generator = torch.Generator(device).manual_seed(1)
        slope = torch.randn(5 if needs.general else 3, n, generator=generator, device=device)
        slope[4:] /= 10
        slope *= problem.weight != 0
    states = [
        fold(each, problem, needs, chosen, to)
        for each, to in ((kernels, _PLAIN), (EAGER, _EXACT), (EAGER, _PLAIN))
    ]
    if needs.runner_up:
        found = row_state.runner_up(states[0], problem.labels)
        for each in states[1:]:
            each[row_state.RUNNER_UP] = row_state.as_row(found, each.dtype)
    out_dtype = DTYPES[dtype if out == "in place" else out]
    for columns in chunks_of(v, chunks):
        values = problem.logits[:, columns]
        exact, plain = (
            torch.empty(values.shape, dtype=to, device=device) for to in (_EXACT, out_dtype)
        )
        tile = Tile(values, problem.labels, columns.start, chosen)
        EAGER.log_odds_gradient(tile, states[1], slope.double(), exact)
        EAGER.log_odds_gradient(tile, states[2], slope, plain)
        view, memory = place(values, layout)
        target, written = view, memory
        if out != "in place":
            target, written = place(values.to(out_dtype), layout)
        tile = Tile(view, problem.labels, columns.start, chosen)
        kernels.log_odds_gradient(tile, states[0], slope, target)
        judge.near(target, exact, plain, "gradient")
        if n > 1:
            assert int(target[-1].count_nonzero()) == 0, "a row without a slope is not 0"
        assert_only_written(target, written)
    return judge


def check_sweep(
    kernels: RowKernels,
    size: tuple[int, int],
    device: str,
    *,
    dtype: str,
    transform: str,
    objective: str,
    layout: str,
    out: str,
    data: str,
) -> Judge:
    """Values, and gradients where `out` is not `none`, of one visit of whole rows."""
    judge, chosen, v = Judge(), TRANSFORMS[transform], size[1]
    problem = Problem.of(*size, dtype, data, device, transform).with_an_unread_row()
    (exact, exact_rows), (plain, plain_rows) = (
        _swept_by_eager(problem, chosen, objective, to) for to in (_EXACT, _PLAIN)
    )
    view, memory = place(problem.logits, layout)
    target: Tensor | None = None
    if out == "in place":
        target, written = view, memory
    elif out != "none":
        target, written = place(problem.logits.to(DTYPES[out]), layout)
    tile = Tile(view, problem.labels, transform=chosen)
    values = kernels.log_odds_sweep(tile, problem.weight, objective, v, target)
    judge.near(values, exact, plain, "values", smallest_scale=1.0)
    if target is not None:
        judge.near(target, exact_rows, plain_rows.to(target.dtype), "gradient")
        if size[0] > 1:
            assert int(target[-1].count_nonzero()) == 0, "a row of weight 0 is not 0"
        assert_only_written(target, written)
    return judge


def _swept_by_eager(
    problem: Problem, transform: LogitTransform, objective: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    v = problem.logits.shape[1]
    state = fold(EAGER, problem, RowNeeds(), transform, dtype)
    d = row_state.log_odds(state, problem.labels, v)
    f = objectives.REGISTRY[objective]()
    skipped = problem.weight == 0
    values = f.value(d, v).masked_fill(skipped, 0.0)
    slope = (f.slope(d, v) * problem.weight.to(dtype)).masked_fill(skipped, 0.0)
    rows = torch.empty(problem.logits.shape, dtype=dtype, device=problem.logits.device)
    tile = Tile(problem.logits, problem.labels, transform=transform)
    EAGER.log_odds_gradient(tile, state, slope, rows)
    return values, rows


def check_scale(
    kernels: RowKernels, size: tuple[int, int], device: str, *, dtype: str, factor: float
) -> Judge:
    """A tensor times a number on the device, rounded once; times 1 it is left as it is."""
    judge = Judge()
    values = Problem.of(*size, dtype, "random", device).logits
    memory = torch.full((values.numel() + 64,), math.nan, dtype=values.dtype, device=device)
    scaled = memory[: values.numel()].copy_(values.flatten())
    kernels.scale_(scaled, torch.tensor(factor, device=device))
    plain = (values.float() * torch.tensor(factor, device=device)).to(values.dtype).flatten()
    exact = values.double().flatten() * float(torch.tensor(factor))
    judge.near(scaled, exact, plain, "scaled")
    if factor == 1.0:
        assert torch.equal(scaled, values.flatten()), "a factor of 1 changes something"
    assert_only_written(scaled, memory)
    return judge
