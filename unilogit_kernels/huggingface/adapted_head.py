"""What peft makes of an lm_head: the layer below, the weight that it applies, its low-rank term.

Read anew in each forward, since adapters are switched, disabled and merged in place. Like the other
modules here it needs no peft: a model that it wrapped is there only where it was imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.huggingface.logit_transform import UnsupportedHeadError
from unilogit_kernels.huggingface.sharding import class_of
from unilogit_kernels.huggingface.wrappers import imported, unwrapped

MOST_TOKENS = 4
"""At most H / this many tokens may be trainable: what says which they are is `[V, tokens]`."""

_REMEDY = "leave lm_head out of the adapter's modules, or call merge_and_unload() first"


class HeadOperands(NamedTuple):
    """What an lm_head applies to hidden states in a forward.

    Attributes:
        weight: `[rows, H]`.
        bias: `[rows]` or None.
        adapter: a low-rank term, or None.
    """

    weight: Tensor
    bias: Tensor | None
    adapter: LowRank | None = None


def is_of_peft(head: nn.Module) -> bool:
    """Whether peft has wrapped or replaced it."""
    return class_of(head).__module__.startswith("peft.")


def layer_of(head: nn.Module) -> nn.Module:
    """The layer whose weight an lm_head applies now: itself, or what peft wraps.

    Raises:
        UnsupportedHeadError: it is a layer of peft that is not known here.
    """
    if not is_of_peft(head):
        return head
    layer: Any = head
    found: nn.Module
    if _is(head, "peft.utils.other", "ModulesToSaveWrapper"):
        copies = layer.modules_to_save
        names = [] if layer.disable_adapters else [n for n in layer.active_adapters if n in copies]
        found = copies[names[0]] if names else layer.original_module
        return found
    below = _tokens(head)
    if below is None and _is(head, "peft.tuners.lora.layer", "Linear"):
        below = head
    if below is not None:
        found = below.base_layer
        return found
    kind = class_of(head)
    raise UnsupportedHeadError(
        f"the lm_head is a {kind.__module__}.{kind.__qualname__}: of peft's adapters, LoRA, "
        "modules_to_save and trainable tokens of a plain torch.nn.Linear, not quantised, are known "
        f"here, and what another one does to the logits would be lost; {_REMEDY}"
    )


def operands_of(head: nn.Module) -> HeadOperands:
    """What an lm_head applies now; `layer_of` knows it.

    Raises:
        UnsupportedHeadError: its adapter is no sum of low rank.
    """
    layer: Any = layer_of(head)
    # Read once, as the layer itself does: a parametrisation computes it anew each time.
    weight, bias = layer.weight, layer.bias
    if not is_of_peft(head) or _is(head, "peft.utils.other", "ModulesToSaveWrapper"):
        return HeadOperands(weight, bias)
    tokens = _tokens(head)
    return _of_tokens(tokens, weight, bias) if tokens is not None else _of_lora(head, weight, bias)


def _is(module: nn.Module, name: str, kind: str) -> bool:
    found = imported(name, kind)
    return found is not None and class_of(module) is found


def _tokens(head: nn.Module) -> Any:
    """The layer of trainable tokens, if the head is one or wraps one."""
    if _is(head, "peft.utils.other", "TrainableTokensWrapper"):
        return head.token_adapter
    return head if _is(head, "peft.tuners.trainable_tokens.layer", "TrainableTokensLayer") else None


def _active(layer: Any, adapters: Any) -> list[str]:
    """Those of the adapters that count in a forward; as there, ones that are disabled leave."""
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return []
    return [] if layer.merged else [name for name in layer.active_adapters if name in adapters]


def _of_lora(head: Any, weight: Tensor, bias: Tensor | None) -> HeadOperands:
    terms = []
    for name in _active(head, head.lora_A):
        variant = getattr(head, "lora_variant", {}).get(name)
        if variant is not None or getattr(head, "use_dora", {}).get(name):
            kind = (
                "DoRA" if variant is None else type(variant).__name__.removesuffix("LinearVariant")
            )
            raise UnsupportedHeadError(
                f"the adapter {name!r} of the lm_head is {kind}, which is more than a sum of low "
                f"rank: {_REMEDY}"
            )
        up, dropout, scale = head.lora_B[name], head.lora_dropout[name], float(head.scaling[name])
        chance = getattr(dropout, "p", 0.0) if dropout.training else 0.0
        terms.append(LowRank(head.lora_A[name].weight, up.weight, scale, chance))
        if up.bias is not None:
            more = (scale * up.bias).to(weight.dtype)
            bias = more if bias is None else bias + more
    return HeadOperands(weight, bias, _side_by_side(terms))


def _side_by_side(terms: list[LowRank]) -> LowRank | None:
    """Several terms as one."""
    if len(terms) < 2:
        return terms[0] if terms else None
    if any(term.dropout for term in terms):
        raise UnsupportedHeadError(
            f"the lm_head has {len(terms)} active adapters, one of them with a dropout: train one "
            "of them at a time (set_adapter), or set lora_dropout to 0"
        )
    dtype = torch.float32 if len({term.a.dtype for term in terms}) > 1 else terms[0].a.dtype
    a = torch.cat([(term.scale * term.a).to(dtype) for term in terms])
    return LowRank(a, torch.cat([term.b.to(dtype) for term in terms], 1))


def _of_tokens(layer: Any, weight: Tensor, bias: Tensor | None) -> HeadOperands:
    """Rows of the weight that are replaced: a term of as many ranks, of what they differ by."""
    names = _active(layer, layer.trainable_tokens_delta)
    if not names:
        return HeadOperands(weight, bias)
    rows = [row for name in names for row in layer.token_indices[name]]
    if len(rows) > weight.shape[1] // MOST_TOKENS or len(set(rows)) < len(rows):
        raise UnsupportedHeadError(
            f"the lm_head has {len(rows)} trainable tokens, where at most 1 / {MOST_TOKENS} of its "
            f"{weight.shape[1]} columns, each token once, are a sum of low rank; {_REMEDY}"
        )
    index = torch.tensor(rows, device=weight.device)
    exact = torch.promote_types(weight.dtype, torch.float32)
    replaced = torch.cat([layer.trainable_tokens_delta[name] for name in names]).to(exact)
    a = replaced - weight[index].to(exact)
    b = a.new_zeros(weight.shape[0], len(rows))
    b[index, torch.arange(len(rows), device=b.device)] = 1
    # As in peft's own layer, which applies the weight alone.
    return HeadOperands(weight, None, LowRank(a, b))


# ---- models with adapters ----------------------------------------------------------------------


def has_adapters(model: nn.Module) -> bool:
    """Whether peft wraps the model, or `add_adapter` gave it adapters of its own."""
    return bool(getattr(unwrapped(model), "peft_config", None))


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The model as it is below its adapters, whose parameters go on to learn afterwards.

    Args:
        model: wrapped by peft, or with adapters of its own (`PreTrainedModel.add_adapter`).

    Raises:
        ValueError: it has none.
    """
    inner: Any = unwrapped(model)
    if not has_adapters(inner):
        raise ValueError(
            f"a {type(inner).__name__} without adapters has no base model below them; pass a model "
            "that peft wraps"
        )
    wrapper = imported("peft.peft_model", "PeftModel")
    # To disable and enable adapters sets what learns, also of what somebody froze.
    learning = {parameter: parameter.requires_grad for parameter in inner.parameters()}
    try:
        if wrapper is not None and isinstance(inner, wrapper):
            with inner.disable_adapter():
                yield
        else:
            inner.disable_adapters()
            try:
                yield
            finally:
                inner.enable_adapters()
    finally:
        for parameter, learns in learning.items():
            if parameter.requires_grad != learns:
                parameter.requires_grad_(learns)
