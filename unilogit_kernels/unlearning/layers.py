"""Which layers of a model are trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def train_only_top_layers(model: PreTrainedModel, layers: int) -> list[str]:
    """Freeze everything but the last decoder layers.

    Args:
        model: a Hugging Face causal LM.
        layers: how many of its layers stay trainable.

    Returns:
        The names of the parameters that stay trainable.

    Raises:
        ValueError: the model does not have so many layers, or they cannot be found.
    """
    depth = model.config.get_text_config().num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} has no single stack of {depth} decoder layers")
    if not 1 <= layers <= depth:
        raise ValueError(f"the model has {depth} layers; cannot train the top {layers}")
    model.requires_grad_(False)
    for layer in stacks[0][depth - layers :]:
        layer.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
