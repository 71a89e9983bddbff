"""Tiny models with adapters, for tests."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.support.tiny_models import make_model

LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "lora": {"target_modules": LINEAR},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def with_adapter(kind: str, **options: Any) -> nn.Module:
    """A model with a new adapter, which changes nothing yet; `options` are of `make_model`."""
    model = make_model(**options)
    if not ADAPTERS[kind]:
        return model
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **ADAPTERS[kind])
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def learning(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
