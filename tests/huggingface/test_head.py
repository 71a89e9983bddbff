"""The fused head gives the loss and the gradients of the model's own logits."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from tests.support.tiny_models import one_thread
from unilogit_kernels import reference
from unilogit_kernels.huggingface.head import (
    HeadTransform,
    UnsupportedHeadError,
    fused_log_odds,
    fused_loss,
    fused_token_statistics,
    observe_logit_transform,
    run_head,
    verify_head,
)
from unilogit_kernels.testing import (
    AllocationGuard,
    assert_tensors_within_budget,
    assert_within_budget,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

VOCAB = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
# A head-side weight 20 times the usual, so that a cap or a scale which is missing shows.
ARCHITECTURES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "qwen2": lambda: transformers.Qwen2Config(**GQA, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**GQA, head_dim=8, final_logit_softcapping=3.0),
    "cohere": lambda: transformers.CohereConfig(**GQA, logit_scale=0.0625),
    "granite": lambda: transformers.GraniteConfig(**GQA, logits_scaling=6.0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "phi": lambda: transformers.PhiConfig(**SMALL),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        **{**SMALL, "num_hidden_layers": 3},
        num_key_value_heads=1,
        lru_width=32,
        logits_soft_cap=2.0,
    ),
}
TRANSFORMS = {
    "gemma2": (None, 3.0),
    "cohere": (0.0625, None),
    "granite": (1 / 6.0, None),
    "recurrent_gemma": (None, 2.0),
}


def make_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model: transformers.PreTrainedModel
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    model.eval()
    return model


def make_batch(seed: int = 1) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, 9), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def literal_loss(model: nn.Module, batch: dict[str, Any], reduction: str = "mean") -> Tensor:
    """The paper's loss on the model's own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    return reference.unilogit_loss(logits[:, :-1], labels, reduction=reduction)


def assert_same_losses(model: nn.Module, batch: dict[str, Any]) -> None:
    """Token by token, as exact as the literal loss in the model's dtype."""
    with torch.no_grad():
        exact = literal_loss(copy.deepcopy(model).double(), batch, "none").flatten()
        plain = literal_loss(model, batch, "none").flatten()
        fused = fused_loss(model, **batch, reduction="none")
    assert not fused[:, -1].any()
    assert_within_budget(fused[:, :-1].flatten(), exact, plain.to(fused.dtype))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_equal_those_of_the_logits(name: str) -> None:
    model, batch = make_model(name), make_batch()
    exact_model = copy.deepcopy(model).double()
    assert_same_losses(model, batch)
    fused, plain = fused_loss(model, **batch), literal_loss(model, batch)
    exact = literal_loss(exact_model, batch)
    exact_grads = gradients(exact_model, exact)
    plain_grads = gradients(model, plain)
    assert_tensors_within_budget(gradients(model, fused), exact_grads, plain_grads)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_happens_to_the_logits_is_observed(name: str) -> None:
    transform = observe_logit_transform(make_model(name))
    assert transform == HeadTransform(*TRANSFORMS.get(name, (None, None)), VOCAB)


def test_log_odds_of_each_token() -> None:
    model, batch = make_model("gemma2"), make_batch()
    seen = fused_log_odds(model, **batch)
    counted = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][counted]

    def from_logits(model: nn.Module) -> Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return reference.target_log_odds(logits[counted], labels)

    with torch.no_grad():
        exact, plain = from_logits(copy.deepcopy(model).double()), from_logits(model)
    assert_within_budget(seen[:, :-1][counted].detach(), exact, plain)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_statistics_of_each_token(name: str) -> None:
    """Numbers and tokens, each about the token after its position; any of them alone."""
    model, batch = make_model(name), make_batch()
    seen = fused_token_statistics(model, **batch)
    counted = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][counted]

    def from_logits(model: nn.Module) -> tuple[Tensor, Tensor]:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return logits[counted], reference.entropy(logits[counted])

    with torch.no_grad():
        (z, exact), (_, plain) = from_logits(copy.deepcopy(model).double()), from_logits(model)
    assert seen.entropy is not None
    assert seen.argmax is not None
    assert_within_budget(seen.entropy[:, :-1][counted].detach(), exact, plain)
    assert torch.equal(seen.argmax[:, :-1][counted], z.argmax(-1))
    assert gradients(model, seen.entropy.sum())
    alone = fused_token_statistics(model, **batch, fields=("is_argmax",))
    assert alone.entropy is None
    assert alone.is_argmax is not None
    assert torch.equal(alone.is_argmax[:, :-1][counted], z.argmax(-1) == labels)


