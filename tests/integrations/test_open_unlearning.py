"""The trainers for OpenUnlearning's registry take the steps that its formulas say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments

from tests.integrations import open_unlearning as literal
from unilogit_kernels.integrations.open_unlearning import METHODS, fused_trainers
from unilogit_kernels.testing import assert_tensors_within_budget

VOCAB, FORGET_WEIGHT, RETAIN_WEIGHT, RATE = 150, 0.7, 1.3, 0.2


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **options}))


def rows(seed: int, count: int, length: int) -> dict[str, Tensor]:
    """Padded on the right, the prompt without labels."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (count, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


class Batches(Dataset[dict[str, Any]]):
    """What OpenUnlearning's collator makes, a whole batch an item."""

    def __init__(self, alternates: bool, retain: bool = True) -> None:
        self.batches = []
        for seed in range(4):
            # Retain rows are now longer, and now shorter, than forget rows.
            forget: Any = rows(seed, 3, 8)
            if alternates:
                forget = {"original": forget, "alternate": rows(50 + seed, 3, 7)}
            kept = {"retain": rows(90 + seed, 3, 6 + 3 * (seed % 2))} if retain else {}
            self.batches.append({"forget": forget, **kept})

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]


def first(batches: list[Any]) -> Any:
    return batches[0]


def make_trainer(kind: type[Any], model: Any, folder: Path, data: Batches, **options: Any) -> Any:
    arguments = {"gamma": FORGET_WEIGHT, "alpha": RETAIN_WEIGHT, **options}
    accumulation = arguments.pop("accumulation", 1)
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    return kind(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=first,
        evaluators=None,
        template_args=None,
        **arguments,
    )


def literal_training(
    model: Any, order: list[Any], name: str, options: dict[str, Any]
) -> list[float]:
    """The same steps, with whole logits; each loss."""
    start, losses = copy.deepcopy(model), []
    accumulation = options.get("accumulation", 1)
    for step in range(0, len(order), accumulation):
        model.zero_grad()
        total = 0.0
        for batch in order[step : step + accumulation]:
            only = options.get("labelled_only", False)
            loss = FORGET_WEIGHT * literal.forget_loss(name, model, start, batch["forget"], only)
            if "retain" in batch and options.get("retain_loss_type") == "KL":
                loss = loss + RETAIN_WEIGHT * literal.kl(model, start, batch["retain"], only)
            elif "retain" in batch:
                counted = literal.labelled(batch["retain"])
                kept = literal.nll(model, batch["retain"])[counted].mean()
                loss = loss + RETAIN_WEIGHT * kept
            (loss / accumulation).backward()
            total += float(loss.detach()) / accumulation
        losses.append(total)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(RATE * parameter.grad)
    return losses


CASES = [
    *((name, {}) for name in literal.ARGUMENTS),
    ("FusedGradDiff", {"retain_loss_type": "KL", "accumulation": 2}),
    ("FusedNPO", {"retain_loss_type": "KL", "labelled_only": True}),
    ("FusedUNDIAL", {"labelled_only": True}),
    ("Unilogit", {"retain": False}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_steps_are_its_formulas(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """With both signatures that its `compute_loss` has had."""
    options = dict(options)
    base = literal.LaterGradDiff if options else literal.GradDiff
    data = Batches(METHODS[name].needs_alternates, options.pop("retain", True))
    model = make_model()
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    trainer = make_trainer(
        fused_trainers(base)[name], model, tmp_path, data, **literal.ARGUMENTS[name], **options
    )
    assert isinstance(trainer, base)
    trainer.train()
    losses = literal_training(exact, data.batches, name, options)
    literal_training(plain, data.batches, name, options)
    assert_tensors_within_budget(*(dict(each.named_parameters()) for each in (model, exact, plain)))
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    if name != "FusedUNDIAL":  # Less by a constant.
        assert logged == pytest.approx(losses, abs=6e-5)  # transformers 4 rounds to four digits.


def test_evaluation_is_the_models_own(tmp_path: Path) -> None:
    """A batch of plain rows has the plain Trainer's loss, by either name."""
    model, batch = make_model(), rows(7, 3, 9)
    kind = fused_trainers(literal.LaterGradDiff)["Unilogit"]
    trainer = make_trainer(kind, model, tmp_path, Batches(False))
    expected = model(**batch).loss
    assert torch.equal(trainer.prediction_step(model, batch, True)[0], expected)
    assert torch.equal(trainer.compute_loss(model, batch), expected)


def test_outputs_are_the_loss_alone(tmp_path: Path) -> None:
    kind = fused_trainers(literal.LaterGradDiff)["FusedGradDiff"]
    data = Batches(False)
    trainer = make_trainer(kind, make_model(), tmp_path, data)
    loss, outputs = trainer.compute_loss(trainer.model, data[0], True, num_items_in_batch=None)
    assert torch.equal(outputs["loss"], loss)
    assert outputs.logits is None


def test_retain_rows_without_weight_cost_nothing(tmp_path: Path) -> None:
    kind = fused_trainers(literal.GradDiff)["Unilogit"]
    data = Batches(False)
    trainer = make_trainer(kind, make_model(), tmp_path, data, alpha=0.0)
    seen: list[int] = []
    trainer.model.model.register_forward_hook(
        lambda module, args, output: seen.append(len(output[0]))
    )
    trainer.compute_loss(trainer.model, data[0])
    assert seen[-1] == 3


def test_what_it_refuses(tmp_path: Path) -> None:
    kind = fused_trainers(literal.GradDiff)["Unilogit"]
    with pytest.raises(ValueError, match="must be NLL or KL, got 'EMBED_DIFF'"):
        make_trainer(kind, make_model(), tmp_path, Batches(False), retain_loss_type="EMBED_DIFF")
    with pytest.raises(TypeError, match="beta"):
        make_trainer(kind, make_model(), tmp_path, Batches(False), beta=1.0)


def test_a_router_keeps_its_auxiliary_loss(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        router_aux_loss_coef=0.3,
        output_router_logits=True,
    )
    kind = fused_trainers(literal.GradDiff)["FusedGradDiff"]
    data = Batches(False, retain=False)
    trainer = make_trainer(kind, transformers.MixtralForCausalLM(config), tmp_path, data)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, data[0])
        own = trainer.model(**data[0]["forget"])
    added = 0.3 * own.aux_loss
    # Gradient ascent on the loss of the tokens, and descent on the router's.
    assert float(loss) == pytest.approx(float(added - FORGET_WEIGHT * (own.loss - added)), rel=1e-5)
