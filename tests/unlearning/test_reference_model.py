"""Losses against a frozen model: the papers' formulas on both models' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from tests.support import literal as literal_losses
from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    encoded,
    make_model,
    one_thread,
    save_model,
    write_rows,
)
from unilogit_kernels import Shift, Uniform
from unilogit_kernels.functional.kl import count_ignored_positions
from unilogit_kernels.huggingface.two_heads import frozen_copy, fused_kl_loss
from unilogit_kernels.testing import (
    assert_sum_within_budget,
    assert_tensors_within_budget,
    assert_within_budget,
)
from unilogit_kernels.unlearning.data import PairSampler, collate
from unilogit_kernels.unlearning.methods import MethodError
from unilogit_kernels.unlearning.run import RunError, Settings, execute, prepare
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def batch() -> dict[str, Any]:
    torch.manual_seed(3)
    ids = torch.randint(3, 250, (3, 11))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 8:] = -100
    return {"input_ids": ids, "labels": labels}


def logits_of(model: PreTrainedModel, reference: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Both models' logits where they predict a label, and these labels."""
    given = batch()
    labels = given["labels"][:, 1:]
    counted = labels != -100
    with torch.no_grad():
        teacher = reference(input_ids=given["input_ids"]).logits[:, :-1][counted]
    student = model(input_ids=given["input_ids"]).logits[:, :-1][counted]
    return student, teacher, labels[counted]


