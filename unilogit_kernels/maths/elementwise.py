"""Elementwise functions that objectives and divergences share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, accurate for every x in float32 and float64; NaN and infinities pass.

    `torch.nn.functional.softplus` returns `x` above 20, which float64 can tell apart.
    """
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def uniform_log_odds(vocab_size: int) -> float:
    """`u = -log(V - 1)`: the log-odds of a token that has probability `1/V`."""
    return -math.log(vocab_size - 1)
