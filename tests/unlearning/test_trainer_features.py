"""Arguments of Hugging Face's Trainer that this package's loss could have come in the way of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.test_cli import UNLEARN, Run, run
from tests.support.tiny_models import FORGET, RETAIN, encoded, make_model, one_thread
from tests.unlearning.tiny_trainer import arguments, logged, make_trainer
from unilogit_kernels.huggingface.head_call import HeadCall
from unilogit_kernels.huggingface.logit_transform import HeadTransform
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

__all__ = ["run"]
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

LOSSES = ("loss", "forget_loss", "retain_loss")


def trained(folder: Path, **options: Any) -> UnlearningTrainer:
    trainer = make_trainer(make_model(), arguments(folder, num_train_epochs=2, **options))
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["unilogit", "npo", "undial"])
def test_a_compiled_model_learns_the_same(tmp_path: Path, method: str) -> None:
    """Without a graph break that changes a loss; the backend that compiles nothing is fast."""
    plain = trained(tmp_path, method=method)
    compiled = trained(tmp_path, method=method, torch_compile=True, torch_compile_backend="eager")
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    for name in LOSSES:
        assert logged(compiled, name) == pytest.approx(logged(plain, name), rel=1e-5), name


def test_noise_on_the_embeddings_is_of_training_alone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"stop_at": "probability=1e-9"}
    plain = trained(tmp_path, **options)
    noisy = trained(tmp_path, neftune_noise_alpha=50.0, **options)
    assert logged(noisy, "loss")[0] != logged(plain, "loss")[0]
    first = [logged(each, "forget_probability")[0] for each in (plain, noisy)]
    assert first[0] == first[1]


@pytest.mark.parametrize("counted", ["all", "non_padding"])
def test_tokens_are_counted(tmp_path: Path, counted: str) -> None:
    args = arguments(tmp_path, include_num_input_tokens_seen=counted, per_device_train_batch_size=3)
    trainer = make_trainer(make_model(), args, retain=encoded(RETAIN[:3]))
    trainer.train()
    lengths = [len(row["labels"]) for row in encoded([*FORGET, *RETAIN[:3]])]
    expected = sum(lengths) if counted == "non_padding" else 6 * max(lengths)
    assert trainer.state.num_input_tokens_seen == expected


@pytest.mark.parametrize("method", ["unilogit", "npo"])
def test_a_batch_that_fits_is_found(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a batch of two was too large, every step is that of a run with batches of one."""
    plain = trained(tmp_path, method=method, per_device_train_batch_size=1)
    step = UnlearningTrainer.compute_loss

    def narrow(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if len(inputs["labels"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, model, inputs, *rest, **more)

    monkeypatch.setattr(UnlearningTrainer, "compute_loss", narrow)
    found = trained(tmp_path, method=method, auto_find_batch_size=True)
    assert found.state.global_step == plain.state.global_step == 6
    for name in LOSSES:
        assert logged(found, name) == pytest.approx(logged(plain, name), rel=1e-5), name


def test_labels_follow_the_states_to_the_head_s_device() -> None:
    """A model in parts has its embeddings and its lm_head on two devices."""
    hidden = torch.empty(4, 8, 16, device="meta", requires_grad=True)
    weight = torch.empty(100, 16, device="meta")
    head = HeadCall(hidden, weight, None, HeadTransform(None, None, 100))
    labels, rows = torch.zeros(4, 8, dtype=torch.long), torch.tensor([0, 0, 1, 1])
    options: dict[str, Any] = {"backend": "eager"}
    items = torch.tensor([3, 4])
    alone = head.objective_loss(labels, "unilogit", num_items_in_batch=items[0], **options)
    both = head.mixed_loss(
        labels, ["unilogit", "cross_entropy"], rows, num_items_in_batch=items, **options
    ).loss
    for loss in (alone, both):
        loss.backward()
        assert hidden.grad is not None
    assert head.log_odds(labels, **options).device == hidden.device


def test_a_model_in_parts_is_no_data_parallel_one(tmp_path: Path) -> None:
    """One process may have several GPUs, if each holds a part of the model."""
    model: Any = make_model()
    args = arguments(tmp_path)
    assert args.n_gpu < 2
    args._n_gpu = 2
    model.hf_device_map = {"model": 0, "lm_head": 1}
    trainer = make_trainer(model, args)
    assert trainer.is_model_parallel
    args._n_gpu = 2
    model.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match=r"accelerate launch.*device_map"):
        make_trainer(make_model(), args)


@pytest.mark.parametrize(
    ("name", "message"),
    [("weights", "report_to must be of .*, got 'weights'"), ("wandb", "report_to 'wandb': .*ins")],
)
def test_reporters_that_are_not_there(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.is_wandb_available", lambda: False
    )
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, report_to=name)


def test_the_command_names_what_it_cannot_hand_on(run: Run) -> None:
    result = run(f"{UNLEARN} --args.report_to weights")
    assert result.exit_code == 2
    assert "report_to must be of" in result.stderr
    result = run(f"{UNLEARN} --args.push_to_hub --args.hub_model_id nobody/nothing")
    assert result.exit_code == 2, result.output
    assert "error: push_to_hub: " in result.stderr
    assert not Path("out").exists()
