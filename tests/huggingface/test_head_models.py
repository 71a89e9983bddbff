"""What a model adds by itself: a router's loss, virtual tokens; and inputs it does not know."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.huggingface.model_errors import (
    assert_same_gradients,
    assert_same_loss,
    assert_same_losses,
)
from tests.huggingface.test_head import SMALL, gradients, make_batch, make_model
from tests.support.tiny_models import FORGET, RETAIN, encoded, one_thread
from unilogit_kernels import reference
from unilogit_kernels.huggingface.head import (
    UnsupportedHeadError,
    fused_log_odds,
    fused_loss,
    run_head,
    run_head_with_auxiliary_loss,
)
from unilogit_kernels.huggingface.two_heads import frozen_copy, fused_kl_loss
from unilogit_kernels.objectives import NPO
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

MOE: dict[str, Any] = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "jetmoe": (
        transformers.JetMoeConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    ),
}


def make_moe(name: str, coefficient: float = 0.5, **options: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config, sizes = MOE[name]
    named = "aux_loss_coef" if name == "jetmoe" else "router_aux_loss_coef"
    sizes = {**SMALL, **sizes, "num_key_value_heads": 2, named: coefficient, **options}
    model: transformers.PreTrainedModel
    model = transformers.AutoModelForCausalLM.from_config(
        config(**sizes), experts_implementation="eager"
    )
    model.eval()
    return model


def own_loss(model: nn.Module, batch: dict[str, Any], first: int, coefficient: float) -> Tensor:
    """The model's own loss in the model's dtype, where transformers would cast to float32."""
    output = model(**batch)
    length = batch["labels"].shape[1]
    logits, labels = output.logits[:, -length - first : -1], batch["labels"][:, 1 - first :]
    loss: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if coefficient:
        loss = loss + coefficient * output.aux_loss
    assert_same_loss(output.loss.float(), loss.double(), loss.float())
    return loss


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("where", ["config", "inputs"])
def test_a_routers_loss_is_the_models_own(name: str, where: str) -> None:
    model = make_moe(name, output_router_logits=where == "config")
    batch = make_batch()
    inputs = {**batch, **({"output_router_logits": True} if where == "inputs" else {})}
    exact = copy.deepcopy(model).double()
    losses = own_loss(exact, inputs, 0, 0.5), own_loss(model, inputs, 0, 0.5)
    loss = fused_loss(model, objective="cross_entropy", **inputs)
    assert_same_loss(loss, *losses)
    assert_same_gradients(
        gradients(model, loss), gradients(exact, losses[0]), gradients(model, losses[1])
    )


def test_a_routers_loss_apart_and_left_out() -> None:
    model, batch = make_moe("mixtral"), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    routed = {**inputs, "output_router_logits": True}

    def compute(head: Any) -> Tensor:
        loss: Tensor = head.objective_loss(batch["labels"], "cross_entropy")
        return loss

    loss, auxiliary = run_head_with_auxiliary_loss(model, compute, **routed)
    assert auxiliary is not None
    own = model(**batch, output_router_logits=True)
    assert torch.equal(auxiliary, 0.5 * own.aux_loss)
    exact = own_loss(copy.deepcopy(model).double(), {**batch, "output_router_logits": True}, 0, 0.5)
    assert_same_loss(loss + auxiliary, exact, own.loss)
    without = fused_loss(model, objective="cross_entropy", **batch)
    assert torch.equal(without, loss)
    options = {"labels": batch["labels"], "objective": "cross_entropy", **routed}
    assert torch.equal(fused_loss(model, auxiliary_loss=False, **options), loss)
    assert run_head_with_auxiliary_loss(model, compute, **inputs)[1] is None
    assert "_loss_function" not in vars(model)
    fused_log_odds(model, labels=batch["labels"], **routed)
    with pytest.raises(UnsupportedHeadError, match="which would be lost"):
        run_head(model, compute, **routed)
    with pytest.raises(ValueError, match="cannot be added to losses of shape"):
        fused_loss(model, reduction="none", **options)


def test_a_routers_loss_beside_a_teacher() -> None:
    model, batch = make_moe("mixtral", output_router_logits=True), make_batch()
    own = model(**batch).aux_loss
    teacher = frozen_copy(model)
    assert torch.equal(fused_kl_loss(model, teacher, **batch), 0.5 * own)
    assert fused_kl_loss(model, teacher, auxiliary_loss=False, **batch) == 0


def test_a_routers_loss_in_the_trainer(tmp_path: Any) -> None:
    """A mean over the batches of a step, logged apart."""
    model = make_moe("mixtral", vocab_size=259, output_router_logits=True)
    args = UnlearningArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        learning_rate=0.0,
        max_steps=1,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = UnlearningTrainer(model, args, forget=encoded(FORGET), retain=encoded(RETAIN))
    batches: list[dict[str, Tensor]] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: batches.append(collate(rows)) or dict(batches[-1])  # type: ignore[func-returns-value]
    trainer.train()
    with torch.no_grad():
        own = [0.5 * model.train()(**batch).aux_loss for batch in batches]
    logged = trainer.state.log_history[0]
    assert logged["auxiliary_loss"] == pytest.approx(float(torch.stack(own).mean()), rel=1e-5)
    parts = 0.1 * logged["forget_loss"] + logged["retain_loss"] + logged["auxiliary_loss"]
    assert logged["loss"] == pytest.approx(parts, rel=1e-5)


PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def with_prompt(kind: str) -> peft.PeftModel:
    model = peft.get_peft_model(make_model("llama"), copy.deepcopy(PROMPTS[kind]))
    assert isinstance(model, peft.PeftModel)
    model.eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("first", [False, True], ids=["", "first token counts"])
def test_virtual_tokens_are_aligned(kind: str, first: bool) -> None:
    model, batch = with_prompt(kind), make_batch()
    if first:
        batch["labels"] = batch["input_ids"]
    exact = copy.deepcopy(model).double()
    position = int(first and kind != "prefix tuning")
    losses = own_loss(exact, batch, position, 0), own_loss(model, batch, position, 0)
    loss = fused_loss(model, objective="cross_entropy", **batch)
    assert_same_loss(loss, *losses)
    found = gradients(model, loss)
    assert any(bool(found[key].any()) for key in found if "prompt_encoder" in key)
    assert_same_gradients(found, gradients(exact, losses[0]), gradients(model, losses[1]))


def test_what_belongs_to_tokens_stays_with_them_behind_virtual_tokens() -> None:
    model, batch = with_prompt("prompt tuning"), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels, counted = batch["input_ids"], batch["labels"][:, 1:] != -100
    weights = torch.rand(3, 9)

    def by_torch(dtype: torch.dtype) -> dict[str, Tensor]:
        ours = copy.deepcopy(model).to(dtype)
        base = ours.get_base_model()
        logits, targets = ours(**inputs).logits[:, 4:-1], labels[:, 1:]
        with ours.disable_adapter():
            base_logits = base(**inputs).logits[:, :-1]
        d = reference.target_log_odds(logits.flatten(0, 1), targets.flatten()).view(3, 8)
        each = reference.unilogit_loss(logits, targets, reduction="none")
        log_p = nn.functional.logsigmoid(d).masked_fill(~counted, 0).sum(-1)
        kl = reference.kl_divergence(logits[counted], base_logits[counted])
        own = nn.functional.cross_entropy(base_logits[counted], targets[counted])
        return {
            "log-odds": d,
            "losses": each,
            "weighted": each * weights[:, 1:].to(dtype),
            "npo": (-2 * nn.functional.logsigmoid(-log_p)).mean()[None],
            "divergence": kl.mean()[None],
            "of the base": own[None],
        }

    with torch.no_grad():
        options = {"labels": labels, "reduction": "none", **inputs}
        npo = {"labels": batch["labels"], "objective": NPO(torch.zeros(3), beta=1.0), **inputs}
        base = frozen_copy(model.get_base_model())
        found = {
            "log-odds": fused_log_odds(model, labels=labels, **inputs)[:, :-1],
            "losses": fused_loss(model, **options)[:, :-1],
            "weighted": fused_loss(model, token_weights=weights, **options)[:, :-1],
            "npo": fused_loss(model, **npo)[None],
            "divergence": fused_kl_loss(model, base, labels=batch["labels"], **inputs)[None],
        }
        with model.disable_adapter():
            found["of the base"] = fused_loss(model, objective="cross_entropy", **batch)[None]
        exact, plain = by_torch(torch.float64), by_torch(torch.float32)
    for name, value in found.items():
        assert_same_losses(value.flatten(), exact[name].flatten(), plain[name].flatten())


def test_labels_of_other_positions_are_an_error() -> None:
    model, batch = make_model("llama"), make_batch()
    for labels in (batch["labels"][:, :7], batch["labels"][:2], batch["labels"].flatten()):
        with pytest.raises(UnsupportedHeadError, match="do not belong to the 9 positions"):
            fused_loss(model, **{**batch, "labels": labels})
    prompted = with_prompt("prompt tuning")
    with pytest.raises(UnsupportedHeadError, match="13 positions, 4 of them virtual"):
        fused_loss(prompted, **{**batch, "labels": batch["labels"][:, :7]})
    with pytest.raises(UnsupportedHeadError, match="do not belong to the 9 positions"):
        fused_kl_loss(model, make_model("llama"), **{**batch, "labels": batch["labels"][:, :7]})


def test_an_option_that_nobody_takes_is_an_error() -> None:
    model, batch = make_model("llama"), make_batch()
    adapted = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for each in (model, adapted):
        with pytest.raises(TypeError, match="unexpected keyword 'memory_budget'"):
            fused_loss(each, **batch, memory_budget=1)
        with pytest.raises(TypeError, match="unexpected keyword 'num_items_in_batch'"):
            fused_log_odds(each, **batch, num_items_in_batch=1)
        with pytest.raises(TypeError, match="unexpected keyword 'atention_mask'"):
            fused_kl_loss(each, make_model("llama"), **batch, atention_mask=batch["attention_mask"])
        positions = torch.arange(9).expand(3, -1)
        fused_loss(each, **batch, position_ids=positions, output_hidden_states=True)
    with pytest.raises(ValueError, match="share one lm_head"):
        fused_kl_loss(adapted, adapted.get_base_model(), **batch)
    with pytest.raises(ValueError, match="labels are not the model's to see"):
        run_head(model, lambda head: head.hidden.sum(), **batch)
