"""Adapters on the lm_head: the losses and gradients of the model's own logits, no merged weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.huggingface.test_head import (
    VOCAB,
    assert_same_losses,
    gradients,
    literal_loss,
    make_batch,
    make_model,
)
from tests.support.tiny_models import one_thread
from unilogit_kernels import Shift, reference
from unilogit_kernels.huggingface import (
    UnsupportedHeadError,
    WithoutAdapters,
    fused_kl_loss,
    fused_log_odds,
    fused_loss,
    run_two_heads,
)
from unilogit_kernels.testing import (
    AllocationGuard,
    assert_tensors_within_budget,
    assert_within_budget,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 12, "init_lora_weights": False}
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA),
    "rslora": lambda: peft.LoraConfig(target_modules=["lm_head"], use_rslora=True, **LORA),
    "lora with a bias": lambda: peft.LoraConfig(target_modules=["lm_head"], lora_bias=True, **LORA),
    "trained copy": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA
    ),
    "trainable tokens": lambda: peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 40, 77]}, **LORA
    ),
    "trainable tokens alone": lambda: peft.TrainableTokensConfig(
        target_modules=["lm_head"], token_indices=[5, 6, 96]
    ),
}


def adapted(kind: str, name: str = "llama", **options: Any) -> peft.PeftModel:
    """A model whose adapters have been trained already."""
    model = peft.get_peft_model(make_model(name), CONFIGS[kind](), **options)
    assert isinstance(model, peft.PeftModel)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw).to(parameter))
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_and_gradients_are_those_of_the_logits(kind: str) -> None:
    model, batch = adapted(kind), make_batch()
    assert_same_losses(model, batch)
    exact_model = copy.deepcopy(model).double()
    exact = gradients(exact_model, literal_loss(exact_model, batch))
    plain = gradients(model, literal_loss(model, batch))
    ours = gradients(model, fused_loss(model, **batch))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lm_head" in name for name in learning)
    assert all(ours[name].any() for name in learning)
    assert_tensors_within_budget(ours, exact, plain)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_disabled_adapter_is_the_base(kind: str) -> None:
    model, base, batch = adapted(kind), make_model("llama"), make_batch()
    with model.disable_adapter():
        assert torch.equal(fused_loss(model, **batch), fused_loss(base, **batch))
    assert not torch.equal(fused_loss(model, **batch), fused_loss(base, **batch))
    if kind == "lora with a bias":
        return  # which peft does not merge
    model.merge_adapter()
    assert_same_losses(model, batch)
    assert not torch.equal(fused_loss(model, **batch), fused_loss(base, **batch))


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_tied_weights_and_caps(name: str) -> None:
    """LoRA on a head that shares its weight with the embeddings leaves the embeddings alone."""
    model, batch = adapted("lora", name), make_batch()
    assert_same_losses(model, batch)
    if name == "qwen2":
        config = peft.LoraConfig(
            target_modules=["q_proj"], trainable_token_indices=[3, 40, 77], **LORA
        )
        tied = peft.get_peft_model(make_model(name), config)
        with torch.no_grad():
            tokens = [p for n, p in tied.named_parameters() if "trainable_tokens_delta" in n]
            tokens[0].add_(0.1)
        assert_same_losses(tied, batch)
        exact_model = copy.deepcopy(tied).double()
        exact = gradients(exact_model, literal_loss(exact_model, batch))
        plain = gradients(tied, literal_loss(tied, batch))
        assert_tensors_within_budget(gradients(tied, fused_loss(tied, **batch)), exact, plain)


@pytest.mark.parametrize("in_float32", [False, True])
def test_in_bfloat16(in_float32: bool) -> None:
    """Adapters in the model's dtype, and in float32 beside it as peft casts them."""
    model, batch = adapted("lora"), make_batch()
    exact = literal_loss(copy.deepcopy(model).bfloat16().double(), batch, "none").flatten()
    model = model.bfloat16()
    if in_float32:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    with torch.no_grad():
        plain = literal_loss(model, batch, "none").flatten()
        ours = fused_loss(model, **batch, reduction="none")[:, :-1].flatten()
    assert_within_budget(ours.bfloat16(), exact, plain.bfloat16())
    found = gradients(model, fused_loss(model, **batch))
    assert {found[n].dtype for n in found if "lora_" in n} == {
        torch.float32 if in_float32 else torch.bfloat16
    }


