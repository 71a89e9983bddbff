"""One forward of a causal LM in which something else is computed in the place of its lm_head.

The model's own forward runs, and so does its lm_head's own `__call__`, so that the hooks of FSDP,
accelerate and others fire and the weight is there when it is used. For the length of one call the
head's forward is replaced: it computes a small result from its input and its weight, and returns a
few numbers, the probe, where the logits would have been.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unilogit_kernels.huggingface.adapted_head import HeadOperands, layer_of, operands_of
from unilogit_kernels.huggingface.auxiliary_loss import OwnLoss
from unilogit_kernels.huggingface.logit_transform import UnsupportedHeadError, failed_after_head
from unilogit_kernels.huggingface.quantised import packs_in_eval
from unilogit_kernels.huggingface.sharding import (
    class_of,
    require_gathered,
    without_output_casts,
)
from unilogit_kernels.huggingface.tensor_parallel import (
    TransformersStyle,
    as_logits_of,
    require_known_layout,
    whole_hidden,
    whole_row,
)
from unilogit_kernels.huggingface.wrappers import unwrapped

Compute = Callable[[Tensor, HeadOperands], Tensor]
Call = Callable[..., Any]
"""Runs a model's forward. What stands in that forward's place passes on what it replaced, so that
the hooks around the model, which run already, do not run once more."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Forward(NamedTuple):
    """What one forward gave.

    Attributes:
        result: what was computed in the head's place.
        logits: the probe, as it came out of the model, of all columns.
        auxiliary_loss: the model's own term beside the loss of the logits, or None.
        output: all that came out of the model, with the probe as its logits.
    """

    result: Tensor
    logits: Tensor
    auxiliary_loss: Tensor | None
    output: Any


def forward_with(
    model: nn.Module,
    compute: Compute,
    make_probe: Callable[[int], Tensor],
    inputs: dict[str, Any],
    *,
    auxiliary: bool = False,
    call: Call | None = None,
) -> Forward:
    """Run the model with `compute` in the head's place.

    Args:
        model: a Hugging Face causal LM, wrapped or not.
        compute: from the head's input `[B, T, H]` and what it applies to a tensor.
        make_probe: from the rows of the weight to what the head returns, on its device.
        inputs: what the model's forward takes.
        auxiliary: also compute the model's own auxiliary loss, where it has one.
        call: runs the model's forward; the model itself if None.

    Raises:
        UnsupportedHeadError: the head is no plain linear layer, or the model cannot go on from the
            probe.
    """
    head, inner = plain_head(model), unwrapped(model)
    run = model if call is None else call
    results: list[Tensor] = []
    weights: list[Tensor] = []
    returned = False

    def forward(hidden: Tensor, **chosen: Any) -> Tensor:
        nonlocal returned
        if results:
            raise UnsupportedHeadError("the lm_head was called more than once in one forward")
        if chosen.get("adapter_names") is not None:
            raise UnsupportedHeadError(
                "adapter_names chooses an adapter of the lm_head for each sequence, and all go "
                "through it at once: call the model once for each adapter"
            )
        operands = operands_of(head)
        weight, bias, adapter = operands
        hidden = whole_hidden(hidden, weight)
        parts = {"input": hidden, "weight": weight, "bias": bias}
        if adapter is not None:
            parts |= {"adapter's A": adapter.a, "adapter's B": adapter.b}
        for name, tensor in parts.items():
            _require_plain(name, tensor)
        if hidden.dim() != 3:
            raise UnsupportedHeadError(
                f"the lm_head was called on hidden states of shape {list(hidden.shape)}, where "
                "[batch, time, hidden size] was expected; use objective_loss on model(...).logits"
            )
        results.append(compute(hidden, operands))
        output = _StandIn.apply(results[-1], make_probe(weight.shape[0]))
        weights.append(weight)
        returned = True
        return as_logits_of(cast(Tensor, output), weight)

    own_loss = OwnLoss(containers_of_head(model, head), inputs) if auxiliary else None
    try:
        with _replaced_forward(head, forward), without_output_casts(inner, head):
            if own_loss is None:
                output = run(**{"use_cache": False, **inputs})
            else:
                output = own_loss.run(run, {"use_cache": False, **inputs})
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if returned and not isinstance(e, (UnsupportedHeadError, torch.OutOfMemoryError)):
            raise UnsupportedHeadError(failed_after_head(e)) from e
        raise
    if not results:
        raise UnsupportedHeadError(
            "the lm_head was not called in the model's forward: what it returns was computed "
            "elsewhere; use objective_loss on model(...).logits"
        )
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedHeadError(
            f"the model returned a {type(output).__name__} without a tensor of logits"
        )
    auxiliary_loss = None if own_loss is None else own_loss.value(output)
    return Forward(results[0], whole_row(logits, weights[0]), auxiliary_loss, output)


_replaced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The heads in whose place something is being computed."""


def is_stood_in_for(model: nn.Module) -> bool:
    """Whether something is being computed in the place of the model's lm_head right now."""
    head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    return head in _replaced


