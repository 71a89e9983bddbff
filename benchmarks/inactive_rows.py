"""What rows that cannot matter cost: `python -m benchmarks.inactive_rows`.

Two figures for each dtype and kind of lm_head, as medians of ratios within a round:

- *ignored*: a whole call of Unilogit, forward and backward, with a share of the labels ignored,
  over the same call with none ignored;
- *inactive*: the backward of per-token log-odds whose upstream gradient is zero for a share of the
  tokens, over the same backward with none zero.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.figures import command_of, write
from benchmarks.turns import in_turns
from unilogit_kernels import linear_target_log_odds, linear_unilogit_loss
from unilogit_kernels.bench.devices import Device, find_device
from unilogit_kernels.bench.problems import DTYPES, Problem, Shape

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Found:
    """One figure.

    Attributes:
        title: Of the problem.
        rows: `"ignored"` or `"inactive"`.
        share: Of the tokens.
        all_ms: Milliseconds where every token counts, by round.
        some_ms: Milliseconds where only the others do, by round.
    """

    title: str
    rows: str
    share: float
    all_ms: list[float]
    some_ms: list[float]

    @property
    def ratios(self) -> list[float]:
        """Within each round."""
        return [some / every for every, some in zip(self.all_ms, self.some_ms, strict=True)]

    def row(self) -> str:
        """Of the Markdown table."""
        ratios = self.ratios
        cells = [
            self.title,
            f"{self.share:.0%} {self.rows}",
            *(f"{statistics.median(times):,.1f}" for times in (self.all_ms, self.some_ms)),
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} - {max(ratios):.3f}",
        ]
        return f"| {' | '.join(cells)} |"


def _mask(n: int, share: float) -> Tensor:
    """`[n]`, true for `share` of the tokens, drawn with a fixed seed."""
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=torch.Generator().manual_seed(1))[: round(share * n)]] = True
    return mask


def measure(
    shape: Shape, ignored: float, inactive: float, device: Device, rounds: int
) -> list[Found]:
    """Both figures of one shape."""
    problem = Problem(shape, device.type)
    hidden, weight = problem.operands
    labels, trained = problem.labels, problem.trained
    few = labels.masked_fill(_mask(shape.n, ignored).to(labels.device), IGNORE_INDEX)

    def call(labels: Tensor) -> object:
        return torch.autograd.grad(linear_unilogit_loss(hidden, weight, labels), trained)

    calls = {"every": lambda: call(labels), "some": lambda: call(few)}
    times = in_turns(calls, device, rounds)
    results = [Found(shape.title, "ignored", ignored, *times.values())]

    log_odds = linear_target_log_odds(hidden, weight, labels)
    ones = torch.ones_like(log_odds)
    nearly_zero = ones.masked_fill(_mask(shape.n, inactive).to(labels.device), 0.0)

    def backward(upstream: Tensor) -> object:
        return torch.autograd.grad(log_odds, trained, upstream, retain_graph=True)

    calls = {"every": lambda: backward(ones), "some": lambda: backward(nearly_zero)}
    times = in_turns(calls, device, rounds)
    return [*results, Found(shape.title, "inactive", inactive, *times.values())]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--head", nargs="+", default=["trained", "frozen"])
    parser.add_argument("--ignored", type=float, default=0.6)
    parser.add_argument("--inactive", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/inactive-rows.json"))
    options = parser.parse_args(arguments)
    device = find_device(options.device)
    facts = device.facts()
    command = command_of("inactive_rows", arguments)
    results: list[Found] = []
    for n, dtype, head in itertools.product(options.tokens, options.dtype, options.head):
        shape = Shape(n, options.vocabulary, dtype, options.hidden, head == "frozen")
        for found in measure(shape, options.ignored, options.inactive, device, options.rounds):
            results.append(found)
            print(found.row(), file=sys.stderr)
    lines = [
        f"By `{command}`: medians of {options.rounds} rounds. Ignored: a whole call over the same",
        "call without ignored labels. Inactive: the backward of log-odds whose upstream gradient",
        "is 0 for so many tokens, over the same backward with none 0.",
        "",
        "| problem | rows | ms, all rows | ms, the others | ratio | least - most |",
        "|---|---|---:|---:|---:|---:|",
        *(found.row() for found in results),
    ]
    figures = [asdict(found) for found in results]
    title = "What rows that cannot matter cost"
    write(options.json, facts, command, title, lines, figures)


if __name__ == "__main__":
    main()
