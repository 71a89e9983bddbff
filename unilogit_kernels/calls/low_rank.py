"""A low-rank term of an lm_head: what a user passes, and what an operator takes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.calls.validation import (
    cast_for_autocast,
    check_device,
    check_float,
    statistics_dtype,
)
from unilogit_kernels.calls.vocab_parallel import is_dtensor


class LowRank(NamedTuple):
    """A low-rank term of an lm_head, as LoRA adds it (arXiv 2106.09685).

    The logits are `hidden @ weight.T + scale * (hidden @ a.T) @ b.T + bias`. No product of `b` and
    `a`, and no copy of the weight, is ever made; gradients reach hidden states, `a` and `b`.

    Attributes:
        a: `[r, H]`, into the low-rank space (LoRA's A), in hidden's dtype, or in float32 beside
            16-bit hidden states, as PEFT keeps it.
        b: `[V, r]`, out of it (LoRA's B), in a's dtype. Where ranks share the vocabulary, this
            rank's rows.
        scale: What the term is multiplied by (LoRA's `alpha / r`).
        dropout: Probability with which an entry of the hidden states does not enter `a`; the
            others are then multiplied by `1 / (1 - dropout)`. Drawn anew in each call. 0 outside of
            training.

    Example:
        >>> import torch
        >>> from unilogit_kernels import LowRank, linear_unilogit_loss
        >>> hidden, weight = torch.randn(4, 16), torch.randn(1000, 16)
        >>> a, b = torch.randn(2, 16), torch.zeros(1000, 2, requires_grad=True)
        >>> adapter = LowRank(a, b, scale=2.0)
        >>> linear_unilogit_loss(hidden, weight, torch.arange(4), adapter=adapter).backward()
        >>> b.grad.shape
        torch.Size([1000, 2])
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    dropout: float = 0.0


class Term(NamedTuple):
    """What an operator takes of a low-rank term: see `ops.heads.Head`."""

    inner: Tensor | None = None
    up: Tensor | None = None


def check_low_rank(
    adapter: Any, hidden: Tensor, weight: Tensor, *, prefix: str = ""
) -> LowRank | None:
    """Check a low-rank term beside an lm_head that has been checked; under autocast, cast it.

    Args:
        adapter: As the user gave it.
        hidden: `[..., H]`.
        weight: `[V, H]`.
        prefix: Part of the names.

    Raises:
        TypeError: It is no `LowRank`, or a dtype is wrong.
        ValueError: A shape, device or number is wrong.
    """
    if adapter is None:
        return None
    name = f"{prefix}adapter"
    if not isinstance(adapter, LowRank):
        raise TypeError(
            f"{name} must be one LowRank(a, b, scale) or None, got {type(adapter).__name__}; "
            "several low-rank terms are one whose a and b are theirs side by side"
        )
    if is_dtensor(adapter.a) or is_dtensor(adapter.b):
        raise ValueError(
            f"{name}.a and {name}.b must be plain tensors, got a DTensor: pass {name}.a whole, and "
            f"of {name}.b the rows that this rank's {prefix}weight has"
        )
    a, b = cast_for_autocast(adapter.a), cast_for_autocast(adapter.b)
    check_float(f"{name}.a", a)
    check_float(f"{name}.b", b)
    (v, h), fits = weight.shape, a.dim() == 2 == b.dim()
    if not fits or a.shape[1] != h or b.shape != (v, a.shape[0]) or a.shape[0] == 0:
        raise ValueError(
            f"{name}.a must have shape [r, H] and {name}.b [V, r] of one r >= 1, for "
            f"{prefix}weight [V, H] = {[v, h]}, got {list(a.shape)} and {list(b.shape)}"
        )
    allowed = hidden.dtype, statistics_dtype(hidden.dtype)
    if a.dtype not in allowed or b.dtype != a.dtype:
        raise TypeError(
            f"{name}.a and {name}.b must both be {' or '.join(map(str, dict.fromkeys(allowed)))} "
            f"for {prefix}hidden of {hidden.dtype}, got {a.dtype} and {b.dtype}"
        )
    for part, tensor in (("a", a), ("b", b)):
        check_device(f"{name}.{part}", tensor, f"{prefix}hidden", hidden)
    if not math.isfinite(adapter.scale):
        raise ValueError(f"{name}.scale must be a finite number, got {adapter.scale}")
    if not 0.0 <= adapter.dropout < 1.0:
        raise ValueError(f"{name}.dropout must be in [0, 1), got {adapter.dropout}")
    return LowRank(a, b, float(adapter.scale), float(adapter.dropout))


def term_of(adapter: LowRank | None, hidden: Tensor, active: Tensor) -> Term:
    """The term on hidden states `[n, H]`, differentiable; no row counts that is not active.

    What such a row holds must not reach the gradient of `a`, which is a sum over all rows.
    """
    if adapter is None:
        return Term()
    rows = hidden.masked_fill(~active[:, None], 0.0).to(adapter.a.dtype)
    if adapter.dropout:
        rows = torch.nn.functional.dropout(rows, adapter.dropout)
    return Term(adapter.scale * torch.nn.functional.linear(rows, adapter.a), adapter.b)
