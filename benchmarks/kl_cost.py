"""The KL against a reference model beside its bare GEMMs: `python -m benchmarks.kl_cost`.

Forward and backward of `linear_kl_loss`, of the matrix products that it cannot do without (both
models' logits, the gradients of the hidden states and of a trained lm_head), and of plain torch,
in turns in one process. Errors are against float64, and the peak of memory is of all tensors that
torch allocates in a step, less gradients. Prints Markdown, and writes it beside the JSON. The
default shape is SmolLM2-135M's lm_head; `--vocabulary 32768 131072` shows that the peak is flat.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.figures import command_of, write
from unilogit_kernels import explain_plan, linear_kl_loss
from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.bench.devices import Device, find_device
from unilogit_kernels.bench.problems import DTYPES, Problem, Shape
from unilogit_kernels.bench.provider import Job
from unilogit_kernels.testing import AllocationGuard

OURS, BARE, BARE_NEW, BARE_FLOAT32, PLAIN = (
    "linear_kl_loss",
    "bare GEMMs",
    "bare GEMMs into new gradients",
    "bare GEMMs of float32 operands",
    "plain torch",
)
_TEACHER_NOISE = 0.3
"""Of the teacher's operands relative to the student's: a model that has learned for a while."""
_BLOCK_COLUMNS = 2048
"""Columns of float64 logits at a time."""
_WEIGHT_ROWS = 4096
"""Rows of the weight's gradient, at most, whose error is taken: a float64 copy of all is large."""


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        shape: Of the student.
        ref_h: The teacher's hidden size.
        direction: `"forward"` or `"reverse"`.
    """

    shape: Shape
    ref_h: int
    direction: str

    @property
    def title(self) -> str:
        """For tables."""
        teacher = "" if self.ref_h == self.shape.h else f" against {self.ref_h:,}"
        return f"{self.direction} KL, {self.shape.title}{teacher}"


@dataclass
class Measured:
    """One way to do it.

    Attributes:
        name: Which.
        milliseconds: Of each round.
        over_bare: Median of its time over the bare GEMMs' in the same round.
        loss_error: Relative, against float64; None for a bound.
        hidden_error: Of the hidden states' gradient (Frobenius).
        weight_error: Of the weight's gradient, None for a frozen one.
        peak_mib: Tensors beyond operands and gradients.
    """

    name: str
    milliseconds: list[float] = field(default_factory=list)
    over_bare: float | None = None
    loss_error: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None
    peak_mib: float | None = None


class Operands:
    """Both models' operands; the teacher is the student and some noise, or of another size."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        problem = Problem(case.shape, device)
        self.case = case
        self.hidden, self.weight = problem.operands
        self.trained = problem.trained
        if case.ref_h == case.shape.h:
            self.teacher = [
                x.detach() + _TEACHER_NOISE * x.detach().std() * torch.randn_like(x)
                for x in problem.operands
            ]
        else:
            like = Shape(**{**asdict(case.shape), "h": case.ref_h})
            self.teacher = [x.detach() for x in Problem(like, device).operands]

    def logits(self, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Some columns of both models' logits."""
        student, teacher = (
            x.detach().to(dtype) @ w.detach()[columns].to(dtype).t()
            for x, w in ((self.hidden, self.weight), self.teacher)
        )
        return student, teacher


# ---- who is timed --------------------------------------------------------------------------------


def _autograd_job(operands: Operands, loss: Callable[[], Tensor]) -> Job:
    def backward(value: Tensor | None) -> list[Tensor]:
        assert value is not None
        return list(torch.autograd.grad(value, operands.trained))

    return Job(loss, backward)


def _ours(operands: Operands) -> Job:
    return _autograd_job(
        operands,
        lambda: linear_kl_loss(
            operands.hidden, operands.weight, *operands.teacher, direction=operands.case.direction
        ),
    )


def _plain(operands: Operands) -> Job:
    """`F.kl_div` of two `log_softmax`, logits upcast to float32 as Hugging Face models do."""

    def loss() -> Tensor:
        student = F.log_softmax(F.linear(operands.hidden, operands.weight).float(), -1)
        teacher = F.log_softmax(F.linear(*operands.teacher).float(), -1)
        pair = (student, teacher) if operands.case.direction == "forward" else (teacher, student)
        return F.kl_div(*pair, reduction="batchmean", log_target=True)

    return _autograd_job(operands, loss)


def _bare(
    operands: Operands, *, new_gradients: bool = False, dtype: torch.dtype | None = None
) -> Job:
    """The matrix products alone, in the operands' dtype, on logits in memory that is there."""
    hidden, weight = (
        x.detach().to(dtype or operands.hidden.dtype) for x in (operands.hidden, operands.weight)
    )
    teacher = [x.to(dtype or x.dtype) for x in operands.teacher]
    shape = operands.case.shape
    logits = [hidden.new_empty(shape.n, shape.vocab_size) for _ in range(2)]
    old = None
    if not new_gradients:
        old = [torch.empty_like(x) for x in (hidden, weight)[: len(operands.trained)]]

    def forward() -> None:
        for out, (x, w) in zip(logits, ((hidden, weight), teacher), strict=True):
            torch.mm(x, w.t(), out=out)

    def backward(_: Tensor | None) -> None:
        out = old or [allocate(x.shape, x.dtype, x.device) for x in operands.trained]
        torch.mm(logits[0], weight, out=out[0])
        if len(out) > 1:
            torch.mm(logits[0].t(), hidden, out=out[1])

    return Job(forward, backward)


def jobs(operands: Operands, *, plain: bool) -> Iterator[tuple[str, Job]]:
    """Everybody, ours first."""
    yield OURS, _ours(operands)
    yield BARE, _bare(operands)
    yield BARE_NEW, _bare(operands, new_gradients=True)
    if operands.hidden.dtype.itemsize < 4 and operands.hidden.device.type == "cpu":
        # The faster ones on a CPU without instructions for 16 bits.
        yield BARE_FLOAT32, _bare(operands, dtype=torch.float32)
    if plain:
        yield PLAIN, _plain(operands)


# ---- the truth -----------------------------------------------------------------------------------


class Oracle:
    """Loss and gradients in float64, block by block of columns.

    Attributes:
        loss: The mean divergence.
        d_hidden: Of the student's hidden states.
        weight_rows: Which rows of the weight have their gradient in `d_weight`.
        d_weight: None for a frozen lm_head.
    """

    def __init__(self, operands: Operands) -> None:
        shape, self._operands = operands.case.shape, operands
        n, v = shape.n, shape.vocab_size
        self._forward = operands.case.direction == "forward"
        sums = [torch.full((n,), -torch.inf, dtype=torch.float64) for _ in range(2)]
        for _, logits in self._blocks():
            sums = [torch.logaddexp(s, z.logsumexp(-1)) for s, z in zip(sums, logits, strict=True)]
        kl = torch.zeros(n, dtype=torch.float64)
        for _, logits in self._blocks():
            student, teacher = (z - s[:, None] for z, s in zip(logits, sums, strict=True))
            a, b = (teacher, student) if self._forward else (student, teacher)
            kl += (a.exp() * (a - b)).sum(-1)
        self.loss = float(kl.mean())
        hidden = operands.hidden.detach().double()
        self.d_hidden = torch.zeros_like(hidden)
        self.weight_rows = torch.linspace(0, v - 1, min(v, _WEIGHT_ROWS)).long().unique()
        parts = []
        for columns, logits in self._blocks():
            student, teacher = (z - s[:, None] for z, s in zip(logits, sums, strict=True))
            if self._forward:
                row = (student.exp() - teacher.exp()) / n
            else:
                row = student.exp() * (student - teacher - kl[:, None]) / n
            self.d_hidden += row @ operands.weight.detach()[columns].double()
            inside = (self.weight_rows >= columns.start) & (self.weight_rows < columns.stop)
            wanted = self.weight_rows[inside] - columns.start
            parts.append(row[:, wanted].t() @ hidden)
        self.d_weight = None if shape.frozen_head else torch.cat(parts)

    def judge(self, measured: Measured, loss: float, gradients: list[Tensor]) -> None:
        """Note the errors of one step."""
        measured.loss_error = abs(loss - self.loss) / self.loss
        measured.hidden_error = _relative(gradients[0], self.d_hidden)
        if self.d_weight is not None:
            measured.weight_error = _relative(gradients[1][self.weight_rows], self.d_weight)

    def _blocks(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        v = self._operands.case.shape.vocab_size
        for start in range(0, v, _BLOCK_COLUMNS):
            columns = slice(start, min(start + _BLOCK_COLUMNS, v))
            yield columns, self._operands.logits(columns, torch.float64)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# ---- measuring -----------------------------------------------------------------------------------


def measure(
    case: Case, device: Device, rounds: int, *, plain: bool, errors: bool
) -> list[Measured]:
    """Everybody in turn, after one step that does not count."""
    operands = Operands(case, device.type)
    oracle = Oracle(operands) if errors else None
    found, running = [], []
    for name, job in jobs(operands, plain=plain):
        measured = Measured(name)
        with AllocationGuard() as guard:
            loss = job.forward()
            gradients = job.backward(loss)
        if loss is not None and gradients is not None:
            size = sum(g.numel() * g.element_size() for g in gradients)
            measured.peak_mib = (guard.peak_bytes - size) / 2**20
            if oracle is not None:
                oracle.judge(measured, loss.item(), gradients)
        del loss, gradients
        found.append(measured)
        running.append(job)
    for _ in range(rounds):
        for measured, job in zip(found, running, strict=True):
            measured.milliseconds.append(
                device.time(lambda job=job: job.backward(job.forward()))[0]  # type: ignore[misc]
            )
    bare = next(m.milliseconds for m in found if m.name == BARE)
    for measured in found:
        pairs = zip(measured.milliseconds, bare, strict=True)
        measured.over_bare = statistics.median(mine / floor for mine, floor in pairs)
    return found


_COLUMNS = (
    "",
    "median ms",
    "min - max",
    "over the bare GEMMs",
    "loss error",
    "error of dH",
    "error of dW",
    "peak MiB",
)


def _row(m: Measured) -> list[str]:
    def short(x: float | None, form: str) -> str:
        return "" if x is None else format(x, form)

    times = m.milliseconds
    return [
        m.name,
        f"{statistics.median(times):,.1f}",
        f"{min(times):,.1f} - {max(times):,.1f}",
        f"{m.over_bare:.2f}x",
        short(m.loss_error, ".1e"),
        short(m.hidden_error, ".1e"),
        short(m.weight_error, ".1e"),
        short(m.peak_mib, ",.0f"),
    ]


def markdown(
    facts: dict[str, Any], command: str, results: list[tuple[Case, list[Measured]]]
) -> list[str]:
    """One table for each case."""
    lines = [
        f"By `{command}`.",
        "",
        "Forward and backward, everybody in turn in each round; the ratio is the median of the",
        "ratios within a round. Errors are relative to float64; the peak is of",
        "torch's tensors beyond operands and gradients, without what its libraries allocate.",
    ]
    for case, found in results:
        shape = case.shape
        assert shape.h is not None
        report = explain_plan(
            shape.n,
            shape.h,
            shape.vocab_size,
            dtype=DTYPES[shape.dtype],
            device="cuda" if "gpu" in facts else "cpu",
            train_weight=not shape.frozen_head,
            ref_h=case.ref_h,
        )
        lines += [
            "",
            f"## {case.title}",
            "",
            f"Plan: {report.plan.order.replace('_', ' ')}, {report.gemms:.2f} GEMMs of 2 n h V, "
            f"peak predicted {report.peak_bytes / 2**20:,.0f} MiB.",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "|---|" + "---:|" * (len(_COLUMNS) - 1),
            *(f"| {' | '.join(_row(m))} |" for m in found),
        ]
    return lines


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All combinations that were asked for."""
    for n, h, v, dtype, head, direction in itertools.product(
        options.tokens,
        options.hidden,
        options.vocabulary,
        options.dtype,
        options.head,
        options.direction,
    ):
        shape = Shape(n, v, dtype, h=h, frozen_head=head == "frozen")
        yield Case(shape, options.ref_hidden or h, direction)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--hidden", type=int, nargs="+", default=[576])
    parser.add_argument("--ref-hidden", type=int, help="the teacher's; default: the student's")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--head", nargs="+", default=["trained", "frozen"])
    parser.add_argument("--direction", nargs="+", default=["forward", "reverse"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-plain", action="store_true", help="leave plain torch out")
    parser.add_argument("--no-errors", action="store_true", help="leave float64 out")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/kl-cost.json"))
    options = parser.parse_args(arguments)
    device = find_device(options.device)
    facts, results = device.facts(), []
    command = command_of("kl_cost", arguments)
    for case in cases(options):
        found = measure(
            case,
            device,
            options.rounds,
            plain=not options.no_plain,
            errors=not options.no_errors,
        )
        results.append((case, found))
        for m in found:
            print(f"{case.title}: {' | '.join(_row(m))}", file=sys.stderr)
    measured = [
        {"title": case.title, "case": asdict(case), "measured": [asdict(m) for m in found]}
        for case, found in results
    ]
    title = "The KL against a reference model, beside its bare GEMMs"
    lines = markdown(facts, command, results)
    write(options.json, facts, command, title, lines, measured)


if __name__ == "__main__":
    main()
