"""The label's log-odds as functions of logits, or of hidden states and an lm_head."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels.calls import dispatch


def target_log_odds(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The label's log-odds `d = logit(p_y) = z_y - log sum_{j != y} exp z_j`, differentiable.

    Any loss that sees a token through its own probability composes from it by plain autograd:
    `log p_y = -softplus(-d)`, `log(1 - p_y) = -softplus(d)`. The sum leaves the label's column out
    from the start, so d keeps its digits where p_y rounds to 1.

    Args:
        logits: As in `unilogit_loss`.
        labels: As in `unilogit_loss`.
        ignore_index: Label of positions that do not count.
        softcap: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.

    Returns:
        `[...]`, float32 (float64 for float64 logits); 0 without gradient at ignored positions.

    Raises:
        TypeError: As `unilogit_loss`.
        ValueError: As `unilogit_loss`.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> from unilogit_kernels import target_log_odds
        >>> logits = torch.randn(4, 1000, requires_grad=True)
        >>> labels = torch.tensor([1, 2, 3, 4])
        >>> nll = torch.nn.functional.softplus(-target_log_odds(logits, labels))
        >>> bool(torch.allclose(nll.mean(), torch.nn.functional.cross_entropy(logits, labels)))
        True
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
    return dispatch.log_odds(operands, call).reshape(call.shape)


def linear_target_log_odds(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
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
    """`target_log_odds` of `hidden @ weight.T + bias`, without ever holding these logits.

    The backward recomputes the logits chunk by chunk, for the rows whose gradient is not 0.

    Args:
        hidden: As in `linear_unilogit_loss`.
        weight: As in `linear_unilogit_loss`.
        labels: As in `unilogit_loss`.
        bias: `[V]` or None.
        ignore_index: Label of positions that do not count.
        softcap: As in `unilogit_loss`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.
        memory_budget: As in `linear_unilogit_loss`.
        logits_dtype: As in `linear_unilogit_loss`.
        skip_below: As in `linear_unilogit_loss`.
        compact: As in `linear_unilogit_loss`.

    Returns:
        As `target_log_odds`.

    Raises:
        TypeError: As `linear_unilogit_loss`.
        ValueError: As `unilogit_loss`.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_target_log_odds
        >>> hidden = torch.randn(5, 16)
        >>> weight = torch.randn(1000, 16, requires_grad=True)
        >>> d = linear_target_log_odds(hidden, weight, torch.arange(5))
        >>> log_p = -torch.nn.functional.softplus(-d)
        >>> log_p.sum().backward()
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
    return dispatch.log_odds(operands, call).reshape(call.shape)


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels for the positions that predict them: `out[..., t] = labels[..., t + 1]`.

    Args:
        labels: `[..., T]`, usually the input ids with prompt and padding set to `ignore_index`.
        ignore_index: What the last position, which predicts nothing, gets.

    Returns:
        `[..., T]`, same dtype.

    Raises:
        ValueError: `labels` is a scalar.

    Example:
        >>> import torch
        >>> shift_labels(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    if labels.dim() == 0:
        raise ValueError("labels must have shape [..., T], got a scalar")
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
