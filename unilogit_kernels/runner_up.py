"""The likeliest token other than the label, for hinge losses and margins."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels import calls
from unilogit_kernels.compaction import NOTHING, LinearInputs
from unilogit_kernels.inputs import LossCall
from unilogit_kernels.memory import allocate
from unilogit_kernels.plan import plan_linear, slices

BLOCK_ELEMENTS = 1 << 20
"""Logits looked at at a time, which bounds the copy that the label is taken out of."""


@torch.no_grad()
def runner_up(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The token with the largest logit other than the label's, the first of equal ones.

    What a loss needs of it is differentiable once it is taken as a label itself: with
    `d = target_log_odds(logits, labels)` and `e = target_log_odds(logits, runner_up(...))`, the
    inverted hinge loss of LoKU (arXiv 2408.06621) is `1 + sigmoid(d) - sigmoid(e)`, and the margin
    of the two logits is `logsigmoid(d) - logsigmoid(e)`. A cap is monotone and changes nothing.

    Args:
        logits: As in `unilogit_loss`.
        labels: As in `unilogit_loss`.
        ignore_index: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`; only its sign matters.
        vocab_size: As in `unilogit_loss`.

    Returns:
        int64 `[...]`; `ignore_index` at ignored positions. A row of NaN gives the NaN's index, so
        that its log-odds are NaN.

    Raises:
        TypeError: As `unilogit_loss`.
        ValueError: As `unilogit_loss`.
        IndexError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> runner_up(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([2])
    """
    operands, call = calls.from_logits(
        logits,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        token_weights=None,
        num_items_in_batch=None,
        softcap=None,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=None,
    )
    assert operands.logits is not None
    real, found = operands.logits[:, : call.vocab_size], []
    for rows in slices(real.shape[0], max(1, BLOCK_ELEMENTS // call.vocab_size)):
        found.append(_largest_other(real[rows].clone(), call.labels[rows], 0, call)[1])
    return _result(torch.cat(found) if found else call.labels, call, ignore_index)


@torch.no_grad()
def linear_runner_up(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """`runner_up` of `hidden @ weight.T + bias`, without ever holding these logits: one GEMM.

    Args:
        hidden: As in `linear_unilogit_loss`.
        weight: As in `linear_unilogit_loss`.
        labels: As in `unilogit_loss`.
        bias: `[V]` or None.
        ignore_index: As in `unilogit_loss`.
        logit_scale: As in `runner_up`.
        vocab_size: As in `unilogit_loss`.
        memory_budget: As in `linear_unilogit_loss`.
        logits_dtype: As in `linear_unilogit_loss`.

    Returns:
        As `runner_up`.

    Raises:
        TypeError: As `linear_unilogit_loss`.
        ValueError: As `unilogit_loss`.
        IndexError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_target_log_odds
        >>> hidden, weight = torch.randn(4, 8), torch.randn(100, 8, requires_grad=True)
        >>> labels = torch.arange(4)
        >>> other = linear_runner_up(hidden, weight, labels)
        >>> d, e = (linear_target_log_odds(hidden, weight, y) for y in (labels, other))
        >>> inverted_hinge = (1 + torch.sigmoid(d) - torch.sigmoid(e)).mean()
        >>> inverted_hinge.backward()
    """
    operands, call = calls.from_linear(
        hidden,
        weight,
        bias,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        token_weights=None,
        num_items_in_batch=None,
        softcap=None,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=None,
        memory_budget=memory_budget,
        logits_dtype=logits_dtype,
        skip_below=0.0,
        compact=True,
    )
    assert operands.hidden is not None
    assert operands.weight is not None
    inputs = LinearInputs(
        operands.hidden, operands.weight, operands.bias, call.logits_dtype, call.options
    )
    active = call.row_weight != 0
    index = inputs.positions(active)
    head = inputs.head(active, index)
    wanted = call.labels if index is None else call.labels[index]
    m = wanted.numel()
    best = torch.full((m,), -torch.inf, dtype=inputs.dtypes.exact, device=wanted.device)
    other = torch.zeros_like(wanted)
    if m:
        plan = plan_linear(inputs.shape(m, call.vocab_size, NOTHING), call.options, visits=1)
        tokens_at_once, columns_at_once = min(plan.tokens, m), plan.tile_columns
        scratch = allocate((tokens_at_once * columns_at_once,), head.dtypes.logits, wanted.device)
        for columns in slices(call.vocab_size, columns_at_once):
            part = head.weight_columns(columns)
            for tokens in slices(m, tokens_at_once):
                shape = (tokens.stop - tokens.start, columns.stop - columns.start)
                tile = scratch[: shape[0] * shape[1]].view(shape)
                head.project(tokens, columns, part, out=tile)
                value, where = _largest_other(tile, wanted[tokens], columns.start, call)
                better = (value > best[tokens]) | value.isnan()
                best[tokens] = torch.where(better, value, best[tokens])
                other[tokens] = torch.where(better, where, other[tokens])
    if index is not None:
        other = torch.zeros_like(call.labels).index_copy_(0, index, other)
    return _result(other, call, ignore_index)


def _largest_other(
    tile: Tensor, labels: Tensor, first_column: int, call: LossCall
) -> tuple[Tensor, Tensor]:
    """Largest entry of each row but the label's, in float32 at least, and its token.

    `tile`, which holds columns from `first_column` on, is overwritten.
    """
    if call.transform.scale < 0:
        tile.neg_()
    column = (labels - first_column)[:, None]
    inside = (column >= 0) & (column < tile.shape[1])
    column = column.clamp(0, tile.shape[1] - 1)
    # The label's column of another tile stays as it is.
    tile.scatter_(1, column, torch.where(inside, -torch.inf, tile.gather(1, column)))
    value, where = tile.max(1)
    return value.to(torch.promote_types(tile.dtype, torch.float32)), where + first_column


def _result(other: Tensor, call: LossCall, ignore_index: int) -> Tensor:
    # Where every other logit is -inf, any other token is as good.
    other = torch.where(other == call.labels, (other + 1) % call.vocab_size, other)
    return torch.where(call.row_weight != 0, other, ignore_index).reshape(call.shape)
