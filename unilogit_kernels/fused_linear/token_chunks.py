"""Token chunks: a few tokens' logits over the whole vocabulary at a time, each projected once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.fused_linear.active_rows import gather_in_place, spread, worthwhile_index
from unilogit_kernels.fused_linear.gemm import OperandRows
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.fused_linear.plan import Plan
from unilogit_kernels.fused_linear.tiles import (
    Gradients,
    Heads,
    logit_buffers,
    project_tiles,
    slices,
    tile_view,
    weight_tiles,
)
from unilogit_kernels.fused_linear.weight_sum import WeightSum
from unilogit_kernels.rows.contract import RowLoss, Rows


def by_tokens(
    heads: Heads,
    rows: Rows,
    plan: Plan,
    gradients: Gradients,
    gradient_rows: Callable[[slice, list[Tensor], Tensor], Tensor | None],
) -> None:
    """For each chunk of tokens: project, gradient rows, the gradients' GEMMs.

    The weight's gradient adds up over the chunks, in float32.

    `gradient_rows(tokens, logits, out)` writes them and returns which rows count, or None for all.
    """
    vocabulary, student = slice(0, rows.columns), heads[0]
    weights, dtypes, device = weight_tiles(heads, vocabulary), student.dtypes, student.hidden.device
    elements = plan.tokens * rows.columns
    buffers = logit_buffers(heads, elements)
    row_buffer = buffers[0]
    if dtypes.operands != dtypes.logits:
        row_buffer = allocate((elements,), dtypes.operands, device)
    weight_sum = None
    if gradients.weight is not None:
        weight_sum = WeightSum(gradients.weight[vocabulary], dtypes)
    operand_rows = OperandRows(heads, plan.tokens)
    for tokens in slices(student.hidden.shape[0], plan.tokens):
        logits = [tile_view(buffer, tokens, vocabulary) for buffer in buffers]
        out = tile_view(row_buffer, tokens, vocabulary)
        hidden = operand_rows.at(tokens)
        for part in slices(rows.columns, plan.tile_columns):
            project_tiles(
                heads, hidden, part, [w[part] for w in weights], [z[:, part] for z in logits]
            )
        index = gradient_rows(tokens, logits, out)
        own = hidden[0]
        if index is not None:
            out, own = gather_in_place(out, index), own[index]
        of_tokens = (gradients.hidden, weights[0].wide), (gradients.inner, weights[0].thin)
        for gradient, factor in of_tokens:
            if gradient is not None and factor is not None:
                part_of = gradient[tokens]
                dtypes.multiply(out, factor, part_of[: out.shape[0]])
                if index is not None:
                    spread(part_of, index)
        if weight_sum is not None:
            weight_sum.add(out, own.wide, first=tokens.start == 0)
        if gradients.up is not None and own.thin is not None:
            d_up = gradients.up[vocabulary]
            dtypes.multiply(out.t(), own.thin, d_up, accumulate=tokens.start > 0)
        if gradients.bias is not None:
            gradients.bias[vocabulary] += out.sum(0, dtype=dtypes.exact)
    if weight_sum is not None:
        weight_sum.finish()


class _InactiveRows:
    """Finds rows of a token chunk that have no gradient, to spare their GEMM.

    Where the slopes of the whole batch are not known yet, `skip_below` is taken of the largest so
    far, so a row skipped here is one that the bound of `selection.significant` allows.
    """

    def __init__(self, options: LinearOptions, device: torch.device) -> None:
        self._skip_below = options.skip_below
        # On accelerators each chunk would synchronise, for nothing unless rows are to be skipped.
        self._looks = options.compact and (device.type == "cpu" or options.skip_below > 0)
        self._largest = torch.zeros((), device=device)

    def active(self, gradient_rows: Tensor, loss: RowLoss) -> Tensor | None:
        """Positions of the rows that count, or None for all."""
        if not self._looks or gradient_rows.shape[0] == 0:
            return None
        size = loss.sizes(gradient_rows)
        if size is None:
            return None
        self._largest = torch.maximum(self._largest, size.amax())
        skipped = (size == 0) | (size < self._skip_below * self._largest)
        return worthwhile_index(~skipped)