@contextmanager
def _replaced_forward(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    # accelerate's hooks have replaced `forward` already and call what it was from within.
    attribute = "_old_forward" if "_hf_hook" in vars(head) else "forward"
    previous = vars(head).get(attribute)
    style = TransformersStyle.of(head, previous)
    setattr(head, attribute, forward if style is None else style.around(head, forward))
    _replaced.add(head)
    try:
        yield
    finally:
        _replaced.discard(head)
        if previous is None:
            delattr(head, attribute)
        else:
            setattr(head, attribute, previous)


def containers_of_head(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules that the head is inside of, outermost first: what can touch its output."""
    inner = unwrapped(model)
    path = next((name for name, module in inner.named_modules() if module is head), "")
    names = path.split(".")
    return [inner, *(inner.get_submodule(".".join(names[:i])) for i in range(1, len(names)))]


def plain_head(model: nn.Module) -> nn.Module:
    """The lm_head, if its forward is `hidden @ weight.T + bias`, with an adapter or without.

    Returns:
        The module that the model calls: a plain linear layer, or what peft wraps one in.

    Raises:
        UnsupportedHeadError: it is neither.
    """
    inner = unwrapped(model)
    find = getattr(inner, "get_output_embeddings", None)
    try:
        head: nn.Module | None = find() if find is not None else None
    except NotImplementedError:
        head = None
    if head is None:
        raise UnsupportedHeadError(
            f"{type(inner).__name__} has no output embeddings; expected a causal LM"
        )
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise UnsupportedHeadError(f"{type(inner).__name__} is an encoder-decoder, not a causal LM")
    layer = layer_of(head)
    kind = class_of(layer)
    if not isinstance(layer, nn.Linear) or kind.forward is not nn.Linear.forward:
        raise UnsupportedHeadError(
            f"the lm_head is a {kind.__module__}.{kind.__qualname__}, not a plain "
            f"torch.nn.Linear{_DEQUANTISE}"
        )
    for module in (head, layer):
        replaced = None if "_hf_hook" in vars(module) else vars(module).get("forward")
        if replaced is not None and TransformersStyle.of(module, replaced) is None:
            raise UnsupportedHeadError(
                "the forward of the lm_head has been replaced on the module, so its effect on the "
                "logits is unknown: undo that first"
            )
        if module._backward_hooks or module._backward_pre_hooks:
            raise UnsupportedHeadError(
                "the lm_head has backward hooks, which would see no gradient of the logits, since "
                "there are none: remove them first"
            )
    if layer is not head and (layer._forward_hooks or layer._forward_pre_hooks):
        raise UnsupportedHeadError(
            "the layer below the lm_head's adapter has forward hooks, which would not run, since "
            "its weight is taken instead: remove them, or wrap the whole lm_head"
        )
    for name, tensor in head.named_parameters():
        # A shard is whole inside the forward, where it is looked at again.
        if not isinstance(tensor, DTensor) and not hasattr(tensor, "ds_shape"):
            _require_plain(name, tensor)
    return head


_DEQUANTISE = (
    ". If it is quantised, load the model with the lm_head left out of the quantisation "
    "(llm_int8_skip_modules, modules_to_not_convert), or dequantise it"
)


def _require_plain(name: str, tensor: Tensor | None) -> None:
    """Refuse a tensor that is not just its numbers, whatever class the module has."""
    if tensor is None:
        return
    require_gathered(name, tensor)
    if tensor.is_meta:
        raise UnsupportedHeadError(
            f"the lm_head's {name} is on the meta device inside its own forward, without numbers: "
            "keep an lm_head with an adapter out of what accelerate offloads"
        )
    if isinstance(tensor, DTensor) and name in ("weight", "bias"):
        require_known_layout(name, tensor)
        with torch.no_grad():
            tensor = tensor.to_local()
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in _DTYPES:
        raise UnsupportedHeadError(
            f"the lm_head's {name} is a {type(tensor).__module__}.{type(tensor).__qualname__} of "
            f"dtype {tensor.dtype}, where a plain tensor of float16, bfloat16, float32 or float64 "
            f"was expected{_DEQUANTISE}"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, so that an extra forward draws no random numbers."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in filter(packs_in_eval, modes):
        module.training = True
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _StandIn(torch.autograd.Function):
    """Returns the probe, as a function of the result.

    The result thereby depends on the head's output and on the model's, so that hooks which wait
    for their gradients (FSDP gathers weights there) fire before the result's own backward.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, probe: Tensor) -> Tensor:
        ctx.like = (result.shape, result.dtype, result.device)
        return probe.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), None


class _Attach(torch.autograd.Function):
    """Returns the result, as a function of the model's output too; the other half of `_StandIn`."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, output: Tensor) -> Tensor:
        ctx.like = (output.shape, output.dtype, output.device)
        # No view, which could not be changed in place, as trainers do that scale their loss.
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def attach(result: Tensor, output: Tensor) -> Tensor:
    """The result, also as a function of the model's output."""
    return cast(Tensor, _Attach.apply(result, output))
