"""What each method costs relative to cross-entropy: `python -m benchmarks.method_cost`.

Forward and backward of one fused linear call with a trained lm_head or a frozen one, and of one
call on logits; the methods alternate in one process, and each ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.turns import in_turns
from unilogit_kernels import linear_objective_loss, objective_loss, objectives
from unilogit_kernels.bench.devices import Cpu
from unilogit_kernels.objectives import Objective

SEQUENCES = 8
"""Sequences in the batch, an even number so that methods of pairs have halves."""


def methods(tokens: int) -> dict[str, str | Objective]:
    """Every registered method; references are made up, since their values cost nothing."""
    length = tokens // SEQUENCES
    given: dict[str, str | Objective] = {}
    for name, cls in objectives.REGISTRY.items():
        if name == "tnpo":
            given[name] = objectives.TNPO(reference=torch.full((SEQUENCES, length), -3.0))
        elif name in ("npo", "dpo", "idk_dpo"):
            reference = torch.full((SEQUENCES,), -3.0 * length)
            given[name] = cls(reference=reference)  # type: ignore[call-arg]
        else:
            given[name] = name
    given["smoothing, z-loss"] = objectives.CrossEntropy(label_smoothing=0.1, z_loss=1e-4)
    given["entropy bonus"] = objectives.CrossEntropy(entropy=-0.01)
    return given


def ratios(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds, and median ratio to cross-entropy in the same round."""
    times = in_turns(steps, Cpu(), rounds)
    base = times["cross_entropy"]
    return {
        name: (
            statistics.median(each),
            statistics.median(one / other for one, other in zip(each, base, strict=True)),
        )
        for name, each in times.items()
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    n, h, v = arguments.tokens, arguments.hidden, arguments.vocabulary
    dtype = getattr(torch, arguments.dtype)
    shape = (SEQUENCES, n // SEQUENCES)
    labels = torch.randint(0, v, shape)
    hidden = torch.randn(*shape, h).to(dtype).requires_grad_()
    weight = (3 / h**0.5 * torch.randn(v, h)).to(dtype).requires_grad_()
    logits = (hidden @ weight.t()).detach().requires_grad_()
    chosen = {
        name: method
        for name, method in methods(n).items()
        if not arguments.only or name in (*arguments.only, "cross_entropy")
    }

    def linear(method: str | Objective) -> Callable[[], None]:
        def step() -> None:
            loss: Tensor = linear_objective_loss(hidden, weight, labels, method)
            torch.autograd.grad(loss, (hidden, weight))

        return step

    def frozen(method: str | Objective) -> Callable[[], None]:
        def step() -> None:
            torch.autograd.grad(
                linear_objective_loss(hidden, weight.detach(), labels, method), hidden
            )

        return step

    def full(method: str | Objective) -> Callable[[], None]:
        def step() -> None:
            torch.autograd.grad(objective_loss(logits, labels, method), logits)

        return step

    print(f"{n} x {h} x {v} {arguments.dtype}, {torch.get_num_threads()} threads")
    for title, make in (("linear", linear), ("frozen", frozen), ("logits", full)):
        found = ratios({name: make(method) for name, method in chosen.items()}, arguments.rounds)
        for name, (milliseconds, ratio) in found.items():
            print(f"{title:7} {name:20} {milliseconds:8.1f} ms {ratio:6.2f}x")


if __name__ == "__main__":
    main()
