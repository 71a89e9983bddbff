"""From what a user passes of two models to what an operator takes."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels import ops
from unilogit_kernels.calls import pair_validation
from unilogit_kernels.calls.low_rank import LowRank, check_low_rank, term_of
from unilogit_kernels.calls.options import CallOptions, TeacherOptions
from unilogit_kernels.calls.sharded import local_heads, local_logits
from unilogit_kernels.calls.validation import LossCall, as_rows, cast_for_autocast
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.ops.arguments import NO_GRADIENT
from unilogit_kernels.ops.derivatives import any_tangent
from unilogit_kernels.ops.divergence import HeadPair, LogitsPair, Weights
from unilogit_kernels.ops.heads import NO_GRADIENTS
from unilogit_kernels.ops.linear import Active
from unilogit_kernels.rows.contract import weigh

Head = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, weight and bias of one model, as the user gave them."""


def of_logits(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None,
    options: CallOptions,
    teacher: TeacherOptions,
) -> Tensor:
    """The reduced divergence of logits; see `pair_validation.describe_logits` for errors."""
    matrices = [("logits", logits), ("ref_logits", _detached(ref_logits))]
    (logits, ref_logits), labels, options = local_logits(matrices, labels, options)
    pair = pair_validation.describe_logits(logits, ref_logits, labels, options, teacher)
    found = ops.divergence.divergence(LogitsPair(as_rows(logits), as_rows(ref_logits)), pair.rows())
    return _reduced(found.values, pair.call)


def of_heads(
    student: Head,
    teacher: Head,
    labels: Tensor | None,
    options: CallOptions,
    teacher_options: TeacherOptions,
    linear: LinearOptions | None,
    adapters: tuple[LowRank | None, LowRank | None] = (None, None),
) -> Tensor:
    """The reduced divergence of two lm_heads, each perhaps with a low-rank term.

    Raises:
        TypeError: See `pair_validation.describe_linear` and `low_rank.check_low_rank`.
        ValueError: See there.
        RuntimeError: See there.
    """
    hidden, weight, bias = teacher
    teacher = _detached(hidden), _detached(weight), None if bias is None else _detached(bias)
    heads = [("", student), ("ref_", teacher)]
    (student, teacher), labels, options = local_heads(heads, labels, options)
    student, teacher = _for_autocast(student), _for_autocast(teacher)
    pair = pair_validation.describe_linear(
        student, teacher, labels, options, teacher_options, linear or LinearOptions()
    )
    call, rows = pair.call, pair.rows()
    active = Active(call.row_weight != 0)
    own = _operands(student, adapters[0], active)
    with torch.no_grad():
        pairs = HeadPair(*own, *_operands(teacher, adapters[1], active, prefix="ref_"))
    if call.reduction == "none" or any_tangent(own):
        # What is finished in one pass has no tangents; the values of rows do.
        found = ops.divergence.linear_divergence(pairs, active, rows, call.linear, NO_GRADIENT)
        return _reduced(found.values, call)
    weights = Weights(call.row_weight, call.factor)
    return ops.divergence.linear_divergence_loss(
        pairs, rows, weights, call.linear, NO_GRADIENTS
    ).loss


def _operands(
    head: Head, adapter: LowRank | None, active: Active, prefix: str = ""
) -> ops.heads.Head:
    hidden, weight, bias = head
    adapter = check_low_rank(adapter, hidden, weight, prefix=prefix)
    tokens = as_rows(hidden)
    return ops.heads.Head(tokens, weight, bias, *term_of(adapter, tokens, active.active))


def _detached(teacher: Tensor) -> Tensor:
    # What is no tensor is refused below.
    return teacher.detach() if isinstance(teacher, Tensor) else teacher


def _for_autocast(head: Head) -> Head:
    hidden, weight, bias = head
    bias = None if bias is None else cast_for_autocast(bias)
    return cast_for_autocast(hidden), cast_for_autocast(weight), bias


def _reduced(values: Tensor, call: LossCall) -> Tensor:
    losses = weigh(call.row_weight, values)
    return losses.reshape(call.shape) if call.reduction == "none" else call.factor * losses.sum()
