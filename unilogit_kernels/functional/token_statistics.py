"""What a model says of each token: its probability, and the whole distribution's moments."""

from __future__ import annotations

from collections.abc import Sequence
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
from unilogit_kernels.maths import row_state, statistics
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds
from unilogit_kernels.objectives.statistics import RowStatistics
from unilogit_kernels.ops.heads import Operands


class TokenStatistics(NamedTuple):
    """Statistics of each token, `[...]` each; None for what was not asked for.

    float32 (float64 for float64 operands), and 0 without gradient at ignored positions. The first
    five are differentiable, in any combination.

    Attributes:
        log_prob: `log p_y` of the label, in nats.
        log_odds: `logit(p_y)`, which keeps every digit where p_y is near 1.
        logsumexp: Of the logits.
        entropy: Of the softmax, in nats: minus the mean of `log p` under the model.
        runner_up_log_prob: `log max_{j != y} p_j`.
        log_prob_variance: The variance of `log p` under the model; with the entropy what min-k %++
            (arXiv 2404.02936) normalises by.
        mean_logit: The mean of the logits; -inf where one is.
        argmax: The token of the largest logit, of equal ones the lowest, int64; `ignore_index` at
            ignored positions.
        is_argmax: Whether that is the label; False at ignored positions.

    Example:
        >>> import torch
        >>> from unilogit_kernels import token_statistics
        >>> seen = token_statistics(torch.zeros(1, 8), torch.tensor([3]))
        >>> round(seen.entropy.item(), 4), seen.argmax.item(), seen.is_argmax.item()
        (2.0794, 0, False)
    """

    log_prob: Tensor | None = None
    log_odds: Tensor | None = None
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    runner_up_log_prob: Tensor | None = None
    log_prob_variance: Tensor | None = None
    mean_logit: Tensor | None = None
    argmax: Tensor | None = None
    is_argmax: Tensor | None = None


FIELDS = TokenStatistics._fields

_RUNNER_UP, _VARIANCE = RowNeeds(runner_up=True), RowNeeds(entropy=True, variance=True)
_NEEDS = {
    "logsumexp": RowNeeds(logsumexp=True),
    "entropy": RowNeeds(entropy=True),
    "runner_up_log_prob": _RUNNER_UP,
    "log_prob_variance": _VARIANCE,
    "mean_logit": RowNeeds(mean=True),
    "argmax": _RUNNER_UP,
    "is_argmax": _RUNNER_UP,
}


@documented
@on_all_ranks
@shifting
def token_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = False,
    fields: Sequence[str] = FIELDS,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
) -> TokenStatistics:
    """What a model says of each token, in one read of the logits.

    A policy-gradient loss with an entropy bonus at a temperature T is

        seen = token_statistics(logits, actions, fields=("log_prob", "entropy"), logit_scale=1 / T)
        loss = -(advantages * seen.log_prob + 0.01 * seen.entropy).mean()

    Args:
        fields: Names of `TokenStatistics`; what is not among them is None and costs nothing.

    Returns:
        The statistics, `[...]` each.

    Raises:
        ValueError: A shape, device or option does not fit, or there is no such field.

    Example:
        >>> import torch
        >>> logits = torch.randn(4, 1000, requires_grad=True)
        >>> seen = token_statistics(logits, torch.arange(4), fields=("log_prob", "entropy"))
        >>> (-seen.log_prob - 0.01 * seen.entropy).mean().backward()
    """
    _check(fields)
    call_options = CallOptions(
        ignore_index, softcap, logit_scale, vocab_size, backend, vocab_parallel=vocab_parallel
    )
    return _of(*dispatch.from_logits(logits, labels, call_options), fields, ignore_index)


@documented
@on_all_ranks
@shifting
def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    shift: bool = False,
    fields: Sequence[str] = FIELDS,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> TokenStatistics:
    """`token_statistics` of `hidden @ weight.T + bias`, without ever holding these logits.

    One GEMM, and two or three in a backward, whatever the fields are.

    Args:
        fields: Names of `TokenStatistics`; what is not among them is None and costs nothing.

    Returns:
        The statistics, `[...]` each.

    Raises:
        TypeError: A dtype is not supported, or dtypes are mixed outside autocast.
        ValueError: A shape, device or option does not fit, or there is no such field.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(4, 8), torch.randn(100, 8)
        >>> linear_token_statistics(hidden, weight, torch.arange(4)).log_prob.shape
        torch.Size([4])
    """
    _check(fields)
    call_options = CallOptions(
        ignore_index, softcap, logit_scale, vocab_size, backend, vocab_parallel=vocab_parallel
    )
    described = dispatch.from_linear(hidden, weight, bias, labels, call_options, options, adapter)
    return _of(*described, fields, ignore_index)


def _check(fields: Sequence[str]) -> None:
    for field in fields:
        if field not in FIELDS:
            raise ValueError(
                f"fields must be names of TokenStatistics, got {field!r}; "
                f"they are {', '.join(FIELDS)}"
            )


def _of(
    operands: Operands, call: LossCall, fields: Sequence[str], ignore_index: int
) -> TokenStatistics:
    needs = PLAIN
    for field in fields:
        needs = needs.union(_NEEDS.get(field, PLAIN))
    found = dispatch.statistics(operands, call, needs)
    seen, state = RowStatistics.of(found.seen), found.state
    known: dict[str, Tensor | None] = {name: getattr(seen, name, None) for name in FIELDS}
    active, v = call.row_weight != 0, call.vocab_size
    d = seen.log_odds.detach()
    if "log_prob_variance" in fields:
        known["log_prob_variance"] = statistics.log_prob_variance(state, d, v)
    if "mean_logit" in fields:
        known["mean_logit"] = statistics.mean_logit(state, d, v)
    if needs.runner_up and call.labels is not None:
        target, largest = state[row_state.TARGET], state[row_state.ROW_MAX]
        is_first = (target == largest) & (call.labels < found.column)
        is_argmax = active & ((target > largest) | is_first)
        argmax = torch.where(is_argmax, call.labels, found.column)
        known["argmax"] = torch.where(active, argmax, ignore_index)
        known["is_argmax"] = is_argmax

    def finished(name: str) -> Tensor | None:
        value = known[name]
        if name not in fields or value is None:
            return None
        if value.is_floating_point():
            # log p of a row that does not count is not log sigmoid(0).
            value = torch.where(active, value, 0.0)
        return value.reshape(call.shape)

    return TokenStatistics(*(finished(name) for name in FIELDS))
