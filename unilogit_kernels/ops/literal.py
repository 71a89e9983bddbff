"""The literal definitions by plain autograd: the eager backend's double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unilogit_kernels import reference
from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.maths.statistics import Statistics

if TYPE_CHECKING:
    from unilogit_kernels.maths.divergence import Divergence
    from unilogit_kernels.ops.arguments import RowArguments


def has_literal(rows: RowArguments) -> bool:
    """Whether a backward that is differentiated itself may take the literal definition.

    Not where ranks share a vocabulary: none of them has the logits that the definition is of.
    """
    return rows.backend == "eager" and not rows.group


def wants_literal(rows: RowArguments) -> bool:
    """Whether this backward may be differentiated itself, by the literal definition."""
    return has_literal(rows) and torch.is_grad_enabled()


def values(
    logits: Tensor, labels: Tensor, transform: LogitTransform, vocab_size: int, needs: RowNeeds
) -> Tensor:
    """The log-odds `[n]`, or `[k, n]` with other statistics; 0 where a label is none."""
    valid, labels = _valid(labels, vocab_size)
    z = _transformed(logits, transform, vocab_size, valid)
    found = Statistics(
        reference.target_log_odds(z, labels),
        reference.runner_up_log_prob(z, labels) if needs.runner_up else None,
        z.logsumexp(-1) if needs.logsumexp else None,
        reference.uniform_cross_entropy(z) if needs.mean else None,
        reference.entropy(z) if needs.entropy else None,
    )
    return torch.where(valid, found.values(), 0.0)


def divergences(
    logits: Sequence[Tensor],
    labels: Tensor | None,
    transforms: Sequence[LogitTransform],
    vocab_size: int,
    divergence: Divergence,
) -> Tensor:
    """KL `[n]` of the student's and the teacher's logits; 0 where a label is none."""
    valid = None
    if labels is not None:
        valid, labels = _valid(labels, vocab_size)
    # Two models' logits meet in the dtype of the student's statistics.
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    student, teacher = (
        _transformed(z.to(dtype), transform, vocab_size, valid)
        for z, transform in zip(logits, transforms, strict=True)
    )
    found = reference.kl_divergence(
        student,
        teacher,
        labels,
        rewrite=divergence.rewrite if labels is not None else None,
        direction=divergence.direction,
    )
    return found if valid is None else torch.where(valid, found, 0.0)


def gradients_of(
    function: Callable[..., Tensor],
    operands: Sequence[Tensor | None],
    needs: Sequence[bool],
    upstream: Tensor,
) -> list[Tensor | None]:
    """Gradients of `function(*operands)` for those that want one, differentiable in their turn."""
    wanted = [x for x, need in zip(operands, needs, strict=True) if need and x is not None]

    def of_wanted(*some: Tensor) -> Tensor:
        given = iter(some)
        return function(
            *(next(given) if need else x for x, need in zip(operands, needs, strict=True))
        )

    # Not autograd.grad: inside a transform of torch.func the operands may be of a level that ended.
    pull_back = torch.func.vjp(of_wanted, *wanted)[1]
    found = iter(pull_back(upstream))
    return [next(found) if need else None for need in needs]


def _valid(labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Which labels are some, and labels that all are."""
    valid = (labels >= 0) & (labels < vocab_size)
    return valid, torch.where(valid, labels, 0)


def _transformed(
    logits: Tensor, transform: LogitTransform, vocab_size: int, valid: Tensor | None
) -> Tensor:
    """Transformed logits, 0 in rows that do not count, whatever these hold."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], 0.0)
    return reference.transform_logits(
        logits,
        logit_scale=transform.scale,
        softcap=transform.softcap or None,
        vocab_size=vocab_size,
    )
