"""Which layers of a model are trained."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """A model's stack of decoder layers, the first one first.

    Args:
        model: a Hugging Face causal LM, or one that peft wraps.

    Raises:
        ValueError: they cannot be found.
    """
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} has no single stack of {depth} decoder layers")
    return stacks[0]


def train_only_top_layers(
    model: PreTrainedModel, layers: int, *, below: int | None = None
) -> list[str]:
    """Freeze everything but the last decoder layers.

    Args:
        model: a Hugging Face causal LM.
        layers: how many of its layers stay trainable.
        below: count from this layer down, which is the first one that is frozen; from the top
            if None.

    Returns:
        The names of the parameters that stay trainable.

    Raises:
        ValueError: the model does not have so many layers, or they cannot be found.
    """
    stack = decoder_layers(model)
    end = len(stack) if below is None else below
    if not 1 <= layers <= end:
        where = "" if below is None else f", of which {below} lie up to the one that is steered"
        raise ValueError(f"the model has {len(stack)} layers{where}; cannot train the top {layers}")
    model.requires_grad_(False)
    for layer in list(stack)[end - layers : end]:
        layer.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
