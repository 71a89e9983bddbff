"""The label and the likeliest token other than it, for margins and hinge losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.calls import dispatch
from unilogit_kernels.calls.validation import LossCall
from unilogit_kernels.ops.arguments import Operands


class TargetAndRunnerUp(NamedTuple):
    """What a loss may see of the label and of the runner-up, `[...]` each.

    Attributes:
        log_odds: The label's, `d = logit(p_y)`, differentiable.
        runner_up_log_prob: `log max_{j != y} p_j`, differentiable.
        runner_up: The token that has it, int64: the lowest of equal ones. `ignore_index` at ignored
            positions; the lowest token but the label in a row with NaN.

    Example:
        >>> import torch
        >>> d, log_prob, token = TargetAndRunnerUp(
        ...     torch.tensor([0.0]), torch.tensor([-1.0]), torch.tensor([7])
        ... )
    """

    log_odds: Tensor
    runner_up_log_prob: Tensor
    runner_up: Tensor


def target_and_runner_up(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TargetAndRunnerUp:
    """`target_log_odds`, and the log-probability of the likeliest token other than the label.

    The margin of the two logits is `logsigmoid(log_odds) - runner_up_log_prob`; LoKU's inverted
    hinge loss (arXiv 2408.06621) is `1 + sigmoid(log_odds) - exp(runner_up_log_prob)`, which
    `objective_loss(..., "loku")` computes with its gradient. One read of the logits finds both.

    Args:
        logits: As in `unilogit_loss`.
        labels: As in `unilogit_loss`.
        ignore_index: Label of positions that do not count.
        softcap: As in `unilogit_loss`. Logits that it makes equal are equal.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.

    Returns:
        `[...]` each, float32 (float64 for float64 logits); 0 without gradient at ignored positions.

    Raises:
        TypeError: As `unilogit_loss`.
        ValueError: As `unilogit_loss`.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
        >>> d, log_prob, token = target_and_runner_up(logits, torch.tensor([0]))
        >>> margin = torch.nn.functional.logsigmoid(d) - log_prob
        >>> token.item(), round(margin.item(), 5)
        (2, 1.0)
        >>> torch.autograd.grad(margin.sum(), logits)[0].int()
        tensor([[ 1,  0, -1]], dtype=torch.int32)
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
    return _of(operands, call, ignore_index)


def linear_target_and_runner_up(
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
) -> TargetAndRunnerUp:
    """`target_and_runner_up` of `hidden @ weight.T + bias`, without ever holding these logits.

    It takes the GEMMs of `linear_target_log_odds`: one, and two or three in a backward.

    Args:
        hidden: As in `linear_unilogit_loss`.
        weight: As in `linear_unilogit_loss`.
        labels: As in `unilogit_loss`.
        bias: `[V]` or None.
        ignore_index: Label of positions that do not count.
        softcap: As in `target_and_runner_up`.
        logit_scale: As in `unilogit_loss`.
        vocab_size: As in `unilogit_loss`.
        backend: As in `unilogit_loss`.
        memory_budget: As in `linear_unilogit_loss`.
        logits_dtype: As in `linear_unilogit_loss`.
        skip_below: As in `linear_unilogit_loss`; of the gradient row's size.
        compact: As in `linear_unilogit_loss`.

    Returns:
        As `target_and_runner_up`.

    Raises:
        TypeError: As `linear_unilogit_loss`.
        ValueError: As `unilogit_loss`.
        IndexError: As `unilogit_loss`.
        RuntimeError: As `unilogit_loss`.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(4, 8), torch.randn(100, 8, requires_grad=True)
        >>> d, log_prob, _ = linear_target_and_runner_up(hidden, weight, torch.arange(4))
        >>> (torch.sigmoid(d) - torch.exp(log_prob)).mean().backward()
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
    return _of(operands, call, ignore_index)


def _of(operands: Operands, call: LossCall, ignore_index: int) -> TargetAndRunnerUp:
    (log_odds, log_prob), token = dispatch.statistics(operands, call, runner_up=True)
    assert log_prob is not None
    token = torch.where(call.row_weight != 0, token, ignore_index)
    return TargetAndRunnerUp(*(x.reshape(call.shape) for x in (log_odds, log_prob, token)))
