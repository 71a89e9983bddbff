"""Losses against a reference model as functions: names and docstrings, reductions."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels.calls import pair_dispatch
from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.calls.options import CallOptions, TeacherOptions
from unilogit_kernels.calls.vocab_parallel import VocabParallel, on_all_ranks
from unilogit_kernels.functional.documented import documented
from unilogit_kernels.functional.shifting import shifting
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.maths.rewrites import Rewrite


@documented
@on_all_ranks
@shifting
def kl_loss(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None = None,
    *,
    shift: bool = False,
    rewrite: Rewrite | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL divergence from a reference model, whose label entry may be rewritten first.

    - KL to the starting model as retain loss (KL minimisation, NPO-KL): no rewrite.
    - UnDIAL (arXiv 2402.10052) with the starting model as teacher: `Shift(gamma)`. The paper's
      cross-entropy to the soft target is this KL plus the target's entropy, a constant.
    - Unilogit's target (arXiv 2505.06027) from the starting model: `Uniform()` and
      `direction="reverse"`.

    Args:
        logits: The student's, `[..., V]`, float32, bfloat16, float16 or float64, any strides.
        ref_logits: The teacher's, `[..., V]`; no gradient flows to it. It may have another dtype,
            but float64 on one side needs float64 on the other.
        labels: int64 or int32 `[...]`, in `[0, vocab_size)` or `ignore_index`; None for all
            positions (then `rewrite` must be None). Without a rewrite, labels only say which
            positions count.

    Returns:
        The loss in nats, float32 (float64 for float64 logits): a scalar, or `[...]` for `"none"`
        with 0 at ignored positions. With every position ignored it is 0, attached to the graph.

    Example:
        >>> import torch
        >>> from unilogit_kernels import Shift, kl_loss
        >>> ref_logits = torch.randn(4, 1000)
        >>> logits = ref_logits.clone().requires_grad_()
        >>> kl_loss(logits, ref_logits).item()
        0.0
        >>> labels = torch.tensor([1, 2, 3, -100])
        >>> kl_loss(logits, ref_logits, labels, rewrite=Shift(10.0)).backward()
        >>> bool(logits.grad[3].eq(0).all())
        True
    """
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
    teacher = TeacherOptions(rewrite, direction, temperature, ref_softcap, ref_logit_scale)
    return pair_dispatch.of_logits(logits, ref_logits, labels, call_options, teacher)


@documented
@on_all_ranks
@shifting
def linear_kl_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor | None = None,
    *,
    shift: bool = False,
    rewrite: Rewrite | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    adapter: LowRank | None = None,
    ref_adapter: LowRank | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> Tensor:
    """`kl_loss` of two models' lm_heads, without ever holding either model's logits.

    Positions that are ignored or have weight 0 are dropped before the first GEMM. Gradients are
    computed in the forward pass and scaled in the backward; a frozen operand costs nothing. The
    teacher's operands never get a gradient; they may be the student's own (a shared lm_head).

    `options.skip_below` must be 0: no slope in front of a row's gradient tells its size before it
    is computed. The divergence bounds it (forward by `sqrt(2 KL)`, Pinsker), but float32 knows a KL
    to about 1e-7, and so this bound to no better than 5e-4.

    Args:
        hidden: The student's, `[..., H]`, the hidden states that enter its lm_head.
        weight: The student's lm_head, `[V, H]`, in hidden's dtype (any dtype under autocast).
        ref_hidden: The teacher's, `[..., H']`; sizes may differ.
        ref_weight: The teacher's lm_head, `[V, H']`.
        labels: int64 or int32 `[...]`, in `[0, vocab_size)` or `ignore_index`; None for all
            positions (then `rewrite` must be None). Without a rewrite, labels only say which
            positions count.
        bias: The student's, `[V]` or None.
        ref_bias: The teacher's, `[V]` or None.
        options: How the call may run (`LinearOptions`); `explain_plan(..., ref_h=H')` says what a
            call makes of it.

    Returns:
        The loss in nats, float32 (float64 for float64 operands): a scalar, or `[...]` for `"none"`
        with 0 at ignored positions. With every position ignored it is 0, attached to the graph.

    Raises:
        TypeError: A dtype is not supported, or dtypes of one model are mixed outside autocast.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_kl_loss
        >>> lm_head, teacher_head = torch.nn.Linear(16, 1000), torch.nn.Linear(32, 1000)
        >>> hidden = torch.randn(5, 16, requires_grad=True)
        >>> loss = linear_kl_loss(
        ...     hidden, lm_head.weight, torch.randn(5, 32), teacher_head.weight,
        ...     bias=lm_head.bias, ref_bias=teacher_head.bias,
        ... )
        >>> loss.backward()
        >>> hidden.grad.shape, teacher_head.weight.grad
        (torch.Size([5, 16]), None)
    """
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
    teacher = TeacherOptions(rewrite, direction, temperature, ref_softcap, ref_logit_scale)
    heads = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    adapters = adapter, ref_adapter
    return pair_dispatch.of_heads(*heads, labels, call_options, teacher, options, adapters)


def count_ignored_positions(labels: Tensor, vocab_size: int, ignore_index: int = -100) -> Tensor:
    """Labels with which every position counts, as in OpenUnlearning's `compute_undial_loss`.

    That implementation of UnDIAL averages over prompt and padding too, and indexes the vocabulary
    with their label -100, from its end: there the teacher's token `V - 100` is lowered. With these
    labels `kl_loss(..., rewrite=Shift(beta))` has the same gradients (its loss is less by the
    target's entropy, a constant). For comparisons with it only: leave ignored labels as they are
    for the method of the paper.

    Args:
        labels: int64 or int32 `[...]`.
        vocab_size: V, the columns of the logits.
        ignore_index: Negative, at least `-vocab_size`.

    Returns:
        `[...]`, all in `[0, vocab_size)`.

    Raises:
        ValueError: `ignore_index` does not index the vocabulary from its end.

    Example:
        >>> import torch
        >>> count_ignored_positions(torch.tensor([5, -100]), vocab_size=1000)
        tensor([  5, 900])
    """
    if not -vocab_size <= ignore_index < 0:
        raise ValueError(f"ignore_index must be in [{-vocab_size}, 0), got {ignore_index}")
    return torch.where(labels == ignore_index, vocab_size + ignore_index, labels)
