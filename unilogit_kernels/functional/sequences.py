"""Sums over sequences as functions; the losses made of them are in `objectives.sequence`."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels.calls import dispatch
from unilogit_kernels.calls.validation import LossCall
from unilogit_kernels.objectives.token import log_sigmoid
from unilogit_kernels.ops.arguments import Operands


def sequence_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    average: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`log p` of each sequence: the sum of `log p_y` over its labelled tokens, differentiable.

    Args:
        logits: `[..., T, V]`; otherwise as in `unilogit_loss`.
        labels: `[..., T]`, already shifted; `ignore_index` where a token does not count.
        average: Divide by the number of labelled tokens.
        ignore_index: As in `unilogit_loss`.
        softcap: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.

    Returns:
        `[...]`, float32 (float64 for float64 logits); 0 for a sequence without a labelled token.

    Raises:
        TypeError: As `unilogit_loss`.
        ValueError: As `unilogit_loss`; also for logits or labels without a sequence dimension.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> logits, labels = torch.randn(2, 5, 1000), torch.randint(0, 1000, (2, 5))
        >>> sequence_log_probs(logits, labels).shape
        torch.Size([2])
    """
    operands, call = dispatch.from_logits(
        logits,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        token_weights=None,
        num_items_in_batch=None,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=backend,
    )
    return _log_probs(operands, call, average)


def linear_sequence_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    skip_below: float = 0.0,
    compact: bool = True,
) -> Tensor:
    """`sequence_log_probs` of `hidden @ weight.T + bias`, without ever holding these logits.

    Under `torch.no_grad()` and with a frozen model's hidden states and lm_head, this is the
    reference that `objectives.NPO`, `DPO` and `IdkDPO` take.

    Args:
        hidden: `[..., T, H]`; otherwise as in `linear_unilogit_loss`.
        weight: As in `linear_unilogit_loss`.
        labels: As in `sequence_log_probs`.
        bias: `[V]` or None.
        average: As in `sequence_log_probs`.
        ignore_index: As in `unilogit_loss`.
        softcap: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.
        memory_budget: As in `linear_unilogit_loss`.
        logits_dtype: As in `linear_unilogit_loss`.
        skip_below: As in `linear_unilogit_loss`.
        compact: As in `linear_unilogit_loss`.

    Returns:
        As `sequence_log_probs`.

    Raises:
        TypeError: As `linear_unilogit_loss`.
        ValueError: As `sequence_log_probs`.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_objective_loss, objectives
        >>> hidden, weight = torch.randn(2, 5, 16), torch.randn(1000, 16)
        >>> labels = torch.randint(0, 1000, (2, 5))
        >>> with torch.no_grad():
        ...     reference = linear_sequence_log_probs(hidden, weight, labels)
        >>> npo = objectives.NPO(reference=reference, beta=0.1)
        >>> loss = linear_objective_loss(hidden, weight.requires_grad_(), labels, npo)
        >>> loss.backward()
    """
    operands, call = dispatch.from_linear(
        hidden,
        weight,
        bias,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        token_weights=None,
        num_items_in_batch=None,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        backend=backend,
        memory_budget=memory_budget,
        logits_dtype=logits_dtype,
        skip_below=skip_below,
        compact=compact,
    )
    return _log_probs(operands, call, average)


def _log_probs(operands: Operands, call: LossCall, average: bool) -> Tensor:
    if not call.shape:
        raise ValueError("labels must have shape [..., T] to have sequences, got a scalar")
    counted = (call.row_weight != 0).reshape(call.shape)
    log_p = log_sigmoid(dispatch.log_odds(operands, call)).reshape(call.shape)
    total = torch.where(counted, log_p, 0.0).sum(-1)
    return total / counted.sum(-1).clamp(min=1) if average else total
