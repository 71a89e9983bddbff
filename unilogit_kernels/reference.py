"""The oracle: the definitions of the paper, written literally in plain torch.

Everything here materialises `[n, V]` tensors on purpose. It takes any float dtype (use float64 for
an oracle), is differentiable twice, and is what the kernels are judged against.

Source: Vasilev et al., "Unilogit: Robust Machine Unlearning for LLMs Using Uniform-Target
Self-Distillation", Findings of ACL 2025, arXiv 2505.06027.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from unilogit_kernels.maths.rewrites import Rewrite


def transform_logits(
    logits: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """What a model does to its raw logits: scale, then cap; padding columns are cut off.

    Args:
        logits: `[..., V]`, any float dtype.
        softcap: `c` of `c * tanh(z / c)`.
        logit_scale: Factor on the raw logits, applied before the cap.
        vocab_size: Number of leading columns that are real tokens.

    Returns:
        `[..., vocab_size]` in the dtype of `logits`.
    """
    if vocab_size is not None:
        logits = logits[..., :vocab_size]
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def unilogit_target(logits: Tensor, labels: Tensor) -> Tensor:
    """The paper's rewritten logits: the label's entry becomes `log(sum_{j!=y} e^{z_j}) - log(V-1)`.

    After a softmax over the result, the label has probability `1/V` and the other tokens keep
    their proportions.

    Args:
        logits: `[n, V]`.
        labels: int64 `[n]` in `[0, V)`.

    Returns:
        `[n, V]`, detached.
    """
    is_label = F.one_hot(labels, logits.shape[-1]).bool()
    rest_lse = torch.logsumexp(logits.masked_fill(is_label, float("-inf")), dim=-1, keepdim=True)
    rewritten = rest_lse - math.log(logits.shape[-1] - 1)
    return torch.where(is_label, rewritten, logits).detach()


def unilogit_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    direction: str = "reverse",
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Unilogit, step by step as in the paper: rewrite, detach, softmax, KL over the vocabulary.

    Args:
        logits: `[..., V]`, any float dtype; all arithmetic is in that dtype.
        labels: int64 `[...]`.
        direction: `"reverse"` for KL(p || q), the paper's loss, or `"forward"` for KL(q || p).
        ignore_index: Label of positions that do not count.
        reduction: `"mean"` over the counted positions, `"sum"` or `"none"`.
        softcap: See `transform_logits`.
        logit_scale: See `transform_logits`.
        vocab_size: See `transform_logits`.

    Returns:
        A scalar, or `[...]` for `"none"` with 0 at ignored positions.
    """
    logits = transform_logits(
        logits, softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size
    )
    counted = labels != ignore_index
    rows = logits[counted]
    log_q = torch.log_softmax(unilogit_target(rows, labels[counted]), dim=-1)
    log_p = torch.log_softmax(rows, dim=-1)
    if direction == "reverse":
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif direction == "forward":
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        raise ValueError(f"direction must be 'reverse' or 'forward', got {direction!r}")
    if reduction == "sum":
        return kl.sum()
    if reduction == "mean":
        return kl.sum() / max(int(counted.sum()), 1)
    return torch.zeros(labels.shape, dtype=kl.dtype, device=kl.device).masked_scatter(counted, kl)