def test_dropout_is_that_of_training() -> None:
    config = peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.5, **LORA)
    model, batch = peft.get_peft_model(make_model("llama"), config), make_batch()
    assert_same_losses(model.eval(), batch)
    evaluated = fused_log_odds(model, **batch)
    model.train()
    counted = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][counted]

    def literal() -> Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return reference.target_log_odds(logits[:, :-1][counted], labels)

    ours = torch.stack([fused_log_odds(model, **batch)[:, :-1][counted] for _ in range(100)])
    theirs = torch.stack([literal() for _ in range(100)])
    # Means of 100 draws each: apart by chance alone, and so are their spreads.
    spread = (ours.var(0) + theirs.var(0)).div(100).sqrt()
    assert bool(((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread).all())
    assert 0.5 < float((ours.std(0).mean() / theirs.std(0).mean()).detach()) < 2
    assert not torch.equal(evaluated[:, :-1][counted], ours[0])


def test_several_adapters_and_switching() -> None:
    model, batch = adapted("lora"), make_batch()
    model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"], **LORA))
    assert_same_losses(model, batch)
    model.set_adapter("other")
    assert_same_losses(model, batch)
    tuner: Any = model.base_model
    tuner.set_adapter(["default", "other"])
    assert_same_losses(model, batch)


def test_nothing_of_the_weights_size_is_made() -> None:
    torch.manual_seed(0)
    model, batch = adapted("lora"), make_batch()
    head: Any = model.get_output_embeddings()
    wide = nn.Linear(32, 20_000, bias=False)
    head.base_layer = wide.requires_grad_(False)
    head.lora_B["default"] = nn.Linear(4, 20_000, bias=False)
    fused_loss(model, **batch)  # observed
    with AllocationGuard(forbidden_elements=20_000 * 32) as guard:
        fused_loss(model, **batch).backward()
    assert guard.largest >= 20_000 * 4
    assert head.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(target_modules=["lm_head"], use_dora=True), "'default' .* is Dora"),
        (peft.LoHaConfig(target_modules=["lm_head"]), "loha.layer.Linear: of peft's adapters"),
        (peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "ia3.layer.Linear"),
        (peft.OFTConfig(target_modules=["lm_head"], oft_block_size=8), "oft.layer.Linear"),
        (
            peft.TrainableTokensConfig(target_modules=["lm_head"], token_indices=list(range(30))),
            "30 trainable tokens",
        ),
    ],
    ids=lambda each: getattr(each, "peft_type", None) or "",
)
def test_other_adapters_are_refused_by_name(config: peft.PeftConfig, message: str) -> None:
    model = peft.get_peft_model(make_model("llama"), config)
    with pytest.raises(UnsupportedHeadError, match=f"(?s){message}.*merge_and_unload"):
        fused_loss(model, **make_batch())


def test_what_would_not_run_is_refused() -> None:
    model, batch = adapted("lora"), make_batch()
    head: Any = model.get_output_embeddings()
    hook = head.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedHeadError, match="below the lm_head's adapter has forward hooks"):
        fused_loss(model, **batch)
    hook.remove()
    model.eval()
    with pytest.raises(UnsupportedHeadError, match="adapter_names chooses"):
        fused_loss(model, **batch, adapter_names=["default", "__base__", "default"])


# ---- the base as the reference -------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_divergence_from_its_own_base(kind: str) -> None:
    model, base, batch = adapted(kind), make_model("llama"), make_batch()
    rewritten = {"rewrite": Shift(5.0), **batch}
    learning = [parameter.requires_grad for parameter in model.parameters()]
    expected = gradients(model, fused_kl_loss(model, base, **rewritten))
    found = gradients(model, fused_kl_loss(model, WithoutAdapters(model), **rewritten))
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    with AllocationGuard(forbidden_elements=VOCAB * 32 * 4):
        fused_kl_loss(model, WithoutAdapters(model), **batch)


def test_frozen_parameters_stay_frozen() -> None:
    model, batch = adapted("lora"), make_batch()
    frozen: Any = model.get_output_embeddings().lora_A["default"].weight
    frozen.requires_grad_(False)
    fused_kl_loss(model, WithoutAdapters(model), **batch).backward()
    assert frozen.grad is None
    assert not frozen.requires_grad


def test_adapters_without_a_peft_model() -> None:
    """`PreTrainedModel.add_adapter`, in training with dropout: the base draws no numbers."""
    model, base, batch = make_model("llama"), make_model("llama"), make_batch()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA))
    assert_same_losses(model, batch)
    expected = fused_kl_loss(model, base, **batch)
    assert torch.equal(fused_kl_loss(model, WithoutAdapters(model), **batch), expected)
    assert_same_losses(model, batch)


def test_a_model_without_adapters_has_no_base() -> None:
    with pytest.raises(ValueError, match="a LlamaForCausalLM without adapters has no base"):
        WithoutAdapters(make_model("llama"))
    model, batch = adapted("lora"), make_batch()
    del batch["labels"]

    def compute(student: Any, teacher: Any) -> Tensor:
        assert teacher.adapter is None
        assert student.adapter is not None
        assert teacher.weight is student.weight
        total: Tensor = student.hidden.sum()
        return total

    run_two_heads(model, WithoutAdapters(model), compute, **batch)
