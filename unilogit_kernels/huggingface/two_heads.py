"""Losses against a second, frozen model, without the logits of either.

Both models run, each with something else in the place of its lm_head. The student's forward runs
inside the teacher's head, which is the one moment where the weights of both heads are certain to be
there, also where FSDP gathers them for their own module's forward alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unilogit_kernels.functional.kl import linear_kl_loss
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.huggingface.adapted_head import adapters_disabled
from unilogit_kernels.huggingface.head import (
    HeadCall,
    add_auxiliary_loss,
    evaluating,
    replace_head,
    run_head_with_auxiliary_loss,
    without_auxiliary_loss,
)
from unilogit_kernels.huggingface.shifted_labels import warn_if_shifted
from unilogit_kernels.huggingface.stand_in import plain_head
from unilogit_kernels.maths.rewrites import Rewrite

_Model = TypeVar("_Model", bound=nn.Module)


def frozen_copy(model: _Model) -> _Model:
    """The model as it is now, on its device, in eval mode, with no parameter that learns.

    Args:
        model: a Hugging Face causal LM, not wrapped. Memory for its weights is taken once more.

    Raises:
        ValueError: it is sharded (FSDP2, tensor parallelism), so that a copy would not be.
    """
    sharded = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise ValueError(
            f"the model is sharded ({sharded} is a DTensor) and cannot be copied: load the "
            "starting model a second time, sharded alike or whole, and pass it as the reference "
            "(of the Trainer: teacher)"
        )
    reference = copy.deepcopy(model)
    reference.requires_grad_(False)
    reference.eval()
    return reference


class WithoutAdapters:
    """A model's own base, its adapters disabled, as a reference: no second model, and no copy.

    Args:
        model: wrapped by peft, or with adapters of its own (`PreTrainedModel.add_adapter`).

    Raises:
        ValueError: it has none.

    Example:
        >>> import peft, torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> lora = peft.LoraConfig(target_modules="all-linear")
        >>> model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
        >>> ids = torch.randint(50, (2, 7))
        >>> fused_kl_loss(model, WithoutAdapters(model), input_ids=ids, labels=ids).item()
        0.0
    """

    def __init__(self, model: nn.Module) -> None:
        with adapters_disabled(model):
            plain_head(model)
        self.model = model

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> HeadCall:
        """The inputs of the base's head.

        Args:
            model: the same, as it is called: wrapped by DDP, FSDP, accelerate.
            inputs: of its forward.
        """
        found: list[HeadCall] = []

        def keep(head: HeadCall) -> Tensor:
            found[:] = [head]
            return head.hidden.new_zeros(())

        with running(self, model):
            replace_head(model, keep, inputs)
        return found[0]


Reference = nn.Module | WithoutAdapters
"""A frozen model, or the model's own base."""


@contextmanager
def running(reference: Reference, model: nn.Module) -> Iterator[nn.Module]:
    """The module to run as a reference: in eval mode, without gradients.

    Args:
        reference: the teacher.
        model: the student, as it is called.
    """
    own = isinstance(reference, WithoutAdapters)
    module = model if isinstance(reference, WithoutAdapters) else reference
    below = adapters_disabled(module) if own else nullcontext()
    with torch.no_grad(), evaluating(module), below:
        yield module


def run_two_heads(
    model: nn.Module,
    reference: Reference,
    compute: Callable[[HeadCall, HeadCall], Tensor],
    **inputs: Any,
) -> Tensor:
    """Run two causal LMs on the same tokens and let `compute` stand in for both lm_heads.

    Args:
        model: the student, see `fused_loss`.
        reference: the teacher, run in eval mode and without gradients; `WithoutAdapters(model)` for
            the model's own base.
        compute: from the inputs of the student's head and of the teacher's to a small tensor.
        inputs: what the models' forwards take. Both are called without labels.

    Returns:
        What `compute` returned, attached to the student's graph.

    Raises:
        UnsupportedHeadError: see `fused_loss`, for either model.
        ValueError: see `run_head`; or the two share an lm_head.
    """
    result, auxiliary = run_two_heads_with_auxiliary_loss(model, reference, compute, **inputs)
    return without_auxiliary_loss(result, auxiliary)


