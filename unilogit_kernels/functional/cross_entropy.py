"""Cross-entropy with what is commonly added to it: label smoothing, a z-loss, an entropy."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unilogit_kernels.calls import dispatch
from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.calls.options import CallOptions
from unilogit_kernels.calls.validation import LossCall
from unilogit_kernels.calls.vocab_parallel import VocabParallel, on_all_ranks
from unilogit_kernels.functional.documented import documented
from unilogit_kernels.functional.shifting import shifting
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.objectives import CrossEntropy
from unilogit_kernels.ops.heads import Operands


class CrossEntropyResult(NamedTuple):
    """A loss, and the part of it that is its z-loss.

    Attributes:
        loss: The whole, differentiable.
        z_loss: `z_loss * logsumexp^2`, reduced as the loss is; detached.

    Example:
        >>> import torch
        >>> from unilogit_kernels import cross_entropy_loss
        >>> result = cross_entropy_loss(torch.zeros(2, 8), torch.tensor([1, 2]), z_loss=1e-4)
        >>> bool(result.z_loss < result.loss)
        True
    """

    loss: Tensor
    z_loss: Tensor


@documented
@on_all_ranks
@shifting
def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
) -> CrossEntropyResult:
    """`objective_loss` of `objectives.CrossEntropy`, with its z-loss apart.

    Args:
        label_smoothing: Share of the target that is spread evenly over the vocabulary, as in
            `torch.nn.functional.cross_entropy`.
        z_loss: Weight of the squared logsumexp.
        entropy: Weight of the entropy, of either sign.

    Returns:
        Both float32 (float64 for float64 logits): scalars, or `[...]` for `"none"` with 0 at
        ignored positions. With every label ignored the loss is 0, attached to the graph.

    Example:
        >>> import torch
        >>> logits = torch.randn(4, 1000, requires_grad=True)
        >>> loss, _ = cross_entropy_loss(logits, torch.arange(4), label_smoothing=0.1, z_loss=1e-4)
        >>> loss.backward()
    """
    objective = CrossEntropy(label_smoothing, z_loss, entropy)
    options = CallOptions(
        ignore_index,
        softcap,
        logit_scale,
        vocab_size,
        backend,
        reduction,
        token_weights,
        num_items_in_batch,
        vocab_parallel,
    )
    return _of(*dispatch.from_logits(logits, labels, options), objective)


@documented
@on_all_ranks
@shifting
def linear_cross_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    shift: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> CrossEntropyResult:
    """`cross_entropy_loss` of `hidden @ weight.T + bias`, without ever holding these logits.

    Args:
        label_smoothing: Share of the target that is spread evenly over the vocabulary, as in
            `torch.nn.functional.cross_entropy`.
        z_loss: Weight of the squared logsumexp.
        entropy: Weight of the entropy, of either sign.

    Returns:
        Both float32 (float64 for float64 operands): scalars, or `[...]` for `"none"` with 0 at
        ignored positions. With every label ignored the loss is 0, attached to the graph.

    Raises:
        TypeError: A dtype is not supported, or dtypes are mixed outside autocast.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> linear_cross_entropy_loss(hidden, weight, torch.arange(4), z_loss=1e-4).loss.backward()
    """
    objective = CrossEntropy(label_smoothing, z_loss, entropy)
    call_options = CallOptions(
        ignore_index,
        softcap,
        logit_scale,
        vocab_size,
        backend,
        reduction,
        token_weights,
        num_items_in_batch,
        vocab_parallel,
    )
    described = dispatch.from_linear(hidden, weight, bias, labels, call_options, options, adapter)
    return _of(*described, objective)


def _of(operands: Operands, call: LossCall, objective: CrossEntropy) -> CrossEntropyResult:
    if objective.reports:
        return CrossEntropyResult(*dispatch.loss_and_report(operands, call, objective))
    loss = dispatch.objective_of(operands, call, objective)
    return CrossEntropyResult(loss, loss.new_zeros(loss.shape))
