"""A patched model gives the loss and gradients of its own logits to any caller with labels."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments

from tests.support import literal
from tests.support.tiny_models import FORGET, RETAIN, encoded, make_model, one_thread
from unilogit_kernels.huggingface.head import UnsupportedHeadError, fused_loss
from unilogit_kernels.integrations import patch, unpatch
from unilogit_kernels.objectives import SimNPO
from unilogit_kernels.testing import (
    AllocationGuard,
    assert_sum_within_budget,
    assert_tensors_within_budget,
    assert_within_budget,
)
from unilogit_kernels.unlearning.data import collate

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def gemma() -> PreTrainedModel:
    config = transformers.Gemma2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config)


def router() -> PreTrainedModel:
    config = transformers.MixtralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        router_aux_loss_coef=0.3,
        output_router_logits=True,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.MixtralForCausalLM._from_config(
        config, experts_implementation="eager"
    )
    return model


def with_adapter() -> nn.Module:
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(make_model(), config)


def with_prompt() -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(make_model(), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": make_model,
    "softcap": gemma,
    "router": router,
    "adapter": with_adapter,
    "prompt": with_prompt,
}


def batch() -> dict[str, Tensor]:
    return collate(encoded([*FORGET, *RETAIN]), 0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def literal_terms(output: Any, labels: Tensor, items: int | Tensor | None) -> Tensor:
    """The terms of a model's own loss, in the dtype of its logits, where the model takes float32.

    A learned prompt has no labels; a router's auxiliary loss, times its coefficient, is a term.
    """
    virtual = output.logits.shape[1] - labels.shape[1]
    z = output.logits[:, max(virtual - 1, 0) : -1]
    y = labels if virtual else labels[:, 1:]
    counted = y != -100
    losses = -literal.log_p(z[counted], y[counted])
    terms = losses / (len(losses) if items is None else items)
    added = getattr(output, "aux_loss", None)
    return terms if added is None else torch.cat([terms, 0.3 * added.to(terms.dtype)[None]])


@pytest.mark.parametrize(
    ("name", "items"),
    [("llama", 77), ("softcap", None), ("router", 77), ("adapter", None), ("prompt", 77)],
)
def test_cross_entropy_is_the_models_own_loss(name: str, items: int | None) -> None:
    options: dict[str, Any] = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    labels = batch()["labels"]
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    terms, grads = list[Tensor](), []
    for dtype in (torch.float64, torch.float32):
        model = MODELS[name]()
        model.to(dtype)
        terms.append(literal_terms(model(**inputs), labels, items))
        terms[-1].sum().backward()
        grads.append(gradients(model))
    own = MODELS[name]()(**batch(), **options).loss
    model = patch(MODELS[name]())
    output = model(**batch(), **options)
    output.loss.backward()
    assert output.logits is None
    assert (output.get("aux_loss") is not None) == (name == "router")
    for loss in (own, output.loss):
        assert_sum_within_budget(loss, terms[0], terms[1])
    assert_tensors_within_budget(gradients(model), *grads)


def test_unilogit_is_that_of_the_logits() -> None:
    seen = []
    for dtype in (torch.float64, torch.float32):
        model: nn.Module = make_model()
        model.to(dtype)
        given = batch()
        labels = given.pop("labels")[:, 1:]
        z = model(**given).logits[:, :-1][labels != -100]
        losses = literal.unilogit("reverse")(z, labels[labels != -100])
        losses.mean().backward()
        seen.append((losses.detach() / len(losses), gradients(model)))
    model = patch(make_model(), "unilogit")
    loss = model(**batch()).loss
    loss.backward()
    assert_sum_within_budget(loss, seen[0][0], seen[1][0])
    assert_tensors_within_budget(gradients(model), seen[0][1], seen[1][1])


def test_nothing_of_the_size_of_the_logits_is_allocated() -> None:
    model = patch(make_model(vocab_size=4001), "unilogit")
    ids = torch.randint(4001, (60, 44))
    model(input_ids=ids, labels=ids)  # What the model does to its logits is observed once.
    forbidden = 60 * 43 * 4001
    with AllocationGuard(forbidden):
        model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(AssertionError, match="elements was allocated"), AllocationGuard(forbidden):
        model(input_ids=ids)


@pytest.mark.parametrize("logits_in_eval", [False, True])
def test_evaluation(logits_in_eval: bool) -> None:
    """Without labels the model's own bits; with them the loss, and logits where asked for."""
    for name in ("llama", "router", "prompt"):
        model = MODELS[name]().eval()
        inputs = batch()
        labels = inputs.pop("labels")
        with torch.no_grad():
            own, without = model(**inputs, labels=labels), model(**inputs)
            patch(model, logits_in_eval=logits_in_eval)
            found, unlabelled = model(**inputs, labels=labels), model(**inputs)
        assert torch.equal(unlabelled.logits, without.logits)
        assert unlabelled.loss is None
        assert float(found.loss) == pytest.approx(float(own.loss), rel=1e-6)
        if logits_in_eval:
            assert torch.equal(found.logits, own.logits)
        else:
            assert "logits" not in found
        model.train()
        assert model(**inputs, labels=labels).logits is None


