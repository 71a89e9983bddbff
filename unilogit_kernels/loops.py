"""The chunk loops of a fused linear call: GEMMs, row kernels and objectives, tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import row_state
from unilogit_kernels.memory import allocate
from unilogit_kernels.plan import Plan, slices, token_tiles
from unilogit_kernels.projection import LinearHead, Needs, multiply
from unilogit_kernels.rows import RowProblem, Weighted, finish_rows, row_slope


class Gradients(NamedTuple):
    """Gradients of a fused linear call, each in `GemmDtypes.results`, or None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# ---- fused linear: statistics ------------------------------------------------------------------


def linear_state(head: LinearHead, rows: RowProblem, plan: Plan) -> Tensor:
    """The complete state `[3, n]` of the logits of `head`, of which one tile exists at a time."""
    return _first_visit(head, rows, plan, kept=None)


def _first_visit(
    head: LinearHead, rows: RowProblem, plan: Plan, kept: _KeptLogits | None
) -> Tensor:
    n, device = head.hidden.shape[0], head.hidden.device
    tiles = token_tiles(n, plan)
    states = [
        row_state.empty_state(tokens.stop - tokens.start, device, head.dtypes.exact)
        for tokens in tiles
    ]
    scratch = _scratch(head, plan, tiles)
    for columns in slices(rows.vocab_size, plan.columns):
        weight = head.weight_columns(columns)
        for tokens, state in zip(tiles, states, strict=True):
            if kept is not None and tokens.stop <= plan.kept_tokens:
                tile = kept.tile(tokens, columns)
            else:
                tile = _tile(scratch, tokens, columns)
            head.project(tokens, columns, weight, out=tile)
            labels = rows.labels[tokens]
            rows.kernels.log_odds_update(tile, labels, columns.start, state, rows.transform)
    return torch.cat(states, dim=1)


def _scratch(head: LinearHead, plan: Plan, tiles: list[slice]) -> Tensor:
    tokens = max(tile.stop - tile.start for tile in tiles)
    return _buffer(head, tokens * plan.columns, head.dtypes.logits)


def _buffer(head: LinearHead, elements: int, dtype: torch.dtype) -> Tensor:
    return allocate((elements,), dtype, head.hidden.device)


def _tile(scratch: Tensor, tokens: slice, columns: slice) -> Tensor:
    """A contiguous `[tokens, columns]` view of the front of a flat buffer."""
    shape = (tokens.stop - tokens.start, columns.stop - columns.start)
    return scratch[: shape[0] * shape[1]].view(shape)


class _KeptLogits:
    """Logits kept in the memory of a weight gradient that is not written yet.

    Columns `[a, b)` of the vocabulary own rows `[a, b)` of the gradient, `(b - a) * h` elements,
    which hold the logits of these columns for up to `h` tokens (`h / 2` where float32 logits are
    kept in a 16-bit gradient).
    """

    def __init__(self, weight_gradient: Tensor, dtype: torch.dtype, kept_tokens: int) -> None:
        self._gradient, self._dtype, self._kept_tokens = weight_gradient, dtype, kept_tokens

    def tile(self, tokens: slice, columns: slice) -> Tensor:
        v = columns.stop - columns.start
        memory = self._gradient[columns].view(-1).view(self._dtype)
        kept = memory[: self._kept_tokens * v].view(self._kept_tokens, v)
        return kept[tokens]


# ---- fused linear: gradients for slopes that are known -----------------------------------------


def linear_gradient(
    head: LinearHead, rows: RowProblem, plan: Plan, needs: Needs, state: Tensor, slope: Tensor
) -> Gradients:
    """Gradients of `sum_i slope_i d_i`, recomputing the logits tile by tile."""
    gradients = _allocate(head, rows, needs)
    if plan.order == "vocabulary_chunks":
        _second_visit(head, rows, plan, state, slope, None, gradients)
        return gradients

    def gradient_rows(tokens: slice, logits: Tensor, out: Tensor) -> None:
        rows.kernels.log_odds_gradient(
            logits,
            rows.labels[tokens],
            0,
            state[:, tokens].contiguous(),
            slope[tokens],
            out,
            rows.transform,
        )

    _by_tokens(head, rows, plan, gradients, gradient_rows)
    return gradients


