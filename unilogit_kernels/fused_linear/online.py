"""The fused linear of a frozen lm_head in one pass over the vocabulary: two GEMMs, no logit saved.

The gradient of a token's log-odds is `dd/dhidden = W_y - sum_{j != y} r_j W_j`, and the rest's
distribution `r` is a softmax. So its sum runs along with the statistics, as the output of
attention does in FlashAttention (arXiv 2205.14135): each chunk of columns adds its rows under the
statistics so far, after what was added before is scaled to them. The slope comes last, as a factor
of a finished row; what a loss gives every column alike (label smoothing) multiplies the sum of the
weight's rows. Row kernels and GEMMs therefore see chunks of columns that fit into a cache,
however long the vocabulary is, and all tokens at once. Ranks that share a vocabulary each sum over
their own columns; the share that these have of the whole rest is one more factor of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.fused_linear.budget import per_device
from unilogit_kernels.fused_linear.gemm import GemmDtypes, LinearHead, OperandRows
from unilogit_kernels.fused_linear.hidden_sum import HiddenSum
from unilogit_kernels.fused_linear.plan import Plan
from unilogit_kernels.fused_linear.tiles import slices, tile_view
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.statistics import AT_LABEL, REST, UNIFORM
from unilogit_kernels.rows.objective import RowProblem

LABEL_ROWS = {"cpu": 256, "cuda": 2048}
"""Tokens whose labels' weight rows are gathered at a time: 4 MiB in float32 at h = 4096 on CPUs,
32 MiB on GPUs, where few launches count for more."""


def gradient_online(
    head: LinearHead,
    rows: RowProblem,
    plan: Plan,
    slope_of: Callable[[Tensor, slice], Tensor],
    d_hidden: Tensor,
) -> Tensor:
    """Write the hidden states' gradient of `sum_i slope_i d_i`; returns the states.

    Args:
        head: With the tokens that count.
        rows: Their labels, and the kernels.
        plan: In the order `online`.
        slope_of: From the complete states of some tokens, and which they are, to their slopes.
        d_hidden: `[n, h]`, to be written.
    """
    groups = list(slices(head.hidden.shape[0], plan.tokens))
    if rows.shard is None:
        states = []
        for tokens in groups:
            out = total = d_hidden[tokens]
            if out.dtype != head.dtypes.exact:
                total = allocate(out.shape, head.dtypes.exact, out.device)
            part = _sum_rest(head, rows.at(tokens), plan, tokens, total)
            _finish(head, rows, tokens, part, part.state, slope_of, total)
            if out is not total:
                out.copy_(total)
            states.append(part.state)
        return torch.cat(states, dim=1) if len(states) > 1 else states[0]
    sums = HiddenSum(d_hidden, head.dtypes, rows.shard)
    parts = [_sum_rest(head, rows.at(t), plan, t, sums.memory[t]) for t in groups]
    state = rows.complete(torch.cat([part.state for part in parts], dim=1))
    for tokens, part in zip(groups, parts, strict=True):
        whole = state[:, tokens].contiguous()
        _finish(head, rows, tokens, part, whole, slope_of, sums.memory[tokens])
    sums.complete()
    sums.finish()
    return state


class _Part(NamedTuple):
    """What one pass over these columns knows of some tokens.

    Attributes:
        state: Of these columns.
        label_entry: `t_y`, `[m]`; 0 where the label is in none of them.
        every_row: `sum_j W_j`, `[h]`, where the loss asks for it.
    """

    state: Tensor
    label_entry: Tensor
    every_row: Tensor | None


def _finish(
    head: LinearHead,
    rows: RowProblem,
    tokens: slice,
    part: _Part,
    state: Tensor,
    slope_of: Callable[[Tensor, slice], Tensor],
    total: Tensor,
) -> None:
    """Make gradients, `[m, h]`, of what `_sum_rest` wrote; `state` is of the whole vocabulary."""
    slope = slope_of(state, tokens)
    of_rest, of_label, uniform = slope, slope, None
    if slope.dim() > 1:
        of_rest, of_label, uniform = slope[REST], slope[AT_LABEL], slope[UNIFORM]
    factor = of_rest
    if state is not part.state:
        factor = of_rest * row_state.rest_share(part.state, state)
    # A row of slope 0 gets no gradient, whatever it holds.
    total.mul_(factor[:, None]).masked_fill_(of_rest.logical_not()[:, None], 0.0)
    if part.every_row is not None and uniform is not None:
        total.addr_(uniform * rows.transform.scale, part.every_row)
        of_label = of_label - uniform
    label_entry = (part.label_entry * of_label).masked_fill_(of_label == 0, 0.0)
    if rows.columns:
        _add_labels(head, _own_labels(rows)[tokens], label_entry, total)


def _own_labels(rows: RowProblem) -> Tensor:
    """The labels, counted from the first column that this process holds."""
    return rows.labels if rows.shard is None else rows.labels - rows.shard.first_column


def _sum_rest(
    head: LinearHead, rows: RowProblem, plan: Plan, tokens: slice, total: Tensor
) -> _Part:
    """Write `-sum_{j != y} r_j t_j W_j`; `t_j` is the derivative of the logit transform."""
    dtypes, device, m = head.dtypes, head.hidden.device, tokens.stop - tokens.start
    hidden = OperandRows((head,), m).at(tokens)[0]
    state = rows.empty_state(m, device, dtypes.exact)
    one = torch.ones(m, device=device, dtype=dtypes.exact)
    label_entry, every_row = torch.zeros_like(one), None
    if rows.needs.mean:
        every_row = torch.zeros(head.hidden.shape[1], device=device, dtype=dtypes.exact)
    scratch = allocate((m * plan.columns,), dtypes.logits, device)
    row_scratch = None
    if dtypes.operands != dtypes.logits:
        row_scratch = allocate((m * plan.columns,), dtypes.operands, device)
    labels = _own_labels(rows)
    if not rows.columns:
        total.zero_()
    for columns in slices(rows.columns, plan.columns):
        logits = tile_view(scratch, tokens, columns)
        out = logits if row_scratch is None else tile_view(row_scratch, tokens, columns)
        weight = head.weight_columns(columns)
        head.project(hidden, columns, weight, out=logits)
        before = state.clone() if columns.start else None
        rows.update([logits], columns.start, state)
        # Under the statistics so far: `onehot_y t_y - r t`.
        so_far = row_state.with_some_rest(state)
        rows.gradient([logits], columns.start, so_far, one, out)
        _take_labels(out, labels - columns.start, label_entry)
        if before is not None:
            total.mul_(row_state.rest_share(before, state)[:, None])
        dtypes.multiply(out, weight.wide, total, accumulate=before is not None)
        if every_row is not None:
            _add_every_row(weight.wide, every_row, dtypes)
        del weight  # which may be a copy, before the next one is made
    return _Part(state, label_entry, every_row)


def _add_every_row(weight: Tensor, total: Tensor, dtypes: GemmDtypes) -> None:
    """`total += sum_j W_j`: 16-bit numbers by a product, which takes a third of a sum's time."""
    if weight.dtype == total.dtype:
        total += weight.sum(0)
        return
    ones = weight.new_ones(1, weight.shape[0])
    dtypes.multiply(ones, weight, total[None], accumulate=True)


def _take_labels(gradient_rows: Tensor, column: Tensor, label_entry: Tensor) -> None:
    """Move the labels' entries out of the rows: they are final, and must not be scaled."""
    column = column[:, None]
    nearest = column.clamp(0, gradient_rows.shape[1] - 1)
    here = column == nearest
    entry = gradient_rows.gather(1, nearest)
    label_entry += entry.masked_fill(~here, 0.0)[:, 0]
    gradient_rows.scatter_(1, nearest, entry.masked_fill_(here, 0.0))


def _add_labels(head: LinearHead, labels: Tensor, label_entry: Tensor, total: Tensor) -> None:
    """`total += t_y W_y`, in `total`'s dtype."""
    known = labels.clamp(0, head.weight.shape[0] - 1)
    for part in slices(labels.shape[0], per_device(LABEL_ROWS, labels.device.type)):
        label_weight = head.weight[known[part]].to(total.dtype)
        total[part].addcmul_(label_weight, label_entry[part, None])