def test_what_a_caller_may_ask_for() -> None:
    model = patch(make_model())
    inputs = batch()
    loss = model(**inputs).loss
    positional = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
    assert torch.equal(positional.loss, loss)
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], loss)
    with_hidden = model(**inputs, output_hidden_states=True)
    assert len(with_hidden.hidden_states) == 3
    assert model(**inputs, use_cache=True).past_key_values is not None
    assert model(**inputs).past_key_values is None
    with pytest.raises(TypeError, match=r"multiple values|got some positional"):
        model(inputs["input_ids"], **inputs)
    with pytest.raises(ValueError, match="shift_labels cannot be used"):
        model(**inputs, shift_labels=inputs["labels"])


def test_the_signature_stays() -> None:
    """By which a Trainer decides what columns to keep, and who divides the loss."""
    model = make_model()
    before = inspect.signature(model.forward)
    assert inspect.signature(patch(model).forward) == before


def test_unpatching_leaves_nothing() -> None:
    model = make_model()
    before = model.forward
    attributes = set(vars(model))
    assert patch(model) is model
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched already"):
        patch(model)
    assert unpatch(model) is model
    assert model.forward == before
    assert set(vars(model)) == attributes
    assert model(**batch()).logits is not None
    with pytest.raises(ValueError, match=r"is not patched$"):
        unpatch(model)
    replaced = model.forward = lambda **inputs: before(**inputs)
    unpatch(patch(model))
    assert vars(model)["forward"] is replaced
    patch(model)
    model.forward = replaced
    with pytest.raises(ValueError, match="replaced since"):
        unpatch(model)


def test_a_copy_is_patched_and_its_own() -> None:
    model = patch(make_model(), "unilogit")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert copied(**batch()).loss != model(**batch()).loss
    unpatch(copied)
    assert copied(**batch()).logits is not None
    assert model(**batch()).logits is None


def test_saved_and_pickled_models_are_not_patched(tmp_path: Path) -> None:
    """Not even one with an objective that cannot be pickled."""
    model = patch(make_model(), lambda d: d)
    expected = model.state_dict()
    model.save_pretrained(tmp_path)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for loaded in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(loaded) is type(model)
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[n]) for n, value in loaded.state_dict().items())
        output = loaded(**batch())
        assert output.logits is not None
        assert torch.equal(loaded(input_ids=batch()["input_ids"]).logits[0, 0], output.logits[0, 0])


def test_the_fused_functions_take_a_patched_model() -> None:
    for name in ("llama", "router"):
        model = MODELS[name]()
        inputs: dict[str, Any] = batch()
        expected = fused_loss(model, **inputs)
        assert torch.equal(fused_loss(patch(model, "cross_entropy"), **inputs), expected)


def test_what_cannot_be_patched() -> None:
    with pytest.raises(ValueError, match="objective 'forgetting' is unknown"):
        patch(make_model(), "forgetting")
    config = peft.LoHaConfig(target_modules=["lm_head"])
    with pytest.raises(UnsupportedHeadError, match="of peft's adapters"):
        patch(peft.get_peft_model(make_model(), config))
    model = patch(make_model(), SimNPO())
    assert model(**batch()).loss.isfinite()
    with pytest.raises(ValueError, match="'simnpo' is a mean over sequences"):
        model(**batch(), num_items_in_batch=7)