def _second_visit(
    head: LinearHead,
    rows: RowProblem,
    plan: Plan,
    state: Tensor,
    slope: Tensor,
    kept: _KeptLogits | None,
    gradients: Gradients,
) -> None:
    d_hidden, d_weight, d_bias = gradients
    exact, operands = head.dtypes.exact, head.dtypes.operands
    tiles = token_tiles(head.hidden.shape[0], plan)
    scratch = _scratch(head, plan, tiles)
    gradient_rows = scratch
    if operands != scratch.dtype:
        gradient_rows = _buffer(head, scratch.numel(), operands)
    hidden_sum = d_hidden
    if d_hidden is not None and d_hidden.dtype != exact:
        hidden_sum = torch.empty_like(d_hidden, dtype=exact)
    for columns in slices(rows.vocab_size, plan.columns):
        weight = head.weight_columns(columns)
        weight_sum = None
        if d_weight is not None:
            weight_sum = d_weight[columns]
            # Several tiles add up in float32, and not where logits are still kept.
            if len(tiles) > 1 and (kept is not None or weight_sum.dtype != exact):
                weight_sum = torch.empty_like(weight_sum, dtype=exact)
        for i, tokens in enumerate(tiles):
            out = _tile(gradient_rows, tokens, columns)
            if kept is not None and tokens.stop <= plan.kept_tokens:
                logits = kept.tile(tokens, columns)
            else:
                logits = _tile(scratch, tokens, columns)
                head.project(tokens, columns, weight, out=logits)
            rows.kernels.log_odds_gradient(
                logits,
                rows.labels[tokens],
                columns.start,
                state[:, tokens].contiguous(),
                slope[tokens],
                out,
                rows.transform,
            )
            if hidden_sum is not None:
                multiply(out, weight, hidden_sum[tokens], accumulate=columns.start > 0)
            if weight_sum is not None:
                multiply(out.t(), head.hidden[tokens], weight_sum, accumulate=i > 0)
            if d_bias is not None:
                d_bias[columns] += out.sum(0, dtype=exact)
        if d_weight is not None and weight_sum is not None:
            _store(d_weight[columns], weight_sum)
    if d_hidden is not None and hidden_sum is not None:
        _store(d_hidden, hidden_sum)


def _store(gradient: Tensor, total: Tensor) -> None:
    if total.data_ptr() != gradient.data_ptr():
        gradient.copy_(total)


def _allocate(head: LinearHead, rows: RowProblem, needs: Needs) -> Gradients:
    results, exact = head.dtypes.results, head.dtypes.exact
    weight = bias = None
    if needs.weight:
        weight = allocate(head.weight.shape, results, head.weight.device)
        weight[rows.vocab_size :] = 0
    if needs.bias:
        bias = head.weight.new_zeros(head.weight.shape[0], dtype=exact)
    hidden = head.hidden.new_empty(head.hidden.shape, dtype=results) if needs.hidden else None
    return Gradients(hidden, weight, bias)


def _by_tokens(
    head: LinearHead,
    rows: RowProblem,
    plan: Plan,
    gradients: Gradients,
    gradient_rows: Callable[[slice, Tensor, Tensor], None],
) -> None:
    """For each chunk of tokens: project, `gradient_rows(tokens, logits, out)`, hidden's GEMM."""
    vocabulary = slice(0, rows.vocab_size)
    weight = head.weight_columns(vocabulary)
    dtypes = head.dtypes
    buffer = _buffer(head, plan.tokens * rows.vocab_size, dtypes.logits)
    out_buffer = buffer
    if dtypes.operands != dtypes.logits:
        out_buffer = _buffer(head, buffer.numel(), dtypes.operands)
    for tokens in slices(head.hidden.shape[0], plan.tokens):
        logits, out = _tile(buffer, tokens, vocabulary), _tile(out_buffer, tokens, vocabulary)
        head.project(tokens, vocabulary, weight, out=logits)
        gradient_rows(tokens, logits, out)
        if gradients.hidden is not None:
            multiply(out, weight, gradients.hidden[tokens])
        if gradients.bias is not None:
            gradients.bias[vocabulary] += out.sum(0, dtype=dtypes.exact)


# ---- fused linear: a separable objective, gradients included -----------------------------------


def linear_objective(
    head: LinearHead, rows: RowProblem, plan: Plan, needs: Needs, weighted: Weighted
) -> tuple[Tensor, Gradients]:
    """The loss (0-d) and its gradients, all in one call: 3 GEMMs, or 2 with a frozen weight."""
    fold = head.dtypes.rows_hold_factor
    gradients = _allocate(head, rows, needs)
    if plan.order == "token_chunks":
        values = head.hidden.new_empty(head.hidden.shape[0], dtype=head.dtypes.exact)

        def gradient_rows(tokens: slice, logits: Tensor, out: Tensor) -> None:
            values[tokens] = finish_rows(
                logits, rows.at(tokens), weighted.at(tokens), out, fold_factor=fold
            )

        _by_tokens(head, rows, plan, gradients, gradient_rows)
    else:
        kept = None
        if gradients.weight is not None and plan.kept_tokens:
            kept = _KeptLogits(gradients.weight, head.dtypes.logits, plan.kept_tokens)
        state = _first_visit(head, rows, plan, kept)
        log_odds = row_state.log_odds(state, rows.labels, rows.vocab_size)
        values = weighted.objective.value(log_odds, rows.vocab_size)
        if needs.any():
            slope_weight = weighted.slope_weight(fold_factor=fold)
            slope = row_slope(weighted.objective, log_odds, slope_weight, rows.vocab_size)
            _second_visit(head, rows, plan, state, slope, kept, gradients)
    if not fold:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(weighted.factor)
    return weighted.total(values), gradients