def run_two_heads_with_auxiliary_loss(
    model: nn.Module,
    reference: Reference,
    compute: Callable[[HeadCall, HeadCall], Tensor],
    **inputs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`run_two_heads`, and what the student adds to the loss of its logits by itself.

    Args:
        model: see `run_two_heads`.
        reference: see `run_two_heads`.
        compute: see `run_two_heads`.
        inputs: see `run_two_heads`.

    Returns:
        What `compute` returned, and the student's auxiliary loss: see
        `run_head_with_auxiliary_loss`.

    Raises:
        UnsupportedHeadError, TypeError, ValueError: see `run_two_heads`.
    """
    if isinstance(reference, WithoutAdapters):
        # Not one forward inside the other: there is but one lm_head.
        teacher = reference.run(model, inputs)
        return run_head_with_auxiliary_loss(
            model, lambda student: compute(student, teacher), **inputs
        )
    if plain_head(model) is plain_head(reference):
        raise ValueError(
            "model and reference share one lm_head, which cannot be in two forwards at once: pass "
            "a copy as the reference, such as frozen_copy(...) makes, or WithoutAdapters(model) "
            "for the model below its adapters"
        )
    results: list[tuple[Tensor, Tensor | None]] = []
    with_gradient = torch.is_grad_enabled()

    def run_student(teacher: HeadCall) -> Tensor:
        with torch.set_grad_enabled(with_gradient):
            results.append(
                run_head_with_auxiliary_loss(
                    model, lambda student: compute(student, teacher), **inputs
                )
            )
        return results[-1][0]

    with running(reference, model):
        replace_head(reference, run_student, inputs)
    return results[-1]


def heads_kl_loss(
    student: HeadCall,
    teacher: HeadCall,
    labels: Tensor | None,
    *,
    rows: slice = slice(None),
    shift: bool = True,
    rewrite: Rewrite | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> Tensor:
    """`linear_kl_loss` of the sequences `rows`.

    Args:
        student: the inputs of the student's head.
        teacher: those of the other.
        labels: int64 `[B', T]`, as Hugging Face takes them: not shifted. None: every position of
            every sequence counts, virtual tokens too.
        rows: which of the B sequences the labels belong to.
        shift: whether labels are those of Hugging Face, of each token itself; False for labels
            of the positions that predict them, as `shift_labels` makes them.
        rewrite: of the teacher's label entry: `Shift(gamma)`, `Uniform()`, `Mask()` or None.
        direction: `"forward"` for KL(teacher || student), `"reverse"` for KL(student || teacher).
        temperature: divides both models' logits.
        ignore_index: label of tokens that do not count.
        reduction: `"mean"` over the counted tokens, `"sum"` or `"none"`.
        token_weights: `[B', T]`, weight of each token's loss, aligned with `labels`.
        num_items_in_batch: denominator of the mean, where it covers several batches.
        vocab_size: number of real tokens, if the two models pad their vocabularies differently.
        backend: name of a backend, or None for the best available.
        options: how the call may run.

    Returns:
        A scalar, or `[B', T]` for `reduction="none"`: position t is about token t + 1. No first
        token counts, also after virtual ones, which the other model does not have.

    Raises:
        UnsupportedHeadError: the labels do not belong to a model's positions.
        ValueError: the models' vocabularies differ in size and no `vocab_size` is given.
    """
    sizes = student.transform.vocab_size, teacher.transform.vocab_size
    if vocab_size is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"the model's logits have {sizes[0]} columns and the teacher's {sizes[1]}; if both "
            "share a tokenizer and pad it differently, pass the number of real tokens as "
            "vocab_size, with the Trainer as UnlearningArguments(vocab_size=...)"
        )
    hidden = [
        head.hidden[rows] if labels is None else head.hidden_of(labels, rows)
        for head in (student, teacher)
    ]
    return linear_kl_loss(
        hidden[0],
        student.weight,
        hidden[1],
        teacher.weight,
        labels,
        # A weight belongs to the token, as its label does, so it moves with it.
        shift=shift and labels is not None,
        rewrite=rewrite,
        direction=direction,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction=reduction,
        token_weights=token_weights,
        num_items_in_batch=num_items_in_batch,
        backend=backend,
        options=options,
        bias=student.bias,
        ref_bias=teacher.bias,
        adapter=student.adapter,
        ref_adapter=teacher.adapter,
        softcap=student.transform.softcap,
        ref_softcap=teacher.transform.softcap,
        logit_scale=student.transform.logit_scale,
        ref_logit_scale=teacher.transform.logit_scale,
        vocab_size=sizes[0] if vocab_size is None else vocab_size,
    )


def fused_kl_loss(
    model: nn.Module,
    reference: Reference,
    *,
    labels: Tensor,
    shift: bool = True,
    rewrite: Rewrite | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    vocab_size: int | None = None,
    auxiliary_loss: bool = True,
    backend: str | None = None,
    options: LinearOptions | None = None,
    **inputs: Any,
) -> Tensor:
    """The divergence of a causal LM from a frozen one, without the `[B, T, V]` logits of either.

    Args:
        model: a Hugging Face causal LM, also wrapped by DDP, FSDP2, accelerate or peft.
        reference: the teacher, with the same tokenizer; its size may differ. It runs in eval mode
            and gets no gradient: see `frozen_copy`, and `WithoutAdapters` for one with adapters.
        labels: int64 `[B, T]`, not shifted: usually `input_ids` with prompt and padding set to
            `ignore_index`.
        shift: whether `labels` are those of Hugging Face, of each token itself; False for labels
            of the positions that predict them, as `shift_labels` makes them.
        rewrite: of the teacher's label entry: `Shift(gamma)`, `Uniform()`, `Mask()` or None.
        direction: `"forward"` for KL(teacher || student), `"reverse"` for KL(student || teacher).
        temperature: divides both models' logits.
        ignore_index: label of tokens that do not count.
        reduction: `"mean"` over the counted tokens, `"sum"` or `"none"`.
        token_weights: `[B, T]`, weight of each token's loss, aligned with `labels`.
        num_items_in_batch: denominator of the mean, where it covers several batches.
        vocab_size: number of real tokens, if the models pad their vocabularies differently.
        auxiliary_loss: add the model's own auxiliary loss, see `fused_loss`.
        backend: name of a backend, or None for the best available.
        options: how the loss may run: memory, dtype of the logits, skipped rows.
        inputs: what the models' forwards take: `input_ids`, `attention_mask`...

    Returns:
        A scalar, or `[B, T]` for `reduction="none"`, where position t is the loss of token t + 1.

    Raises:
        UnsupportedHeadError, TypeError: see `fused_loss`.
        ValueError: see `heads_kl_loss` and `fused_loss`.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ids = torch.randint(50, (2, 7))
        >>> loss = fused_kl_loss(model, frozen_copy(model), input_ids=ids, labels=ids)
        >>> loss.item()
        0.0
    """

    def compute(student: HeadCall, teacher: HeadCall) -> Tensor:
        return heads_kl_loss(
            student,
            teacher,
            labels,
            shift=shift,
            rewrite=rewrite,
            direction=direction,
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            vocab_size=vocab_size,
            backend=backend,
            options=options,
        )

    if shift:
        warn_if_shifted(labels, inputs, ignore_index)
    loss, added = run_two_heads_with_auxiliary_loss(model, reference, compute, **inputs)
    return add_auxiliary_loss(loss, added) if auxiliary_loss else loss
