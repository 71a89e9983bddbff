"""A loss in the place of the logits, for any Hugging Face causal LM.

What a model does to its logits after the head (Gemma 2 caps them, Cohere multiplies, Granite
divides) happens to known numbers that stand in for them. So nothing is read from the names in a
config: the scale, the cap and the number of real tokens are observed, every call checks all columns
of a row that went through the model in the logits' place, and a transformation that the kernels do
not know is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unilogit_kernels import reference
from unilogit_kernels.functional import ObjectiveLike
from unilogit_kernels.functional.token_statistics import FIELDS, TokenStatistics
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.huggingface.adapted_head import HeadOperands
from unilogit_kernels.huggingface.head_call import HeadCall
from unilogit_kernels.huggingface.logit_transform import HeadTransform, UnsupportedHeadError
from unilogit_kernels.huggingface.model_inputs import VirtualTokens, check_inputs
from unilogit_kernels.huggingface.observation import input_device, observe, observe_logit_transform
from unilogit_kernels.huggingface.quantised import require_gradients
from unilogit_kernels.huggingface.rounding import Rounding
from unilogit_kernels.huggingface.shifted_labels import warn_if_shifted
from unilogit_kernels.huggingface.stand_in import Call, Forward, attach, evaluating, forward_with
from unilogit_kernels.huggingface.tensor_parallel import whole_row

__all__ = [
    "HeadCall",
    "HeadTransform",
    "UnsupportedHeadError",
    "evaluating",
    "fused_log_odds",
    "fused_loss",
    "fused_token_statistics",
    "observe_logit_transform",
    "run_head",
    "run_head_with_auxiliary_loss",
    "verify_head",
]


def fused_loss(
    model: nn.Module,
    *,
    labels: Tensor,
    objective: ObjectiveLike = "unilogit",
    shift: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    auxiliary_loss: bool = True,
    backend: str | None = None,
    options: LinearOptions | None = None,
    **inputs: Any,
) -> Tensor:
    """The loss of a causal LM without its `[B, T, V]` logits.

    Args:
        model: a Hugging Face causal LM, also wrapped by DDP, FSDP2, accelerate or peft, and with an
            lm_head whose vocabulary a tensor-parallel plan shares among ranks, each of which then
            passes the same rows.
        labels: int64 `[B, T]`, not shifted: usually `input_ids` with prompt and padding set to
            `ignore_index`.
        objective: `"unilogit"`, `"unilogit_forward"`, `"cross_entropy"`, `"gradient_ascent"`, an
            `Objective` or a differentiable function of the log-odds.
        shift: whether `labels` are those of Hugging Face, of each token itself; False for labels
            of the positions that predict them, as `shift_labels` makes them.
        ignore_index: label of tokens that do not count.
        reduction: `"mean"` over the counted tokens, `"sum"` or `"none"`.
        token_weights: `[B, T]`, weight of each token's loss, aligned with `labels`.
        num_items_in_batch: denominator of the mean, where it covers several batches.
        auxiliary_loss: add the model's own auxiliary loss where it computes one, as its own loss
            does: that of a router, scaled by the model's coefficient, if `output_router_logits` is
            set in its config or among the inputs. `run_head_with_auxiliary_loss` returns it apart.
        backend: name of a backend, or None for the best available.
        options: how the loss may run: memory, dtype of the logits, skipped rows.
        inputs: what the model's forward takes: `input_ids`, `attention_mask`, `inputs_embeds`...

    Returns:
        A scalar, or `[B, T]` for `reduction="none"`, where position t is the loss of token t + 1.

    Raises:
        UnsupportedHeadError: the lm_head is not a linear layer, plain or with LoRA, a trained copy
            or trainable tokens of peft's (it is quantised, sharded otherwise than over its
            vocabulary, or has another adapter), the model does to its logits what the kernels
            cannot, or `labels` do not belong to its positions.
        TypeError: the model's forward has no argument of a given name.
        ValueError: an auxiliary loss cannot be added to losses of tokens (`reduction="none"`).

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ids = torch.randint(50, (2, 7))
        >>> fused_loss(model, input_ids=ids, labels=ids, objective="unilogit").shape
        torch.Size([])
    """

    def compute(head: HeadCall) -> Tensor:
        return head.objective_loss(
            labels,
            objective,
            shift=shift,
            ignore_index=ignore_index,
            reduction=reduction,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            backend=backend,
            options=options,
        )

    if shift:
        warn_if_shifted(labels, inputs, ignore_index)
    if not auxiliary_loss:
        return replace_head(model, compute, inputs).result
    loss, added = run_head_with_auxiliary_loss(model, compute, **inputs)
    return add_auxiliary_loss(loss, added)


def add_auxiliary_loss(loss: Tensor, added: Tensor | None) -> Tensor:
    """The sum, of a scalar loss.

    Raises:
        ValueError: the loss is one of tokens.
    """
    if added is None:
        return loss
    if loss.dim() != 0:
        raise ValueError(
            f"the model's auxiliary loss cannot be added to losses of shape {list(loss.shape)}: "
            "pass auxiliary_loss=False, or a reduction other than 'none'"
        )
    return loss + added.to(loss.device)


def fused_log_odds(
    model: nn.Module,
    *,
    labels: Tensor,
    shift: bool = True,
    backend: str | None = None,
    options: LinearOptions | None = None,
    **inputs: Any,
) -> Tensor:
    """The log-odds `logit(p_y)` of each label, differentiable, without the logits.

    Args:
        model: see `fused_loss`.
        labels: int64 `[B, T]`, not shifted; -100 does not count.
        shift: whether `labels` are those of Hugging Face, of each token itself; False for labels
            of the positions that predict them, as `shift_labels` makes them.
        backend: name of a backend, or None for the best available.
        options: how the loss may run: memory, dtype of the logits, skipped rows.
        inputs: what the model's forward takes.

    Returns:
        float32 `[B, T]`: position t is about token t + 1. `log p = -softplus(-d)`.

    Raises:
        UnsupportedHeadError, TypeError: see `fused_loss`.
    """

    def compute(head: HeadCall) -> Tensor:
        return head.log_odds(labels, shift=shift, backend=backend, options=options)

    if shift:
        warn_if_shifted(labels, inputs, -100)
    return replace_head(model, compute, inputs).result


def fused_token_statistics(
    model: nn.Module,
    *,
    labels: Tensor,
    shift: bool = True,
    fields: Sequence[str] = FIELDS,
    backend: str | None = None,
    options: LinearOptions | None = None,
    **inputs: Any,
) -> TokenStatistics:
    """Statistics of each token under a causal LM, without the logits: see `token_statistics`.

    Args:
        model: see `fused_loss`.
        labels: int64 `[B, T]`, not shifted; -100 does not count.
        shift: whether `labels` are those of Hugging Face, of each token itself; False for labels
            of the positions that predict them, as `shift_labels` makes them.
        fields: names of `TokenStatistics`; what is not among them is None and costs nothing.
        backend: name of a backend, or None for the best available.
        options: how the call may run: memory, dtype of the logits, skipped rows.
        inputs: what the model's forward takes.

    Returns:
        `[B, T]` each: position t is about token t + 1.

    Raises:
        UnsupportedHeadError, TypeError: see `fused_loss`.
        ValueError: there is no such field.
    """
    found: list[TokenStatistics] = []

    def compute(head: HeadCall) -> Tensor:
        found[:] = [
            head.token_statistics(
                labels, shift=shift, fields=fields, backend=backend, options=options
            )
        ]
        numbers = [x for x in found[0] if x is not None and x.is_floating_point()]
        return torch.stack(numbers) if numbers else head.hidden.new_zeros(0)

    if shift:
        warn_if_shifted(labels, inputs, -100)
    numbers = iter(replace_head(model, compute, inputs).result)
    return TokenStatistics(
        *(next(numbers) if x is not None and x.is_floating_point() else x for x in found[0])
    )


def run_head(model: nn.Module, compute: Callable[[HeadCall], Tensor], **inputs: Any) -> Tensor:
    """Run a causal LM and let `compute` stand in for its lm_head.

    For several losses in one forward: `compute` may call the methods of `HeadCall` for different
    rows and stack the results. It is called anew if what the model does to its logits has changed
    since it was last observed.

    Args:
        model: see `fused_loss`.
        compute: from the inputs of the head to a small tensor.
        inputs: what the model's forward takes. The model is called without labels.

    Returns:
        What `compute` returned, attached to the graph.

    Raises:
        UnsupportedHeadError: see `fused_loss`; or the model computes an auxiliary loss, for which
            there is `run_head_with_auxiliary_loss`.
        TypeError: the model's forward has no argument of a given name.
        ValueError: `labels` or `logits_to_keep` among the inputs.
    """
    return without_auxiliary_loss(*run_head_with_auxiliary_loss(model, compute, **inputs))


def without_auxiliary_loss(result: Tensor, auxiliary: Tensor | None) -> Tensor:
    """The result alone, where there is nothing else.

    Raises:
        UnsupportedHeadError: an auxiliary loss would be lost.
    """
    if auxiliary is not None:
        raise UnsupportedHeadError(
            "the model computes an auxiliary loss (output_router_logits is set), which would be "
            "lost: use run_head_with_auxiliary_loss or run_two_heads_with_auxiliary_loss, or pass "
            "output_router_logits=False"
        )
    return result


def run_head_with_auxiliary_loss(
    model: nn.Module, compute: Callable[[HeadCall], Tensor], **inputs: Any
) -> tuple[Tensor, Tensor | None]:
    """`run_head`, and what the model adds to the loss of its logits by itself.

    Args:
        model: see `fused_loss`.
        compute: see `run_head`.
        inputs: see `run_head`.

    Returns:
        What `compute` returned, and the model's auxiliary loss of all its tokens, a scalar with the
        model's own coefficient (that of a router, if `output_router_logits` is set), or None.

    Raises:
        UnsupportedHeadError, TypeError, ValueError: see `run_head`.
    """
    done = replace_head(model, compute, inputs, auxiliary=True)
    return done.result, done.auxiliary_loss


def replace_head(
    model: nn.Module,
    compute: Callable[[HeadCall], Tensor],
    inputs: dict[str, Any],
    *,
    auxiliary: bool = False,
    call: Call | None = None,
) -> Forward:
    """Run a causal LM with `compute` in its lm_head's place, and see that nothing is lost.

    Args:
        model: see `fused_loss`.
        compute: see `run_head`.
        inputs: what the model's forward takes.
        auxiliary: whether the model's auxiliary loss is wanted; otherwise it is left out.
        call: runs the model's forward, with inputs that are then not checked; the model itself if
            None.

    Raises:
        UnsupportedHeadError, TypeError, ValueError: see `run_head`.
    """
    if call is None:
        check_inputs(model, inputs)
    if torch.is_grad_enabled():
        require_gradients(model)
    virtual_tokens = VirtualTokens.of(model)
    difference = None
    for again in (False, True):
        observation = observe(model, again=again, call=call)

        def compute_head(
            hidden: Tensor,
            operands: HeadOperands,
            transform: HeadTransform = observation.transform,
        ) -> Tensor:
            weight, bias, adapter = operands
            return compute(HeadCall(hidden, weight, bias, transform, virtual_tokens, adapter))

        done = forward_with(
            model,
            compute_head,
            observation.probe_of,
            inputs,
            auxiliary=auxiliary,
            call=call,
        )
        difference = observation.difference(done.logits)
        if difference is None:
            return done._replace(result=attach(done.result, done.logits))
        # Something has changed since it was observed: a config, or a module deep inside.
    raise UnsupportedHeadError(difference)


def verify_head(model: nn.Module, tokens: int = 8, seed: int = 0) -> float:
    """Check the fused head of a model against the logits of its own forward, on random tokens.

    Args:
        model: see `fused_loss`.
        tokens: length of the random sequence.
        seed: of the random tokens.

    Returns:
        The largest difference between the fused log-odds and those of `model(...).logits`.

    Raises:
        UnsupportedHeadError: they differ by more than rounding explains.
    """
    transform = observe_logit_transform(model)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(transform.vocab_size, (1, tokens), generator=draw).to(input_device(model))
    roundings: list[Rounding] = []
    weights: list[Tensor] = []

    def log_odds(head: HeadCall) -> Tensor:
        roundings.append(Rounding.of(head))
        weights.append(head.weight)
        return head.log_odds(ids)

    with torch.no_grad(), evaluating(model):
        fused = replace_head(model, log_odds, {"input_ids": ids}).result[0, :-1]
        logits = whole_row(model(input_ids=ids, use_cache=False).logits, weights[-1])
        logits = logits[0, -tokens:-1]
    plain = reference.target_log_odds(logits.double(), ids[0, 1:].to(logits.device))
    difference = float((fused.double() - plain.to(fused.device)).abs().max())
    allowed = roundings[-1].between_log_odds(logits, plain)
    if not difference <= allowed:
        raise UnsupportedHeadError(
            f"the fused log-odds differ from those of the model's logits by {difference:.3g}, "
            f"where rounding explains {allowed:.3g}"
        )
    return difference
