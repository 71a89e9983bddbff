"""What is tried to bring back what was forgotten: learning a part of it again, rounding weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unilogit_kernels.unlearning.benchmarks.sets import Role
from unilogit_kernels.unlearning.comparison.measure import Looker
from unilogit_kernels.unlearning.comparison.parts import LearnPlan, RobustnessPlan
from unilogit_kernels.unlearning.comparison.subject import Bench, Subject
from unilogit_kernels.unlearning.comparison.training import learn
from unilogit_kernels.unlearning.evaluation import token_probabilities
from unilogit_kernels.unlearning.layers import decoder_layers

_ROUNDED: tuple[Role, ...] = ("forget", "neighbours", "retain")
"""Sets that a model with rounded weights is asked."""
_GROUP = 64
"""Weights of a row that share one scale, as usual for 4 bits."""


def robustness_of(
    bench: Bench,
    subject: Subject,
    plan: RobustnessPlan,
    looker: Looker,
    learning: LearnPlan,
    split_seed: int,
    scratch: Path,
) -> dict[str, Any]:
    """Try what the plan says; the model is another one afterwards.

    Args:
        bench: the rows.
        subject: the model.
        plan: what is tried.
        looker: looks at the model.
        learning: whose batch size relearning takes.
        split_seed: of the halves of the forget rows.
        scratch: folder for the Trainer.

    Returns:
        For JSON: `rounded`, a look; and `relearned`, the probability of a forget answer before and
        after, by half: of the rows that were learned again, and of the `others`.
    """
    found: dict[str, Any] = {}
    if plan.bits:
        with rounded(subject.whole, plan.bits):
            found["rounded"] = looker.look(subject.whole, looker.plainly_fed(_ROUNDED))
    if plan.relearn_steps:
        found["relearned"] = _relearn(bench, subject, plan, learning, split_seed, scratch)
    return found


@contextmanager
def rounded(model: nn.Module, bits: int) -> Iterator[None]:
    """Round the weights of the decoder layers' linear maps, each group to `2^bits - 1` numbers.

    The levels are those of symmetric round-to-nearest: multiples of the group's largest absolute
    value over `2^(bits - 1) - 1`. The weights come back afterwards.

    Args:
        model: a Hugging Face causal LM.
        bits: of a weight.
    """
    linear = [m for m in decoder_layers(model).modules() if isinstance(m, nn.Linear)]
    before = [module.weight.detach().clone() for module in linear]
    with torch.no_grad():
        for module in linear:
            module.weight.copy_(round_to(module.weight, bits))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, weight in zip(linear, before, strict=True):
                module.weight.copy_(weight)


def round_to(weight: Tensor, bits: int) -> Tensor:
    """A matrix with each group of 64 numbers of a row rounded; see `rounded`.

    Args:
        weight: `[rows, columns]`, floating point.
        bits: at least 2.

    Example:
        >>> import torch
        >>> round_to(torch.tensor([[7.0, 2.4, -0.6]]), 4)
        tensor([[ 7.,  2., -1.]])
    """
    levels = 2 ** (bits - 1) - 1
    parts = []
    for group in weight.split(_GROUP, dim=1):
        scale = group.abs().amax(dim=1, keepdim=True) / levels
        parts.append(torch.where(scale > 0, (group / scale).round() * scale, group))
    return torch.cat(parts, dim=1)


def _relearn(
    bench: Bench,
    subject: Subject,
    plan: RobustnessPlan,
    learning: LearnPlan,
    split_seed: int,
    scratch: Path,
) -> dict[str, dict[str, float]]:
    rows = bench.fed(subject, "learn_forget", bench.training["learn_forget"])
    order = list(range(len(rows)))
    random.Random(f"relearn/{split_seed}").shuffle(order)
    half = max(1, len(rows) // 2)
    halves = {"learned": order[:half], "others": order[half:] or order[:half]}

    def probabilities() -> dict[str, float]:
        found = token_probabilities(
            subject.trained, rows, pad_id=bench.pad_id, batch_size=learning.batch_size
        )
        return {name: float(found[positions].mean()) for name, positions in halves.items()}

    before = probabilities()
    again = LearnPlan(
        steps=plan.relearn_steps,
        batch_size=learning.batch_size,
        learning_rate=plan.relearn_rate,
        warmup_steps=0,
        seed=split_seed,
    )
    learn(subject, [rows[n] for n in halves["learned"]], again, bench, scratch)
    return {"before": before, "after": probabilities()}
