"""The Trainer takes the steps that the loss's definition says, and goes on where it stopped."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from tests.support import literal
from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    encoded,
    make_model,
    one_thread,
    save_model,
    write_rows,
)
from tests.unlearning.tiny_trainer import REFUSALS, arguments, logged, make_trainer
from unilogit_kernels.testing import assert_tensors_within_budget, assert_within_budget
from unilogit_kernels.unlearning.data import PairSampler, collate
from unilogit_kernels.unlearning.evaluation import token_probabilities
from unilogit_kernels.unlearning.layers import train_only_top_layers
from unilogit_kernels.unlearning.run import RunError, Settings, execute, prepare
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def literal_forget(
    method: str,
    parameters: dict[str, float],
    start: PreTrainedModel,
    read: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """The forget loss over the whole set; `read(model, rows)` gives shifted logits and labels."""
    z, y = read(None, FORGET)
    with torch.no_grad():
        start_z, _ = read(start, FORGET)
    counted = y != -100
    if method == "cross_entropy":
        smoothing, square, entropy = (
            parameters.get(name, 0.0) for name in ("label_smoothing", "z_loss", "entropy")
        )
        return literal.cross_entropy(smoothing, square, entropy)(z[counted], y[counted]).mean()
    if method in literal.TOKEN:
        return literal.TOKEN[method](z[counted], y[counted]).mean()
    if method == "tnpo":
        reference = literal.log_p(start_z[counted], y[counted])
        return literal.tnpo(reference, 0.1, 0.0)(z[counted], y[counted]).mean()
    if method == "npo":
        starts = literal.sequence_log_p(start_z, y)
        return literal.npo(literal.sequence_log_p(z, y), starts, **parameters).mean()
    if method == "simnpo":
        return literal.simnpo(literal.sequence_log_p(z, y), counted.sum(-1), 1.0, 0.0).mean()
    other_z, other_y = read(None, REFUSALS)
    if method == "flat":
        means = []
        for logits, labels in ((other_z, other_y), (z, y)):
            p = torch.softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            mask = labels != -100
            means.append(torch.where(mask, p, 0.0).sum(-1) / mask.sum(-1))
        return literal.flat("flat", *means).mean()
    assert method == "idk_dpo"
    with torch.no_grad():
        other_start, _ = read(start, REFUSALS)
    ratios = (
        literal.sequence_log_p(other_z, other_y) - literal.sequence_log_p(other_start, other_y),
        literal.sequence_log_p(z, y) - literal.sequence_log_p(start_z, y),
    )
    return 2 / 0.1 * literal.dpo(ratios, 0.1).mean()


def literal_step(model: PreTrainedModel, trainer: UnlearningTrainer, lr: float) -> Tensor:
    """One step of SGD over every pair, with the definitions and the model's own logits.

    Returns the loss, and that of the forget and of the retain rows.
    """
    args = trainer.args
    pairs = list(PairSampler(trainer._pairs, args.retain_per_forget, args.seed))
    start = copy.deepcopy(model)

    def logits_and_labels(
        model_or_none: PreTrainedModel | None, rows: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, Tensor]:
        batch = collate(encoded(rows), 0)
        output = (model_or_none or model)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
        return output.logits[:, :-1], batch["labels"][:, 1:]

    logits, labels = logits_and_labels(None, [RETAIN[r] for _, rows in pairs for r in rows])
    counted = labels != -100
    retain_loss = literal.cross_entropy(args.label_smoothing_factor, args.z_loss)
    keep = retain_loss(logits[counted], labels[counted]).mean()
    drop = literal_forget(args.method, args.method_parameters, start, logits_and_labels)
    loss = args.forget_weight * drop + args.retain_weight * keep
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(lr * parameter.grad)
    return torch.stack([loss, drop, keep]).detach()


METHODS = [name for name in sorted(literal.TOKEN) if name != "unilogit"]
METHODS += ["tnpo", "simnpo", "idk_dpo", "flat"]
SMOOTHED = {"label_smoothing_factor": 0.3, "z_loss": 0.05}
PARAMETERS = {"label_smoothing": 0.2, "z_loss": 0.03, "entropy": -0.4}


@pytest.mark.parametrize(
    ("method", "batches", "retain_per_forget", "options"),
    [
        *(("unilogit", batches, each, {}) for batches in (1, 2, 3) for each in (1, 2)),
        *((method, 2, 1, {}) for method in METHODS),
        # From one call of the lm_head, and from two.
        *((method, 2, 1, SMOOTHED) for method in ("unilogit", "idk_dpo")),
        ("cross_entropy", 2, 1, {"method_parameters": PARAMETERS, **SMOOTHED}),
        ("npo", 2, 1, {"method_parameters": {"beta": 0.5}}),
    ],
)
def test_a_step_is_the_literal_step(
    tmp_path: Path, method: str, batches: int, retain_per_forget: int, options: dict[str, Any]
) -> None:
    """Also with gradient accumulation, where batches hold unequal numbers of tokens."""
    lr, model = 0.5, make_model()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    trainer = make_trainer(
        model,
        arguments(
            tmp_path,
            per_device_train_batch_size={1: 3, 2: 2, 3: 1}[batches],
            gradient_accumulation_steps=batches,
            retain_per_forget=retain_per_forget,
            method=method,
            learning_rate=lr,
            **literal.STEP,
            **options,
        ),
    )
    trainer.train()
    assert trainer.state.global_step == 1
    plain_losses, exact_losses = literal_step(plain, trainer, lr), literal_step(exact, trainer, lr)
    logged = trainer.state.log_history[0]
    seen = torch.tensor([logged[name] for name in ("loss", "forget_loss", "retain_loss")])
    assert_within_budget(seen, exact_losses, plain_losses)
    start = dict(make_model().named_parameters())
    found, expected, by_torch = (dict(m.named_parameters()) for m in (model, exact, plain))
    for name, value in found.items():
        assert not torch.equal(value, start[name]), f"{name} did not move"
    assert_tensors_within_budget(found, expected, by_torch)


def entropy_and_spread(model: PreTrainedModel) -> tuple[float, float]:
    """Means over the forget tokens: of the entropy, and of the largest logit less the mean one."""
    batch = collate(encoded(FORGET), 0)
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = output.logits[:, :-1][batch["labels"][:, 1:] != -100]
    spread = logits.amax(-1) - logits.mean(-1)
    return float(literal.entropy(logits).mean()), float(spread.mean())


@pytest.mark.parametrize(
    ("method", "parameters", "flatter"),
    [
        ("max_entropy", {}, True),
        ("pdu", {}, True),
        ("entropy", {}, True),
        ("entropy", {"weight": 1.0}, False),
    ],
)
def test_what_flattens_the_forget_rows(
    tmp_path: Path, method: str, parameters: dict[str, float], flatter: bool
) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # A new model is flat already.
    before = entropy_and_spread(model)
    options = {"num_train_epochs": 8, "learning_rate": 3e-3, "forget_weight": 1.0}
    args = arguments(tmp_path, method=method, method_parameters=parameters, **options)
    trainer = make_trainer(model, args)
    trainer.train()
    after = entropy_and_spread(model)
    assert (after[0] > before[0]) == (after[1] < before[1]) == flatter
    for name in ("forget_loss", "retain_loss"):
        losses = logged(trainer, name)
        assert losses[-1] < losses[0], name


def test_training_stops_at_the_probability(tmp_path: Path) -> None:
    options = {"num_train_epochs": 200, "learning_rate": 5e-3, "forget_weight": 1.0}
    model = make_model()
    examples = encoded(FORGET)
    start = float(token_probabilities(model, examples, pad_id=0, batch_size=4).mean())
    args = arguments(tmp_path, **options, stop_at=f"probability={start / 2}", check_steps=2)
    trainer = make_trainer(model, args)
    trainer.train()
    assert 0 < trainer.state.global_step < trainer.state.max_steps
    final = float(token_probabilities(model, examples, pad_id=0, batch_size=4).mean())
    assert final <= start / 2
    logged = [
        log["forget_probability"]
        for log in trainer.state.log_history
        if "forget_probability" in log
    ]
    assert logged[-1] == pytest.approx(final)
    assert all(value > start / 2 for value in logged[:-1])


def test_only_the_top_layers_are_trained() -> None:
    model = make_model(num_hidden_layers=3)
    names = train_only_top_layers(model, 2)
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names
    with pytest.raises(ValueError, match="has 3 layers; cannot train the top 4"):
        train_only_top_layers(model, 4)


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="retain_per_forget must be at least 1"):
        arguments(tmp_path, retain_per_forget=0)
    with pytest.raises(ValueError, match="stop_at probability must be between 0 and 1"):
        arguments(tmp_path, stop_at="probability=1.5")


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert args.n_gpu < 2
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        make_trainer(make_model(), args)


def test_refusals_where_they_belong(tmp_path: Path) -> None:
    for method, refusals, message in [
        ("idk_dpo", (), "method 'idk_dpo' needs refusals"),
        ("npo", encoded(REFUSALS), "method 'npo' takes no refusals"),
        ("flat", encoded(REFUSALS[:2]), "one refusal for each of the 3 forget examples, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            UnlearningTrainer(
                make_model(),
                arguments(tmp_path, method=method),
                forget=encoded(FORGET),
                retain=encoded(RETAIN),
                refusals=refusals,
            )


def test_outputs_are_refused(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(model, arguments(tmp_path))
    with pytest.raises(ValueError, match="no logits to return"):
        trainer.compute_loss(model, {}, return_outputs=True)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        model=str(save_model(tmp_path / "model", attention_dropout=0.1)),
        forget=write_rows(tmp_path / "forget.jsonl", FORGET),
        retain=write_rows(tmp_path / "retain.jsonl", RETAIN),
        output=tmp_path / "output",
        epochs=4,
        batch_size=2,
        learning_rate=1e-3,
        checkpoint_steps=2,
    )


class InterruptAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step, self.seen = step, list[int]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_resumed_run_ends_as_an_uninterrupted_one(settings: Settings, step: int) -> None:
    """At every point of an epoch, with dropout, bit for bit."""
    execute(prepare(settings))
    again = dataclasses.replace(settings, output=settings.output.with_name("again"))
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(again), [InterruptAt(step)])
    resumed = prepare(again, resume=True)
    last = (
        step // 2 * 2 if step % 2 else step - 2
    )  # checkpoints come every 2 steps, after on_step_end
    assert (resumed.checkpoint is None) if last == 0 else resumed.checkpoint is not None
    if resumed.checkpoint is not None:
        assert resumed.checkpoint.name == f"checkpoint-{last}"
    never = InterruptAt(0)
    assert execute(resumed, [never]).steps == 8
    assert never.seen == list(range(last + 1, 9))
    expected = AutoModelForCausalLM.from_pretrained(settings.output).state_dict()
    start = AutoModelForCausalLM.from_pretrained(settings.model).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(again.output).state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert not torch.equal(value, start[name]), name


def test_a_checkpoint_that_was_cut_short_is_passed_over(settings: Settings) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(settings), [InterruptAt(5)])
    (settings.output / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    resumed = prepare(settings, resume=True)
    assert resumed.checkpoint is not None
    assert resumed.checkpoint.name == "checkpoint-2"


def test_an_output_that_is_taken(settings: Settings) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(settings), [InterruptAt(3)])
    with pytest.raises(RunError, match="unfinished run: resume it"):
        prepare(settings)
    with pytest.raises(RunError, match=r"other settings: learning_rate \(0.001 -> 1.0\)"):
        prepare(dataclasses.replace(settings, learning_rate=1.0), resume=True)
    execute(prepare(settings, resume=True))
    with pytest.raises(RunError, match="already holds a model"):
        prepare(settings, resume=True)
    assert not (settings.output / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "no/such/model"},
            "model 'no/such/model': there is no such folder",
        ),
        ({"method": "forgetting"}, "method must be one of altpo, ceu, cross_entropy"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"stop_at": "probability=1"}, "stop_at probability must be between 0 and 1"),
        ({"train_layers": 3}, "the model has 2 layers; cannot train the top 3"),
        ({"chat_template": True}, "has no chat template"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16"),
        ({"save_dtype": "int8"}, "save_dtype must be one of float32, bfloat16"),
    ],
)
def test_settings_that_cannot_be(
    settings: Settings, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError) as caught:
        prepare(dataclasses.replace(settings, **change))
    assert message in str(caught.value)
    assert not settings.output.exists()


def test_what_is_forgotten_is_the_answer_and_not_its_end(settings: Settings) -> None:
    prepared = prepare(settings)
    assert all(example.labels[-1] != 2 for example in prepared.sets["forget"])
    assert all(example.labels[-1] == 2 for example in prepared.sets["retain"])


def test_float32_weights_are_saved_in_bfloat16(settings: Settings) -> None:
    execute(prepare(settings))
    exact = AutoModelForCausalLM.from_pretrained(settings.output).state_dict()
    other = dataclasses.replace(
        settings, output=settings.output.with_name("other"), save_dtype="bfloat16"
    )
    execute(prepare(other))
    saved = AutoModelForCausalLM.from_pretrained(other.output).state_dict()
    for name, value in saved.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact[name].bfloat16()), name


def test_bfloat16_and_frozen_layers(settings: Settings) -> None:
    settings = dataclasses.replace(settings, dtype="bfloat16", train_layers=1, epochs=1)
    execute(prepare(settings))
    start = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16).state_dict()
    end = AutoModelForCausalLM.from_pretrained(settings.output).state_dict()
    assert all(value.dtype == torch.bfloat16 for value in end.values())
    changed = {name for name, value in end.items() if not torch.equal(value, start[name])}
    assert changed
    assert all(".layers.1." in name for name in changed)
