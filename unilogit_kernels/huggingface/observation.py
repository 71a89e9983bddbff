"""What was observed of a model's logits, and under which conditions it may be used again."""

from __future__ import annotations

import dataclasses
import math
import weakref
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from unilogit_kernels.huggingface import logit_transform, stand_in
from unilogit_kernels.huggingface.adapted_head import HeadOperands
from unilogit_kernels.huggingface.logit_transform import (
    OBSERVED_TOKENS,
    HeadTransform,
    UnsupportedHeadError,
)
from unilogit_kernels.huggingface.sharding import kinds_of
from unilogit_kernels.huggingface.tensor_parallel import require_one_weight
from unilogit_kernels.huggingface.wrappers import unwrapped


@dataclasses.dataclass(frozen=True)
class Observation:
    """How a model transforms its logits, and what shows in each call that it still does.

    Attributes:
        transform: what happens to the logits after the head.
        rows: of the head's weight.
        device: where the probe has to be. On the CPU, checking it waits for no GPU.
        identity: what the observation holds for.
    """

    transform: HeadTransform
    rows: int
    device: torch.device
    identity: tuple[Any, ...]

    @cached_property
    def _probe(self) -> Tensor:
        return logit_transform.row_probe(self.rows, self.transform.vocab_size)

    @cached_property
    def _expected(self) -> Tensor:
        return self.transform(self._probe)

    def probe_of(self, rows: int) -> Tensor:
        """What the head returns in each call: float64 `[1, 1, rows]`."""
        if rows != self.rows:
            return logit_transform.row_probe(rows, rows).to(self.device)
        return self._probe.to(self.device)

    def difference(self, seen: Tensor) -> str | None:
        """How a call's probe differs from what it should be, or None."""
        return logit_transform.difference_from(self._expected, seen, self._probe)


_observations: weakref.WeakKeyDictionary[nn.Module, Observation] = weakref.WeakKeyDictionary()


def observe(
    model: nn.Module, *, again: bool = False, call: stand_in.Call | None = None
) -> Observation:
    """The model's observation, made by one forward over a few tokens unless there is one.

    An observation is used again for the same head, with tensors of the same kind, and the same
    hooks and forwards of all modules around it. What else may have changed shows in the probe that
    goes through each call.

    Args:
        model: a Hugging Face causal LM, wrapped or not.
        again: make a new one in any case.
        call: runs the model's forward; the model itself if None.

    Raises:
        UnsupportedHeadError: see `observe_logit_transform`.
    """
    inner = unwrapped(model)
    identity = _identity(model)
    known = _observations.get(inner)
    if again or known is None or known.identity != identity:
        _observations.pop(inner, None)
        _observations[inner] = known = _observe(model, identity, call)
    return known


def observe_logit_transform(model: nn.Module) -> HeadTransform:
    """Find out what a causal LM does to its logits, by one forward over a few tokens.

    The answer is kept with the model, until its head, its hooks or its forward change.

    Args:
        model: see `fused_loss`.

    Returns:
        The scale, the cap and the size of the vocabulary.

    Raises:
        UnsupportedHeadError: it is not a factor followed by a tanh cap, the same for all tokens and
            columns, or the head is not a plain linear layer.
    """
    return observe(model).transform


def _identity(model: nn.Module) -> tuple[Any, ...]:
    head = stand_in.plain_head(model)
    containers = stand_in.containers_of_head(model, head)
    around = tuple(
        (
            weakref.ref(module),
            id(vars(module).get("forward")),
            tuple(module._forward_pre_hooks),
            tuple(module._forward_hooks),
        )
        for module in [*containers, head]
    )
    return around, kinds_of(head, containers)


def _observe(
    model: nn.Module, identity: tuple[Any, ...], call: stand_in.Call | None
) -> Observation:
    require_one_weight(unwrapped(model), stand_in.plain_head(model))
    try:
        return _observe_on(torch.device("cpu"), model, identity, call)
    except UnsupportedHeadError as error:
        device = head_device(model)
        # Some models combine their logits with tensors of their own, on their own device.
        if device.type == "cpu" or not isinstance(error.__cause__, RuntimeError):
            raise
        return _observe_on(device, model, identity, call)


def _observe_on(
    device: torch.device,
    model: nn.Module,
    identity: tuple[Any, ...],
    call: stand_in.Call | None,
) -> Observation:
    probes: list[Tensor] = []

    def make_probe(rows: int) -> Tensor:
        probes.append(logit_transform.first_probe(rows))
        return probes[-1].to(device)

    def no_result(hidden: Tensor, operands: HeadOperands) -> Tensor:
        return hidden.new_zeros(())

    ids = torch.arange(math.prod(OBSERVED_TOKENS)).view(OBSERVED_TOKENS)
    embeddings = unwrapped(model).get_input_embeddings()
    ids = ids % getattr(embeddings, "num_embeddings", len(ids.flatten()))
    with torch.no_grad(), stand_in.evaluating(model):
        seen = stand_in.forward_with(
            model, no_result, make_probe, {"input_ids": ids.to(input_device(model))}, call=call
        )
    transform = logit_transform.transform_of(seen.logits, probes[0])
    return Observation(transform, probes[0].shape[-1], device, identity)


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its token ids."""
    device = next(model.parameters()).device
    # Weights that accelerate keeps elsewhere are on meta; its hooks move the inputs.
    return torch.device("cpu") if device.type == "meta" else device


def head_device(model: nn.Module) -> torch.device:
    """Where the head's weight is."""
    weight = next(stand_in.plain_head(model).parameters(), None)
    return input_device(model) if weight is None or weight.is_meta else weight.device
