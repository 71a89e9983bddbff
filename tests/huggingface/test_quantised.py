"""Quantised layers below the head: what an evaluation must not do to them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.huggingface.test_head import gradients, make_batch, make_model
from tests.support.tiny_models import one_thread
from unilogit_kernels.huggingface import UnsupportedHeadError, WithoutAdapters, fused_kl_loss

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


class Linear4bit(nn.Linear):
    """Behaves as bitsandbytes' does on a CPU: once it is packed for inference, it has no graph."""

    def forward(self, input: Tensor) -> Tensor:
        state: Any = vars(self.weight)["quant_state"]
        if not self.training and not input.requires_grad:
            state.packing_format_for_cpu = True
        output = super().forward(input)
        return output.detach() if getattr(state, "packing_format_for_cpu", False) else output


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> peft.PeftModel:
    """With LoRA beside 4-bit layers."""
    module: Any = ModuleType("bitsandbytes.nn.modules")
    module.Linear4bit = Linear4bit
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.modules", module)
    base = make_model("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    assert isinstance(adapted, peft.PeftModel)
    for layer in base.model.layers:
        for each in (layer.mlp.down_proj, layer.self_attn.q_proj.base_layer):
            each.__class__ = Linear4bit
            each.weight.quant_state = SimpleNamespace()
    return adapted.train()


def test_looking_at_a_model_and_its_base_leaves_every_gradient(model: peft.PeftModel) -> None:
    reference = WithoutAdapters(model)
    for _ in range(2):
        found = gradients(model, fused_kl_loss(model, reference, **make_batch()))
        assert all(bool(grad.any()) for name, grad in found.items() if "lora_" in name)


def test_a_model_that_was_evaluated_before_is_refused(model: peft.PeftModel) -> None:
    batch = make_batch()
    with torch.no_grad():
        model.eval()(input_ids=batch["input_ids"])
        assert fused_kl_loss(model, WithoutAdapters(model), **batch).isfinite()
    with pytest.raises(
        UnsupportedHeadError, match=r"base_layer was repacked .* load the model anew"
    ):
        fused_kl_loss(model, WithoutAdapters(model), **batch)
