"""Sums over sequences as functions; the losses made of them are in `objectives.sequence`."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels.calls import dispatch
from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.calls.options import CallOptions
from unilogit_kernels.calls.validation import LossCall
from unilogit_kernels.calls.vocab_parallel import VocabParallel, on_all_ranks
from unilogit_kernels.functional.documented import documented
from unilogit_kernels.functional.shifting import shifting
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.objectives.token import log_sigmoid
from unilogit_kernels.ops.heads import Operands


@documented
@on_all_ranks
@shifting
def sequence_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = False,
    average: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
) -> Tensor:
    """`log p` of each sequence: the sum of `log p_y` over its labelled tokens, differentiable.

    Args:
        logits: `[..., T, V]`, float32, bfloat16, float16 or float64, any strides.
        labels: int64 or int32 `[..., T]`, in `[0, vocab_size)`; see `shift`;
            `ignore_index` where a token does not count.
        average: Divide by the number of labelled tokens.

    Returns:
        `[...]`, float32 (float64 for float64 logits); 0 for a sequence without a labelled token.

    Raises:
        ValueError: A shape, device or option does not fit, or there is no sequence dimension.

    Example:
        >>> import torch
        >>> logits, labels = torch.randn(2, 5, 1000), torch.randint(0, 1000, (2, 5))
        >>> sequence_log_probs(logits, labels).shape
        torch.Size([2])
    """
    call_options = CallOptions(
        ignore_index, softcap, logit_scale, vocab_size, backend, vocab_parallel=vocab_parallel
    )
    return _log_probs(*dispatch.from_logits(logits, labels, call_options), average)


@documented
@on_all_ranks
@shifting
def linear_sequence_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    shift: bool = False,
    average: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> Tensor:
    """`sequence_log_probs` of `hidden @ weight.T + bias`, without ever holding these logits.

    Under `torch.no_grad()` and with a frozen model's hidden states and lm_head, this is the
    reference that `objectives.NPO`, `DPO` and `IdkDPO` take.

    Args:
        hidden: `[..., T, H]`, the hidden states that enter the lm_head.
        labels: int64 or int32 `[..., T]`, in `[0, vocab_size)`; see `shift`;
            `ignore_index` where a token does not count.
        average: Divide by the number of labelled tokens.

    Returns:
        `[...]`, float32 (float64 for float64 operands); 0 for a sequence without a labelled token.

    Raises:
        TypeError: A dtype is not supported, or dtypes are mixed outside autocast.
        ValueError: A shape, device or option does not fit, or there is no sequence dimension.

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
    call_options = CallOptions(
        ignore_index, softcap, logit_scale, vocab_size, backend, vocab_parallel=vocab_parallel
    )
    described = dispatch.from_linear(hidden, weight, bias, labels, call_options, options, adapter)
    return _log_probs(*described, average)


def _log_probs(operands: Operands, call: LossCall, average: bool) -> Tensor:
    if not call.shape:
        raise ValueError("labels must have shape [..., T] to have sequences, got a scalar")
    counted = (call.row_weight != 0).reshape(call.shape)
    log_p = log_sigmoid(dispatch.log_odds(operands, call)).reshape(call.shape)
    total = torch.where(counted, log_p, 0.0).sum(-1)
    return total / counted.sum(-1).clamp(min=1) if average else total
