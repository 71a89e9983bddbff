"""Logits that exist as a whole: their state, and the gradient of their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.rows.contract import Rows


def logits_state(logits: Sequence[Tensor], rows: Rows) -> Tensor:
    """The complete state `[k, n]` of each model's logits `[n, V]`."""
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    state = rows.empty_state(logits[0].shape[0], logits[0].device, dtype)
    if rows.columns:
        rows.update([real_columns(z, rows.columns) for z in logits], 0, state)
    return rows.complete(state)


def logits_gradient(
    logits: Sequence[Tensor], rows: Rows, state: Tensor, upstream: Tensor
) -> Tensor:
    """The gradient `[n, V]` of the rows' values, in the logits' dtype; padding columns get 0."""
    out = empty_gradient(logits[0], rows.columns)
    if not rows.columns:
        return out
    slope = rows.slope(state, upstream)
    real = [real_columns(z, rows.columns) for z in (*logits, out)]
    rows.gradient(real[:-1], 0, state, slope, real[-1])
    return out


def empty_gradient(logits: Tensor, columns: int) -> Tensor:
    """Memory for the gradient of logits `[n, V]`, with 0 in the padding columns."""
    out = allocate(logits.shape, logits.dtype, logits.device)
    if columns < out.shape[1]:
        out[:, columns:] = 0
    return out


def real_columns(logits: Tensor, columns: int) -> Tensor:
    """Rows `[n, V]` without padding columns."""
    return logits if columns == logits.shape[1] else logits[:, :columns]