def kl_minimisation(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return literal_losses.kl_to_teacher(student, teacher, labels)


def undial(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return literal_losses.undial(3.0)(student, teacher, labels)


def unilogit_from_the_starting_model(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return literal_losses.unilogit_of_teacher(student, teacher, labels)


METHODS = {
    "kl minimisation": (kl_minimisation, {}),
    "undial": (undial, {"rewrite": Shift(3.0)}),
    "unilogit from the starting model": (
        unilogit_from_the_starting_model,
        {"rewrite": Uniform(), "direction": "reverse"},
    ),
}


@pytest.mark.parametrize(("literal", "options"), METHODS.values(), ids=METHODS)
def test_is_the_papers_formula(literal, options) -> None:  # type: ignore[no-untyped-def]
    model, reference = make_model(0), frozen_copy(make_model(1))
    loss = fused_kl_loss(model, reference, **options, **batch())
    loss.backward()
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        student, teacher = make_model(0), frozen_copy(make_model(1))
        if dtype == torch.float64:
            student, teacher = student.double(), teacher.double()
        losses = literal(*logits_of(student, teacher))
        expected = losses / len(losses)
        expected.sum().backward()
        gradients[dtype] = expected.detach(), dict(student.named_parameters())
    exact, plain = gradients[torch.float64], gradients[torch.float32]
    assert_sum_within_budget(loss, exact[0], plain[0])
    assert_tensors_within_budget(
        *(
            {
                name: parameter.grad
                for name, parameter in found.items()
                if parameter.grad is not None
            }
            for found in (dict(model.named_parameters()), exact[1], plain[1])
        )
    )
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_a_teacher_of_another_size_with_a_capped_head() -> None:
    """The transforms of both heads are observed, each on its own model."""
    torch.manual_seed(5)
    config = Gemma2Config(
        vocab_size=259,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        pad_token_id=0,
    )
    reference = frozen_copy(Gemma2ForCausalLM(config))
    model = make_model()
    with torch.no_grad():
        loss = fused_kl_loss(model, reference, **batch())
        plain = kl_minimisation(*logits_of(model, reference))
        exact = kl_minimisation(*logits_of(model.double(), reference.double()))
    assert_sum_within_budget(loss, exact / len(exact), plain / len(plain))
    assert not loss.requires_grad


def test_a_model_equals_its_frozen_copy() -> None:
    """Whatever the mode of the student; the copy learns nothing and draws nothing random."""
    model = make_model().train()
    reference = frozen_copy(model).train()
    loss = fused_kl_loss(model, reference, **batch())
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_reduction_none_is_aligned_with_the_next_token() -> None:
    model, reference = make_model(0), frozen_copy(make_model(1))
    losses = fused_kl_loss(model, reference, reduction="none", **batch())
    counted = batch()["labels"][:, 1:] != -100
    assert ((losses[:, :-1] != 0) == counted).all()
    assert (losses[:, -1] == 0).all()
    weights = torch.arange(33.0).reshape(3, 11)
    weighted = fused_kl_loss(model, reference, reduction="sum", token_weights=weights, **batch())
    with torch.no_grad():
        plain = kl_minimisation(*logits_of(model, reference))
        exact = kl_minimisation(*logits_of(model.double(), reference.double()))
    assert_within_budget(losses[:, :-1][counted], exact, plain, smallest_scale=1.0)
    factors = weights[:, 1:][counted]
    terms = exact * factors, plain * factors
    assert_sum_within_budget(weighted, *terms, smallest_scale=float(factors.sum()))


def test_vocabularies_of_two_sizes_need_the_number_of_real_tokens() -> None:
    model, reference = make_model(), frozen_copy(make_model(1, vocab_size=270))
    with pytest.raises(ValueError, match="259 columns and the teacher's 270"):
        fused_kl_loss(model, reference, **batch())
    assert fused_kl_loss(model, reference, vocab_size=259, **batch()) > 0


def test_labels_that_cannot_index_from_the_end() -> None:
    with pytest.raises(ValueError, match=r"ignore_index must be in \[-50, 0\)"):
        count_ignored_positions(torch.tensor([3, -100]), 50)


def arguments(folder: Path, **options: Any) -> UnlearningArguments:
    return UnlearningArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        forget_weight=0.7,
        retain_weight=1.3,
        **options,
    )


def gradient_ascent(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(student, labels)


def cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student, labels)


def smoothed_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return literal_losses.cross_entropy(0.3, 0.05)(student, labels)


TRAINED = {
    "undial, smoothed": (
        undial,
        smoothed_cross_entropy,
        {
            "method": "undial",
            "method_parameters": {"gamma": 3.0},
            "label_smoothing_factor": 0.3,
            "z_loss": 0.05,
        },
    ),
    "undial": (undial, cross_entropy, {"method": "undial", "method_parameters": {"gamma": 3.0}}),
    "kl minimisation": (
        gradient_ascent,
        kl_minimisation,
        {"method": "gradient_ascent", "retain_loss": "kl"},
    ),
    "unilogit from the starting model": (
        unilogit_from_the_starting_model,
        kl_minimisation,
        {"method": "unilogit_starting_model", "retain_loss": "kl"},
    ),
}


@pytest.mark.parametrize(("drop", "keep", "options"), TRAINED.values(), ids=TRAINED)
def test_a_step_against_a_teacher_is_the_literal_step(  # type: ignore[no-untyped-def]
    tmp_path: Path, drop, keep, options
) -> None:
    """Over two batches of unequal length, with a teacher that is another model."""
    model, teacher = make_model(0), frozen_copy(make_model(1))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = UnlearningTrainer(
        model,
        arguments(tmp_path, **options),
        forget=encoded(FORGET),
        retain=encoded(RETAIN),
        teacher=teacher,
    )
    pairs = list(PairSampler(trainer._pairs, 1, trainer.args.seed))
    trainer.train()
    assert all(map(torch.equal, before.values(), teacher.state_dict().values()))

    rows = (
        collate([trainer._pairs.forget[f] for f, _ in pairs], 0),
        collate([trainer._pairs.retain[r] for _, kept in pairs for r in kept], 0),
    )

    def literal_step(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses, and the parameters after a step of SGD, by plain torch in `dtype`."""
        literal, reference = make_model(0), frozen_copy(make_model(1))
        if dtype == torch.float64:
            literal, reference = literal.double(), reference.double()
        losses = []
        for formula, examples in zip((drop, keep), rows, strict=True):
            given = {name: examples[name] for name in ("input_ids", "attention_mask")}
            labels = examples["labels"][:, 1:]
            counted = labels != -100
            with torch.no_grad():
                q = reference(**given).logits[:, :-1][counted]
            losses.append(
                formula(literal(**given).logits[:, :-1][counted], q, labels[counted]).mean()
            )
        (0.7 * losses[0] + 1.3 * losses[1]).backward()
        torch.optim.SGD(literal.parameters(), lr=0.5).step()
        return torch.stack(losses).detach(), _values(literal)

    exact, plain = literal_step(torch.float64), literal_step(torch.float32)
    logged = trainer.state.log_history[0]
    seen = torch.tensor([logged["forget_loss"], logged["retain_loss"]])
    assert_within_budget(seen, exact[0], plain[0], smallest_scale=1.0)
    assert trainer.state.global_step == 1
    assert_tensors_within_budget(_values(model), exact[1], plain[1])


def _values(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_default_teacher_is_the_model_as_it_was_given(tmp_path: Path) -> None:
    """So that the divergence of the first step is 0, and that of a later one is not."""
    args = arguments(tmp_path, method="npo", retain_loss="kl")
    args.num_train_epochs = 3
    trainer = UnlearningTrainer(make_model(), args, forget=encoded(FORGET), retain=encoded(RETAIN))
    trainer.train()
    losses = [log["retain_loss"] for log in trainer.state.log_history if "retain_loss" in log]
    assert losses[0] == 0
    assert losses[-1] > 0


def test_teachers_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="retain_loss must be one of cross_entropy, kl"):
        arguments(tmp_path, retain_loss="mse")
    with pytest.raises(MethodError, match="'unilogit' with retain_loss 'cross_entropy' takes no"):
        UnlearningTrainer(
            make_model(),
            arguments(tmp_path),
            forget=encoded(FORGET),
            retain=encoded(RETAIN),
            teacher=make_model(),
        )
    with pytest.raises(MethodError, match="'undial' has no parameter 'beta'; it has gamma"):
        arguments(tmp_path, method="undial", method_parameters={"beta": 1.0})


def test_a_run_from_files(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    settings = Settings(
        model=str(tmp_path / "model"),
        forget=write_rows(tmp_path / "forget.jsonl", FORGET),
        retain=write_rows(tmp_path / "retain.jsonl", RETAIN),
        output=tmp_path / "out",
        method="undial",
        method_parameters={"gamma": 5.0},
        retain_loss="kl",
        epochs=1,
    )
    done = execute(prepare(settings))
    assert done.steps > 0
    assert (tmp_path / "out" / "config.json").exists()
    with pytest.raises(RunError, match="retain_loss must be one of"):
        prepare(Settings(**{**vars(settings), "retain_loss": "l2", "output": tmp_path / "other"}))
