"""The label's log-odds as functions of logits, or of hidden states and an lm_head."""

from __future__ import annotations

from torch import Tensor

from unilogit_kernels.calls import dispatch
from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.calls.options import CallOptions
from unilogit_kernels.calls.vocab_parallel import VocabParallel, on_all_ranks
from unilogit_kernels.functional.documented import documented
from unilogit_kernels.functional.shifting import shifting
from unilogit_kernels.fused_linear.options import LinearOptions


@documented
@on_all_ranks
@shifting
def target_log_odds(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
) -> Tensor:
    """The label's log-odds `d = logit(p_y) = z_y - log sum_{j != y} exp z_j`, differentiable.

    Any loss that sees a token through its own probability composes from it by plain autograd:
    `log p_y = -softplus(-d)`, `log(1 - p_y) = -softplus(d)`. The sum leaves the label's column out
    from the start, so d keeps its digits where p_y rounds to 1.

    Returns:
        `[...]`, float32 (float64 for float64 logits); 0 without gradient at ignored positions.

    Example:
        >>> import torch
        >>> from unilogit_kernels import target_log_odds
        >>> logits = torch.randn(4, 1000, requires_grad=True)
        >>> labels = torch.tensor([1, 2, 3, 4])
        >>> nll = torch.nn.functional.softplus(-target_log_odds(logits, labels))
        >>> bool(torch.allclose(nll.mean(), torch.nn.functional.cross_entropy(logits, labels)))
        True
    """
    call_options = CallOptions(
        ignore_index, softcap, logit_scale, vocab_size, backend, vocab_parallel=vocab_parallel
    )
    operands, call = dispatch.from_logits(logits, labels, call_options)
    return dispatch.log_odds(operands, call).reshape(call.shape)


@documented
@on_all_ranks
@shifting
def linear_target_log_odds(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> Tensor:
    """`target_log_odds` of `hidden @ weight.T + bias`, without ever holding these logits.

    The backward recomputes the logits chunk by chunk, for the rows whose gradient is not 0.

    Returns:
        `[...]`, float32 (float64 for float64 operands); 0 without gradient at ignored positions.

    Raises:
        TypeError: A dtype is not supported, or dtypes are mixed outside autocast.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_target_log_odds
        >>> hidden = torch.randn(5, 16)
        >>> weight = torch.randn(1000, 16, requires_grad=True)
        >>> d = linear_target_log_odds(hidden, weight, torch.arange(5))
        >>> log_p = -torch.nn.functional.softplus(-d)
        >>> log_p.sum().backward()
    """
    call_options = CallOptions(
        ignore_index, softcap, logit_scale, vocab_size, backend, vocab_parallel=vocab_parallel
    )
    operands, call = dispatch.from_linear(
        hidden, weight, bias, labels, call_options, options, adapter
    )
    return dispatch.log_odds(operands, call).reshape(call.shape)