def test_token_weights_belong_to_the_labels_tokens() -> None:
    model, batch = make_model("llama"), make_batch()
    weights = torch.rand(3, 9, generator=torch.Generator().manual_seed(3))
    each = fused_loss(model, **batch, reduction="none")
    weighted = fused_loss(model, **batch, reduction="none", token_weights=weights)
    exact, plain = (x[:, :-1].detach() * weights[:, 1:] for x in (each.double(), each))
    assert_within_budget(weighted[:, :-1], exact, plain)


def test_another_ignore_index() -> None:
    model, batch = make_model("llama"), make_batch()
    other = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, 0)}
    assert torch.equal(fused_loss(model, **other, ignore_index=0), fused_loss(model, **batch))


def test_rows_with_different_objectives_in_one_forward() -> None:
    model, batch = make_model("granite"), make_batch()
    ids = {k: v for k, v in batch.items() if k != "labels"}
    both = run_head(
        model,
        lambda head: torch.stack(
            [
                head.objective_loss(batch["labels"][:1], "unilogit", rows=slice(0, 1)),
                head.objective_loss(batch["labels"][1:], "cross_entropy", rows=slice(1, None)),
            ]
        ),
        **ids,
    )

    def by_torch(dtype: torch.dtype) -> Tensor:
        exact: Any = copy.deepcopy(model)
        logits, labels = exact.to(dtype)(**ids).logits[:, :-1], batch["labels"][:, 1:]
        first = reference.unilogit_loss(logits[:1], labels[:1])
        rest = nn.functional.cross_entropy(logits[1:].flatten(0, 1), labels[1:].flatten())
        return torch.stack([first, rest])

    exact, plain = by_torch(torch.float64), by_torch(torch.float32)
    assert_within_budget(both, exact, plain, smallest_scale=1.0, independent=2)


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_autocast(name: str) -> None:
    model, batch = make_model(name), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = literal_loss(model, batch, "none").flatten().float()
        each = fused_loss(model, **batch, reduction="none")[:, :-1].flatten()
        fused = fused_loss(model, **batch)
    exact = literal_loss(copy.deepcopy(model).double(), batch, "none").flatten()
    assert_within_budget(each.detach(), exact.detach(), plain.detach())
    assert all(g.dtype == torch.float32 for g in gradients(model, fused).values())


def test_gradient_checkpointing_changes_nothing() -> None:
    model, batch = make_model("llama").train(), make_batch()
    without = gradients(model, fused_loss(model, **batch))
    model.gradient_checkpointing_enable()
    for key, grad in gradients(model, fused_loss(model, **batch)).items():
        assert torch.equal(grad, without[key]), key


def test_lora_on_other_modules() -> None:
    model, batch = make_model("llama"), make_batch()
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert_same_losses(adapted, batch)
    grads = gradients(adapted, fused_loss(adapted, **batch))
    assert any("lora_A" in key and bool(grad.any()) for key, grad in grads.items())


def test_a_quantised_head_is_an_error() -> None:
    class QuantisedLinear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).round()

    model = make_model("llama")
    model.set_output_embeddings(QuantisedLinear(32, VOCAB))
    with pytest.raises(UnsupportedHeadError, match="llm_int8_skip_modules"):
        fused_loss(model, **make_batch())


def test_a_replaced_forward_is_an_error() -> None:
    model = make_model("llama")
    head = model.get_output_embeddings()
    head.forward = lambda hidden: nn.Linear.forward(head, hidden) * 2
    with pytest.raises(UnsupportedHeadError, match="has been replaced"):
        fused_loss(model, **make_batch())


def test_a_model_without_a_head_is_an_error() -> None:
    model = transformers.AutoModel.from_config(ARCHITECTURES["llama"]())
    with pytest.raises(UnsupportedHeadError, match="no output embeddings"):
        fused_loss(model, **make_batch())