def training(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def trained(model: nn.Module, args: TrainingArguments, **options: Any) -> Tensor:
    """The losses that were logged, and the one of an evaluation."""
    trainer = Trainer(
        model,
        args,
        train_dataset=encoded([*FORGET, *RETAIN]),
        eval_dataset=encoded(FORGET),
        data_collator=lambda rows: collate(rows, 0),
        **options,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return torch.tensor([*losses, trainer.evaluate()["eval_loss"]], dtype=torch.float64)


@pytest.mark.parametrize(("name", "accumulation"), [("llama", 3), ("router", 1)])
def test_a_stock_trainer(tmp_path: Path, name: str, accumulation: int) -> None:
    """Its steps and its evaluation are those of the logits' cross-entropy."""

    def literal_loss(output: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return literal_terms(output, labels, num_items_in_batch).sum()

    args = training(tmp_path, gradient_accumulation_steps=accumulation)
    models = [MODELS[name]() for _ in range(3)]
    found = trained(patch(models[0]), args)
    exact = trained(models[1].double(), args, compute_loss_func=literal_loss)
    plain = trained(models[2], args)
    assert_tensors_within_budget(*(dict(model.named_parameters()) for model in models))
    assert_within_budget(found.float(), exact, plain.float(), smallest_scale=1.0)


def test_metrics_of_a_stock_trainer(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"columns": float(prediction.predictions.shape[-1])}

    trainer = Trainer(
        patch(make_model(), "unilogit", logits_in_eval=True),
        training(tmp_path),
        eval_dataset=encoded(FORGET),
        data_collator=lambda rows: collate(rows, 0),
        compute_metrics=metrics,
    )
    assert trainer.evaluate()["eval_columns"] == 259
    assert seen[0][0] == len(FORGET)


def test_what_trls_sft_trainer_takes() -> None:
    """It divides the sum of minus `log_probs` itself, and logs entropy and accuracy."""
    given = batch()
    labels = given["labels"]
    mask = labels[:, 1:] != -100
    for objective in ("cross_entropy", "unilogit"):
        model = patch(make_model(), objective)
        seen = model(**given, fused_lm_head=True)
        z = unpatch(model)(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        z, y = z.logits[:, :-1][mask], labels[:, 1:][mask]
        assert torch.equal(seen.label_mask, mask)
        losses = {"cross_entropy": lambda z, y: -literal.log_p(z, y)}.get(
            objective, literal.unilogit("reverse")
        )
        exact, plain = ((losses(x, y) / 40).detach() for x in (z.double(), z))
        assert_sum_within_budget(-seen.log_probs.sum() / 40, exact, plain)
        assert (seen.log_probs[~mask] == 0).all()
        exact, plain = (literal.entropy(x).detach() for x in (z.double(), z))
        assert_within_budget(seen.entropy[mask], exact, plain)
        assert (seen.entropy[~mask] == 0).all()
        assert torch.equal(seen.is_top1[mask], z.argmax(-1) == y)
        assert not seen.is_top1[~mask].any()
        assert not seen.entropy.requires_grad
    routed = patch(MODELS["router"]())
    seen = routed(**given, fused_lm_head=True)
    assert torch.equal(seen.aux_loss, routed(**given).aux_loss)
    with pytest.raises(ValueError, match="mean over sequences"):
        patch(make_model(), SimNPO())(**given, fused_lm_head=True)


def test_what_accelerate_wraps_around() -> None:
    """Its autocast and its casts of the outputs run around the patch."""
    model, plain = patch(make_model()), make_model()
    for each in (model, plain):
        each.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(each.forward))
    losses = [each(**batch()).loss for each in (model, plain)]
    for loss in losses:
        loss.backward()
    eps = torch.finfo(torch.bfloat16).eps
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=eps)
    with pytest.raises(ValueError, match="replaced since"):
        unpatch(model)


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _worker(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=1)
    torch.set_num_threads(1)
    found = []
    for wrap in ("nothing", "ddp", "fsdp2"):
        model = patch(make_model(), "unilogit")
        wrapped: nn.Module = model
        if wrap == "ddp":
            wrapped = DistributedDataParallel(model)
        elif wrap == "fsdp2":
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            for part in (*model.model.layers, model.lm_head, model):
                fully_shard(part, mesh=mesh)
        # Twice: what is observed of the head is known in the second call.
        for _ in range(2):
            wrapped(**batch()).loss.backward()
        found.append({name: _whole(grad) for name, grad in gradients(model).items()})
    for wrapped_gradients in found[1:]:
        assert all(torch.equal(value, wrapped_gradients[n]) for n, value in found[0].items())
    # Nothing is torn down: torch 2.13 may wait for ever there.
    os._exit(0)


@pytest.mark.prove
def test_a_patched_model_may_be_wrapped(tmp_path: Path) -> None:
    """By DDP and by FSDP2, whose hooks run around the forward that stands in."""
    spawn(_worker, args=(str(tmp_path / "rendezvous"),), nprocs=1, join=True)
