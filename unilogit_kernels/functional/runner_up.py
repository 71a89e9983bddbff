"""The label and the likeliest token other than it, for margins and hinge losses."""

from __future__ import annotations

from typing import NamedTuple

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
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.ops.heads import Operands


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


@documented
@on_all_ranks
@shifting
def target_and_runner_up(
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
) -> TargetAndRunnerUp:
    """`target_log_odds`, and the log-probability of the likeliest token other than the label.

    The margin of the two logits is `logsigmoid(log_odds) - runner_up_log_prob`; LoKU's inverted
    hinge loss (arXiv 2408.06621) is `1 + sigmoid(log_odds) - exp(runner_up_log_prob)`, which
    `objective_loss(..., "loku")` computes with its gradient. One read of the logits finds both.
    Logits that a softcap makes equal are equal.

    Returns:
        `[...]` each, float32 (float64 for float64 logits); 0 without gradient at ignored positions.

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
    call_options = CallOptions(
        ignore_index, softcap, logit_scale, vocab_size, backend, vocab_parallel=vocab_parallel
    )
    return _of(*dispatch.from_logits(logits, labels, call_options), ignore_index)


@documented
@on_all_ranks
@shifting
def linear_target_and_runner_up(
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
) -> TargetAndRunnerUp:
    """`target_and_runner_up` of `hidden @ weight.T + bias`, without ever holding these logits.

    It takes the GEMMs of `linear_target_log_odds`: one, and two or three in a backward.

    Returns:
        `[...]` each, float32 (float64 for float64 operands); 0 without gradient at ignored
        positions.

    Raises:
        TypeError: A dtype is not supported, or dtypes are mixed outside autocast.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(4, 8), torch.randn(100, 8, requires_grad=True)
        >>> d, log_prob, _ = linear_target_and_runner_up(hidden, weight, torch.arange(4))
        >>> (torch.sigmoid(d) - torch.exp(log_prob)).mean().backward()
    """
    call_options = CallOptions(
        ignore_index, softcap, logit_scale, vocab_size, backend, vocab_parallel=vocab_parallel
    )
    described = dispatch.from_linear(hidden, weight, bias, labels, call_options, options, adapter)
    return _of(*described, ignore_index)


def _of(operands: Operands, call: LossCall, ignore_index: int) -> TargetAndRunnerUp:
    seen, token, _ = dispatch.statistics(operands, call, RowNeeds(runner_up=True))
    assert seen.runner_up_log_prob is not None
    token = torch.where(call.row_weight != 0, token, ignore_index)
    found = seen.log_odds, seen.runner_up_log_prob, token
    return TargetAndRunnerUp(*(x.reshape(call.shape) for x in found))
