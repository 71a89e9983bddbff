"""How a call is cut into chunks, and the loops over them: GEMMs, row kernels, objectives.

Two orders. *Token chunks* hold a few tokens' logits over the whole vocabulary, so a gradient row is
finished at once; they suit a frozen lm_head. *Vocabulary
chunks* hold all tokens' logits over a few columns and visit them twice, statistics first and
gradients second; each piece of the weight's gradient is then complete when it is written, so it
needs no accumulator, and until it is written its memory holds logits of the first visit, which
spares the second visit their GEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import row_state
from unilogit_kernels.backends import LogitTransform, RowKernels, SweepKernels
from unilogit_kernels.memory import allocate
from unilogit_kernels.objectives import Objective
from unilogit_kernels.projection import GemmDtypes, LinearHead, Needs, multiply

MEMORY_BUDGET = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Bytes that the buffers of one fused linear call may take, by device type."""

TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Bytes of one tile of logits in the vocabulary order; on CPU it should stay in the last cache."""

MIN_TILE_COLUMNS = 512
"""Below this many columns, a tile is cut along the tokens instead: thin GEMMs are slow."""

ALIGNED_COLUMNS = 64
"""Tiles are a multiple of this many columns wide, so that their rows start aligned."""

MIN_CHUNK_TOKENS = 16
"""Below this many tokens, token chunks would read the whole weight for too little work."""


class RowProblem(NamedTuple):
    """What the row kernels need beside the logits.

    Attributes:
        labels: int64 `[n]`.
        transform: What the model does to the raw logits.
        vocab_size: Size of the whole vocabulary, which `log(V - 1)` sees.
        kernels: The backend.
    """

    labels: Tensor
    transform: LogitTransform
    vocab_size: int
    kernels: RowKernels

    def at(self, tokens: slice) -> RowProblem:
        """The same for some of the rows."""
        return self._replace(labels=self.labels[tokens])


class Weighted(NamedTuple):
    """A separable objective and how its rows are weighted.

    Attributes:
        objective: `f`.
        row_weight: `[n]`; 0 drops a row, whatever it holds.
        factor: 0-d; what the weighted sum of values is multiplied by.
    """

    objective: Objective
    row_weight: Tensor
    factor: Tensor

    def at(self, tokens: slice) -> Weighted:
        """The same for some of the rows."""
        return self._replace(row_weight=self.row_weight[tokens])

    def total(self, values: Tensor) -> Tensor:
        """`factor * sum_i w_i f_i`, 0-d."""
        return self.factor * torch.where(self.row_weight == 0, 0.0, self.row_weight * values).sum()

    def slope_weight(self, *, fold_factor: bool) -> Tensor:
        """What `f'(d_i)` is multiplied by to give the slope of row i, `[n]`."""
        return self.row_weight * self.factor if fold_factor else self.row_weight


# ---- full logits -------------------------------------------------------------------------------


def logits_state(logits: Tensor, rows: RowProblem) -> Tensor:
    """The complete state `[3, n]` of logits `[n, V]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    state = row_state.empty_state(logits.shape[0], logits.device, dtype)
    real = logits[:, : rows.vocab_size]
    rows.kernels.log_odds_update(real, rows.labels, 0, state, rows.transform)
    return state


def logits_gradient(logits: Tensor, rows: RowProblem, state: Tensor, slope: Tensor) -> Tensor:
    """The gradient `[n, V]` for a slope per row, in the logits' dtype; padding columns get 0."""
    out = _empty_gradient(logits, rows.vocab_size)
    real = slice(0, rows.vocab_size)
    rows.kernels.log_odds_gradient(
        logits[:, real], rows.labels, 0, state, slope, out[:, real], rows.transform
    )
    return out


def logits_objective(
    logits: Tensor, rows: RowProblem, weighted: Weighted, *, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss (0-d) and its gradient `[n, V]`, without the factor if the dtype is float16."""
    out = _empty_gradient(logits, rows.vocab_size) if needs_gradient else None
    real = slice(0, rows.vocab_size)
    values = _finish_rows(
        logits[:, real],
        rows,
        weighted,
        None if out is None else out[:, real],
        fold_factor=logits.dtype != torch.float16,
    )
    return weighted.total(values), out


def _empty_gradient(logits: Tensor, vocab_size: int) -> Tensor:
    out = allocate(logits.shape, logits.dtype, logits.device)
    out[:, vocab_size:] = 0
    return out


def _finish_rows(
    logits: Tensor, rows: RowProblem, weighted: Weighted, out: Tensor | None, *, fold_factor: bool
) -> Tensor:
    """Values `f(d)` (`[n]`) of rows that hold the whole vocabulary; their gradients into `out`."""
    kernels, objective = rows.kernels, weighted.objective
    slope_weight = weighted.slope_weight(fold_factor=fold_factor)
    if isinstance(kernels, SweepKernels) and objective.name in kernels.swept_objectives:
        return kernels.log_odds_sweep(
            logits, rows.labels, slope_weight, objective.name, rows.vocab_size, out, rows.transform
        )
    state = logits_state(logits, rows)
    log_odds = row_state.log_odds(state, rows.labels, rows.vocab_size)
    if out is not None:
        slope = _slope(objective, log_odds, slope_weight, rows.vocab_size)
        kernels.log_odds_gradient(logits, rows.labels, 0, state, slope, out, rows.transform)
    return objective.value(log_odds, rows.vocab_size)


def _slope(objective: Objective, log_odds: Tensor, slope_weight: Tensor, vocab_size: int) -> Tensor:
    slope = slope_weight * objective.slope(log_odds, vocab_size)
    return torch.where(slope_weight == 0, 0.0, slope)


# ---- the plan of a fused linear call -----------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a fused linear call is cut; a function of shapes, dtypes and needs alone.

    Attributes:
        order: Which loop runs.
        tokens: Tokens per chunk or tile.
        columns: Vocabulary columns per chunk or tile.
        kept_tokens: How many leading tokens keep their logits in the weight's gradient between the
            two visits of the vocabulary order.
    """

    order: Literal["token_chunks", "vocabulary_chunks"]
    tokens: int
    columns: int
    kept_tokens: int = 0


def plan_linear(
    n: int,
    h: int,
    vocab_size: int,
    dtypes: GemmDtypes,
    input_dtype: torch.dtype,
    device_type: str,
    needs: Needs,
    *,
    visits: int,
) -> Plan:
    """Choose the order and the chunk sizes.

    Args:
        n: Tokens that count.
        h: Hidden size.
        vocab_size: Columns.
        dtypes: Of the GEMMs.
        input_dtype: Of hidden states and weight.
        device_type: `"cpu"`, `"cuda"`, ...
        needs: Which gradients this call computes.
        visits: 2 if statistics and gradients are computed in one call, else 1.
    """
    budget = MEMORY_BUDGET.get(device_type, MEMORY_BUDGET["cuda"])
    logits_bytes = dtypes.logits.itemsize
    row_bytes = logits_bytes + (0 if dtypes.operands == dtypes.logits else dtypes.operands.itemsize)
    fitting = budget // (vocab_size * row_bytes)
    casts_weight = input_dtype != dtypes.operands
    # At least two chunks either way: no call ever holds n * V elements.
    token_chunk = min((n + 1) // 2, fitting)
    if needs.any() and not needs.weight and not casts_weight and token_chunk >= MIN_CHUNK_TOKENS:
        return Plan("token_chunks", token_chunk, vocab_size)
    tile_elements = TILE_BYTES.get(device_type, TILE_BYTES["cuda"]) // row_bytes
    kept = 0
    # A row of the gradient must hold a whole number of logits.
    if visits == 2 and needs.weight and h * dtypes.results.itemsize % logits_bytes == 0:
        kept = min(n, h * dtypes.results.itemsize // logits_bytes)
    tokens = min(n, max(1, tile_elements // MIN_TILE_COLUMNS))
    columns = min((vocab_size + 1) // 2, max(1, tile_elements // tokens))
    if columns > ALIGNED_COLUMNS:
        columns -= columns % ALIGNED_COLUMNS
    return Plan("vocabulary_chunks", tokens, columns, kept)


def _slices(total: int, size: int, start: int = 0) -> Iterator[slice]:
    for first in range(start, total, size):
        yield slice(first, min(first + size, total))


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
    tiles = _token_tiles(n, plan)
    states = [
        row_state.empty_state(tokens.stop - tokens.start, device, head.dtypes.exact)
        for tokens in tiles
    ]
    scratch = _scratch(head, plan, tiles)
    for columns in _slices(rows.vocab_size, plan.columns):
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


def _token_tiles(n: int, plan: Plan) -> list[slice]:
    """Tiles that do not straddle the border between kept and recomputed tokens."""
    kept = [*_slices(plan.kept_tokens, plan.tokens)]
    return [*kept, *_slices(n, plan.tokens, start=plan.kept_tokens)]


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
    tiles = _token_tiles(head.hidden.shape[0], plan)
    scratch = _scratch(head, plan, tiles)
    gradient_rows = scratch
    if operands != scratch.dtype:
        gradient_rows = _buffer(head, scratch.numel(), operands)
    hidden_sum = d_hidden
    if d_hidden is not None and d_hidden.dtype != exact:
        hidden_sum = torch.empty_like(d_hidden, dtype=exact)
    for columns in _slices(rows.vocab_size, plan.columns):
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
    for tokens in _slices(head.hidden.shape[0], plan.tokens):
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
            values[tokens] = _finish_rows(
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
            slope = _slope(weighted.objective, log_odds, slope_weight, rows.vocab_size)
            _second_visit(head, rows, plan, state, slope, kept, gradients)
    if not fold:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(weighted.factor)
    return weighted.total(values), gradients


# ---- rows that count ---------------------------------------------------------------------------


def compacted_log_odds(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, rows: RowProblem
) -> tuple[Tensor, Tensor]:
    """Log-odds `[n]` and states `[3, n]`; rows that are not active get 0 and an empty state."""
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    n, dtype = hidden.shape[0], dtypes.exact
    index = _active_index(active)
    log_odds = hidden.new_zeros(n, dtype=dtype)
    state = row_state.empty_state(n, hidden.device, dtype)
    if index is not None and index.numel() == 0:
        return log_odds, state
    head, part = _select(hidden, weight, bias, rows, dtypes, index)
    plan = _plan(head, part, hidden.dtype, Needs(False, False, False), visits=1)
    part_state = linear_state(head, part, plan)
    part_log_odds = row_state.log_odds(part_state, part.labels, part.vocab_size)
    if index is None:
        return part_log_odds, part_state
    state[:, index] = part_state
    return log_odds.index_copy_(0, index, part_log_odds), state


def compacted_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowProblem,
    needs: Needs,
    state: Tensor,
    slope: Tensor,
) -> Gradients:
    """`linear_gradient` of the rows whose slope is not 0."""
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    index = _active_index(slope != 0)
    if index is not None and index.numel() == 0:
        return _zero_gradients(hidden, weight, dtypes, needs)
    head, part = _select(hidden, weight, bias, rows, dtypes, index)
    plan = _plan(head, part, hidden.dtype, needs, visits=1)
    if index is not None:
        state, slope = state[:, index], slope[index]
    gradients = linear_gradient(head, part, plan, needs, state, slope)
    return _scatter(gradients, hidden, index)


def compacted_objective(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowProblem,
    needs: Needs,
    weighted: Weighted,
) -> tuple[Tensor, Gradients]:
    """`linear_objective` of the rows whose weight is not 0."""
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    index = _active_index(weighted.row_weight != 0)
    if index is not None and index.numel() == 0:
        return weighted.factor.new_zeros(()), _zero_gradients(hidden, weight, dtypes, needs)
    head, part = _select(hidden, weight, bias, rows, dtypes, index)
    plan = _plan(head, part, hidden.dtype, needs, visits=2)
    if index is not None:
        weighted = weighted._replace(row_weight=weighted.row_weight[index])
    loss, gradients = linear_objective(head, part, plan, needs, weighted)
    return loss, _scatter(gradients, hidden, index)


def _active_index(active: Tensor) -> Tensor | None:
    """Positions of the active rows, or None if all are."""
    index = active.nonzero()[:, 0]
    return None if 0 < index.numel() == active.numel() else index


def _select(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowProblem,
    dtypes: GemmDtypes,
    index: Tensor | None,
) -> tuple[LinearHead, RowProblem]:
    if index is not None:
        hidden = hidden[index]
        rows = rows._replace(labels=rows.labels[index])
    return LinearHead(hidden.to(dtypes.operands), weight, bias, dtypes), rows


def _plan(
    head: LinearHead, rows: RowProblem, input_dtype: torch.dtype, needs: Needs, *, visits: int
) -> Plan:
    n, h = head.hidden.shape
    device_type = head.hidden.device.type
    return plan_linear(
        n, h, rows.vocab_size, head.dtypes, input_dtype, device_type, needs, visits=visits
    )


def _scatter(gradients: Gradients, hidden: Tensor, index: Tensor | None) -> Gradients:
    if index is None or gradients.hidden is None:
        return gradients
    full = gradients.hidden.new_zeros(hidden.shape)
    return gradients._replace(hidden=full.index_copy_(0, index, gradients.hidden))


def _zero_gradients(hidden: Tensor, weight: Tensor, dtypes: GemmDtypes, needs: Needs) -> Gradients:
    return Gradients(
        hidden.new_zeros(hidden.shape, dtype=dtypes.results) if needs.hidden else None,
        weight.new_zeros(weight.shape, dtype=dtypes.results) if needs.weight else None,
        weight.new_zeros(weight.shape[0], dtype=dtypes.exact) if needs.bias else None,
    )
