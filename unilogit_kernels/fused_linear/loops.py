"""The chunk loops of a fused linear call: GEMMs, row kernels and losses, tile by tile.

They run on one lm_head or on two, that of a student and that of its reference: what is a
tile of logits here is then a tile of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels.fused_linear.active_rows import (
    counting,
    significant,
    worthwhile_index,
)
from unilogit_kernels.fused_linear.online import gradient_online
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.fused_linear.plan import Plan
from unilogit_kernels.fused_linear.saved import Saved, SavedBeside, SavedInBoth, SavedInGradient
from unilogit_kernels.fused_linear.tiles import Gradients, Heads, flat_buffer
from unilogit_kernels.fused_linear.token_chunks import _InactiveRows, by_tokens
from unilogit_kernels.fused_linear.vocabulary_chunks import VocabularyLoop, some_gradients
from unilogit_kernels.rows.contract import RowLoss, Rows
from unilogit_kernels.rows.objective import RowProblem, float16_scale


def linear_state(heads: Heads, rows: Rows, plan: Plan, saved: Saved | None = None) -> Tensor:
    """The complete state `[k, n]` of the logits of `heads`."""
    return rows.complete(VocabularyLoop(heads, rows, plan, saved).statistics())


def linear_gradient(
    loop: VocabularyLoop, state: Tensor, upstream: Tensor, gradients: Gradients
) -> None:
    """Gradients of `sum_i upstream_i values_i`, with logits saved in the forward or made again."""
    rows, scale = loop.rows, None
    if not loop.student.dtypes.rows_hold_factor:
        scale = float16_scale(upstream)
        upstream = upstream / scale
    slope = rows.slope(state, upstream)
    if loop.plan.order == "vocabulary_chunks":
        loop.gradients(state, slope, gradients)
    else:

        def gradient_rows(tokens: slice, logits: list[Tensor], out: Tensor) -> None:
            part_state, part_slope = state[:, tokens].contiguous(), slope[..., tokens].contiguous()
            rows.at(tokens).gradient(logits, 0, part_state, part_slope, out)

        by_tokens(loop.heads, rows, loop.plan, gradients, gradient_rows)
    if scale is not None:
        _multiply(gradients, scale)


def _multiply(gradients: Gradients, factor: Tensor) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)


def linear_loss(
    heads: Heads, loss: RowLoss, plan: Plan, gradients: Gradients, options: LinearOptions
) -> Tensor:
    """Losses before weights, `[n]` or `[2, n]` (`RowLoss.reports`), and gradients, in one call.

    Each head's logits take one GEMM, and each gradient.
    """
    student = heads[0]
    fold = student.dtypes.rows_hold_factor
    if not fold:
        loss = loss.over(float16_scale(loss.row_weight))
    if plan.order == "token_chunks":
        n = student.hidden.shape[0]
        values = student.hidden.new_empty(
            (2, n) if loss.reports else (n,), dtype=student.dtypes.exact
        )
        drop = _InactiveRows(options, student.hidden.device)

        def gradient_rows(tokens: slice, logits: list[Tensor], out: Tensor) -> Tensor | None:
            part = loss.at(tokens)
            values[..., tokens] = part.finish(logits, out, fold_factor=fold)
            # A call that is not cut is too small for it.
            return drop.active(out, part) if plan.tokens < n else None

        by_tokens(heads, loss.rows, plan, gradients, gradient_rows)
    else:
        values = _loss_by_columns(heads, loss, plan, gradients, options)
    if not fold:
        _multiply(gradients, loss.factor)
    return values


def _loss_by_columns(
    heads: Heads, loss: RowLoss, plan: Plan, gradients: Gradients, options: LinearOptions
) -> Tensor:
    """The vocabulary orders of `linear_loss`."""
    dtypes, rows = heads[0].dtypes, loss.rows

    def slope_of(state: Tensor, tokens: slice) -> Tensor:
        part = loss if state.shape[1] == loss.row_weight.shape[0] else loss.at(tokens)
        return part.slope(state, fold_factor=dtypes.rows_hold_factor)

    if plan.order == "online":
        assert gradients.hidden is not None
        assert isinstance(rows, RowProblem)
        state = gradient_online(heads[0], rows, plan, slope_of, gradients.hidden)
        return loss.values(state)
    saved: Saved | None = None
    if gradients.weight is not None and plan.saved_tokens:
        saved = _saved_in_gradient(heads, gradients.weight, plan)
    loop = VocabularyLoop(heads, rows, plan, saved)
    states = []
    if saved is not None and saved.finished:
        states.append(loop.finish_saved_rows(saved, slope_of))
    states.append(loop.statistics(first_token=plan.saved_tokens if states else 0))
    state = rows.complete(torch.cat(states, dim=1))
    if any(gradient is not None for gradient in gradients):
        slope = significant(slope_of(state, slice(0, loop.tokens)), options.skip_below)
        index = worthwhile_index(counting(slope)) if options.compact else None
        if index is not None:
            some_gradients(loop, index, state, slope, gradients)
        else:
            loop.gradients(state, slope, gradients)
    return loss.values(state)


def _saved_in_gradient(heads: Heads, weight: Tensor, plan: Plan) -> Saved:
    """Where the first pass saves what it finds: in the weight's gradient, and maybe beside it."""
    student, dtypes = heads[0], [head.dtypes.logits for head in heads]
    if plan.saves_rows:
        dtypes = [student.dtypes.operands]
    inside = SavedInGradient(weight, dtypes, plan.saved_inside, finished=plan.saves_rows)
    if not plan.saved_beside:
        return inside
    elements = plan.saved_beside * student.weight.shape[0]
    memory = flat_buffer(student, elements, student.dtypes.operands)
    return SavedInBoth(inside, SavedBeside([memory], plan.saved_beside, finished=True))
