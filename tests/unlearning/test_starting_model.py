"""What a method asks of the starting model is asked of it as it trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.tiny_models import FORGET, RETAIN, encoded, make_model, one_thread
from tests.unlearning.tiny_trainer import arguments, logged, make_trainer
from unilogit_kernels.huggingface.two_heads import frozen_copy
from unilogit_kernels.unlearning.data import collate
from unilogit_kernels.unlearning.methods import MethodError

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@pytest.mark.parametrize(("method", "loss"), [("npo", 2 / 0.1 * math.log(2)), ("dpo", math.log(2))])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_first_step_compares_the_model_with_itself(
    tmp_path: Path, method: str, loss: float, autocast: bool
) -> None:
    """To the last bit of float32, also where the model computes in bfloat16."""
    args = arguments(tmp_path, method=method, bf16=autocast, use_cpu=True, max_steps=1)
    trainer = make_trainer(make_model(), args)
    trainer.train()
    assert logged(trainer, "forget_loss")[0] == pytest.approx(loss, rel=2.0**-23, abs=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_first_divergence_is_nothing(tmp_path: Path, autocast: bool) -> None:
    """And from the first step on gradients reach every weight."""
    args = arguments(tmp_path, retain_loss="kl", bf16=autocast, use_cpu=True, learning_rate=1e-2)
    model = make_model()
    trainer = make_trainer(model, args)
    trainer.train()
    divergences = logged(trainer, "retain_loss")
    assert divergences[0] == 0
    assert divergences[1] > 0
    start = dict(make_model().named_parameters())
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_it_is_asked_before_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    """And once: a second training compares with the same model."""
    options: dict[str, Any] = {"method": "tnpo", "num_train_epochs": 2, "learning_rate": 1e-2}
    first = make_trainer(
        make_model(), arguments(tmp_path, **options, save_strategy="steps", save_steps=3)
    )
    first.train()
    again = make_trainer(make_model(), arguments(tmp_path, **options))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again.train()
    for ours, expected in zip(again._pairs.forget, first._pairs.forget, strict=True):
        assert torch.equal(ours["reference_log_probs"], expected["reference_log_probs"])


def test_a_checkpoint_in_its_place_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), arguments(tmp_path, method="npo"))
    trainer.state.global_step = 3
    with pytest.raises(ValueError, match=r"'npo' needs the starting model, but the checkpoint was"):
        trainer.begin()


def test_a_teacher_with_another_padding(tmp_path: Path) -> None:
    model, teacher = make_model(), frozen_copy(make_model(1, vocab_size=264))
    options: dict[str, Any] = {"retain_loss": "kl", "max_steps": 1, "retain_per_forget": 5}
    trainer = make_trainer(model, arguments(tmp_path, **options), teacher=teacher)
    with pytest.raises(ValueError, match=r"the teacher's 264; .* UnlearningArguments\(vocab_size="):
        trainer.train()
    rows = {"retain": encoded(RETAIN[:1]), "forget": encoded(FORGET[:1])}
    args = arguments(tmp_path, **options, vocab_size=259)
    trainer = make_trainer(make_model(), args, teacher=teacher, **rows)
    trainer.train()
    batch = collate(rows["retain"], 0)
    counted = batch.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        ours, theirs = (
            m.double()(**batch).logits[:, :-1, :259][counted].log_softmax(-1)
            for m in (make_model(), teacher)
        )
    expected = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    assert logged(trainer, "retain_loss")[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_number_of_tokens_without_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="takes no vocab_size"):
        make_trainer(make_model(), arguments(tmp_path, vocab_size=259))