def shift_after_head(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + 1


def double_after_head(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def float_after_head(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def cut_after_head(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output[..., : VOCAB - 7]


def test_an_unknown_transformation_is_an_error() -> None:
    model = make_model("llama")
    model.get_output_embeddings().register_forward_hook(shift_after_head)
    with pytest.raises(UnsupportedHeadError, match="what the fused losses cannot"):
        fused_loss(model, **make_batch())


def test_a_transformation_that_changes_is_seen() -> None:
    model, batch = make_model("granite"), make_batch()
    fused_loss(model, **batch)
    model.config.logits_scaling = 7.0
    assert_same_losses(model, batch)


def test_a_factor_from_a_hook_is_observed() -> None:
    model, batch = make_model("llama"), make_batch()
    model.get_output_embeddings().register_forward_hook(double_after_head)
    assert_same_losses(model, batch)


def test_padding_of_the_vocabulary_is_observed() -> None:
    model, batch = make_model("llama"), make_batch()
    batch["input_ids"].clamp_(max=VOCAB - 8)
    batch["labels"].clamp_(max=VOCAB - 8)
    model.get_output_embeddings().register_forward_hook(cut_after_head)
    assert observe_logit_transform(model).vocab_size == VOCAB - 7
    assert_same_losses(model, batch)


def test_hooks_around_the_head_run_before_its_backward() -> None:
    """FSDP gathers the weight in hooks on the outputs' gradients: they must fire, and first."""
    model, batch = make_model("granite"), make_batch()
    head, events = model.get_output_embeddings(), []

    def after_head(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            events.append("forward")
            output.register_hook(lambda grad: events.append("head output"))

    def after_model(module: nn.Module, inputs: Any, output: Any) -> None:
        if output.logits.requires_grad:
            output.logits.register_hook(lambda grad: events.append("model output"))

    head.register_forward_hook(after_head)
    model.register_forward_hook(after_model)
    loss = run_head(
        model,
        lambda result: _record_backward(result.objective_loss(batch["labels"], "unilogit"), events),
        input_ids=batch["input_ids"],
    )
    loss.backward()
    assert events == ["forward", "model output", "head output", "loss"]


def _record_backward(loss: Tensor, events: list[str]) -> Tensor:
    loss.register_hook(lambda grad: events.append("loss"))
    return loss


def test_hooks_of_accelerate_stay() -> None:
    model, batch = make_model("llama"), make_batch()
    expected = fused_loss(model, **batch)
    calls = []

    class Count(ModelHook):  # type: ignore[misc]  # accelerate has no types
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    head = model.get_output_embeddings()
    add_hook_to_module(head, Count())
    observe_logit_transform(model)
    calls.clear()
    assert torch.equal(fused_loss(model, **batch), expected)
    assert calls == [head]
    assert model(batch["input_ids"]).logits.shape[-1] == VOCAB


def test_the_model_is_as_before_after_an_error() -> None:
    model, batch = make_model("llama"), make_batch()
    before = model(batch["input_ids"]).logits
    with pytest.raises(ValueError, match="objective"):
        fused_loss(model, **batch, objective="nonsense")
    assert torch.equal(model(batch["input_ids"]).logits, before)
    assert not model.training


def test_observing_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES["gpt2"]()).train()
    state = torch.get_rng_state()
    observe_logit_transform(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_no_logits_are_allocated() -> None:
    config = transformers.LlamaConfig(**{**GQA, "vocab_size": 4001})
    model, batch = transformers.LlamaForCausalLM(config), make_batch()
    ids = batch["input_ids"].repeat(30, 4)
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    observe_logit_transform(model)
    with AllocationGuard(forbidden_elements=tokens * config.vocab_size):
        fused_loss(model, input_ids=ids, labels=ids).backward()
    with pytest.raises(AssertionError), AllocationGuard(tokens * config.vocab_size):
        model(input_ids=ids)


def test_logits_to_keep_is_refused() -> None:
    with pytest.raises(ValueError, match="logits_to_keep"):
        fused_loss(make_model("llama"), **make_batch(), logits_to_keep=1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", [False, True], ids=["", "float32 logits"])
def test_verify_head_passes(name: str, size: float, dtype: torch.dtype, cast: bool) -> None:
    model = make_model(name)
    nn.Module.to(model, dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(size)
    if cast:
        model.get_output_embeddings().register_forward_hook(float_after_head)
    verify_head(model)


def test_verify_head_fails() -> None:
    """What only begins at a length that the observation does not have shows in the logits."""
    model = make_model("cohere")
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: output * 1.001 if output.shape[1] > 6 else output
    )
    with pytest.raises(UnsupportedHeadError, match="differ from those"):
        verify_head(model)
