"""The metrics once more, as their papers and OpenUnlearning write them: over whole rows of logits.

Nothing here comes from the package.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def predictions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`log p` of every token `[n, V]` where the next one is labelled, and those labels `[n]`."""
    counted = labels[1:] != -100
    return torch.log_softmax(logits[:-1], dim=-1)[counted], labels[1:][counted]


def loss(log_p: Tensor, labels: Tensor) -> float:
    return float(torch.nn.functional.nll_loss(log_p, labels))


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    product = 1.0
    for each in wrong:
        product *= np.exp(-each)
    return float(product ** (1 / len(wrong)) / (np.exp(-right) + 1e-10))


def exact_memorization(log_p: Tensor, labels: Tensor) -> float:
    return float((log_p.argmax(-1) == labels).float().mean())


def extraction_strength(log_p: Tensor, labels: Tensor, *, least: bool) -> float:
    predicted, n = log_p.argmax(-1), len(labels)
    for k in range(n):
        if torch.equal(predicted[k:], labels[k:]):
            return 1 - k / n
    return 1 / n if least else 0.0


def _lowest(scores: list[float], share: float) -> float:
    number = max(1, int(len(scores) * share))
    return -sum(sorted(scores)[:number]) / number


def min_k(log_p: Tensor, labels: Tensor, share: float = 0.4) -> float:
    return _lowest(log_p.gather(1, labels[:, None])[:, 0].tolist(), share)


def min_k_plus_plus(log_p: Tensor, labels: Tensor, share: float = 0.4) -> float:
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    variance = (p * log_p.square()).sum(-1) - mean.square()
    own = log_p.gather(1, labels[:, None])[:, 0]
    return _lowest(((own - mean) / variance.clamp(min=1e-6).sqrt()).tolist(), share)


def kl(first: Tensor, second: Tensor) -> float:
    """The mean over tokens of KL(first || second), from their `log p` `[n, V]`."""
    return float((first.exp() * (first - second)).sum(-1).mean())


def auc(forget: NDArray[np.float64], holdout: NDArray[np.float64]) -> float:
    """By counting pairs."""
    pairs = [(b > a) + 0.5 * (b == a) for a in forget for b in holdout]
    return float(np.mean(pairs))