def target_log_odds(
    logits: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """`d = z_y - log sum_{j != y} exp z_j`, the log-odds of the label, by a masked logsumexp.

    Args:
        logits: `[n, V]`, any float dtype.
        labels: int64 `[n]` in `[0, V)`.
        softcap: See `transform_logits`.
        logit_scale: See `transform_logits`.
        vocab_size: See `transform_logits`.

    Returns:
        `[n]` in the dtype of `logits`.
    """
    logits = transform_logits(
        logits, softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size
    )
    is_label = F.one_hot(labels, logits.shape[-1]).bool()
    rest_lse = torch.logsumexp(logits.masked_fill(is_label, float("-inf")), dim=-1)
    return logits.gather(-1, labels[:, None])[:, 0] - rest_lse


def runner_up_log_prob(
    logits: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """`log max_{j != y} p_j`, by a softmax and a mask.

    Args:
        logits: `[n, V]`, any float dtype.
        labels: int64 `[n]` in `[0, V)`.
        softcap: See `transform_logits`.
        logit_scale: See `transform_logits`.
        vocab_size: See `transform_logits`.

    Returns:
        `[n]` in the dtype of `logits`.
    """
    logits = transform_logits(
        logits, softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size
    )
    is_label = F.one_hot(labels, logits.shape[-1]).bool()
    log_p = torch.log_softmax(logits, dim=-1)
    return log_p.masked_fill(is_label, float("-inf")).max(-1).values


def entropy(logits: Tensor) -> Tensor:
    """`-(sum_j p_j log p_j)`, where a token of probability 0 adds nothing.

    Args:
        logits: `[n, V]`, any float dtype, transformed.

    Returns:
        `[n]` in nats, in the dtype of `logits`.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0.0)).sum(-1)


def log_prob_variance(logits: Tensor) -> Tensor:
    """The variance of `log p_j` under p, `sum_j p_j (log p_j + entropy)^2`; see `entropy`."""
    log_p = torch.log_softmax(logits, dim=-1)
    excess = log_p.masked_fill(log_p == float("-inf"), 0.0) + entropy(logits)[:, None]
    return (log_p.exp() * excess.square()).sum(-1)


def uniform_cross_entropy(logits: Tensor) -> Tensor:
    """`-(mean_j log p_j)` of all V tokens, the cross-entropy of the uniform distribution to p.

    Args:
        logits: `[n, V]`, any float dtype, transformed.

    Returns:
        `[n]` in nats, in the dtype of `logits`.
    """
    return -torch.log_softmax(logits, dim=-1).mean(-1)


def rewrite_teacher(logits: Tensor, labels: Tensor, rewrite: Rewrite) -> Tensor:
    """A teacher's logits with the label's entry rewritten, step by step as the papers do.

    Args:
        logits: `[n, V]`.
        labels: int64 `[n]` in `[0, V)`.
        rewrite: A `divergence.Rewrite`.

    Returns:
        `[n, V]`, detached.
    """
    is_label = F.one_hot(labels, logits.shape[-1]).bool()
    if rewrite.name == "shift":
        return (logits - is_label.to(logits.dtype) * rewrite.parameters()[0]).detach()
    if rewrite.name == "uniform":
        return unilogit_target(logits, labels)
    if rewrite.name == "mask":
        return logits.masked_fill(is_label, float("-inf")).detach()
    return logits.detach()


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None = None,
    *,
    rewrite: Rewrite | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """KL between a student and a teacher over the whole vocabulary, from two softmaxes.

    Args:
        logits: The student's, `[n, V]`, any float dtype; all arithmetic is in that dtype.
        ref_logits: The teacher's, `[n, V]`; no gradient flows to it.
        labels: int64 `[n]` in `[0, V)`, for a rewrite.
        rewrite: See `rewrite_teacher`; None for none.
        direction: `"forward"` for KL(teacher || student), `"reverse"` for KL(student || teacher).
        temperature: Divides both models' logits. It divides a shift too, while a uniform target
            has probability `1/V` after it.

    Returns:
        `[n]` in nats.
    """
    teacher = ref_logits.detach()
    if rewrite is None or labels is None:
        teacher = teacher / temperature
    elif rewrite.name == "uniform":
        teacher = rewrite_teacher(teacher / temperature, labels, rewrite)
    else:
        teacher = rewrite_teacher(teacher, labels, rewrite) / temperature
    log_teacher = torch.log_softmax(teacher, dim=-1)
    log_student = torch.log_softmax(logits / temperature, dim=-1)
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    forward = direction == "forward"
    log_a, log_b = (log_teacher, log_student) if forward else (log_student, log_teacher)
    # A token of probability 0 contributes 0, whatever the other model gives it; NaN stays.
    impossible = log_a == float("-inf")
    ratio = torch.where(impossible, 0.0, log_a) - torch.where(impossible, 0.0, log_b)
    return (log_a.exp() * ratio).sum(-1)
