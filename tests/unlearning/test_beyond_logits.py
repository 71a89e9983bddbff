"""Methods that are not losses of the logits alone; test_twenty_steps has their steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    encoded,
    make_model,
    one_thread,
    save_model,
    write_rows,
)
from tests.unlearning.tiny_trainer import arguments, make_trainer
from unilogit_kernels.unlearning.methods import Method
from unilogit_kernels.unlearning.rows import DataError, read_rows
from unilogit_kernels.unlearning.run import RunError, Settings, execute, prepare
from unilogit_kernels.unlearning.task_vector import TaskVector

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@pytest.mark.parametrize("options", [{"retain_loss": "none"}, {"method": "task_vector"}], ids=str)
def test_no_retain_rows_are_no_forward(tmp_path: Path, options: dict[str, Any]) -> None:
    model, seen = make_model(), list[int]()
    args = arguments(tmp_path, per_device_train_batch_size=3, **options)
    trainer = make_trainer(model, args)
    model.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output[0])))
    trainer.train()
    assert seen[-1] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "unilogit", "retain_loss": "hidden_states"},
            "must be one of cross_entropy, kl, none",
        ),
        ({"method": "rmu", "retain_loss": "kl"}, "must be one of hidden_states, none, got 'kl'"),
        ({"method": "task_vector", "retain_loss": "kl"}, "must be one of none, got 'kl'"),
        ({"retain_loss": "none", "dual_step_size": 1.0}, "there is no retain loss to follow"),
        ({"retain_loss": "none", "z_loss": 0.1}, "z_loss would have no effect"),
        ({"method": "task_vector", "stop_at": "probability=0.1"}, "would end method 'task_vector'"),
        (
            {"method": "rmu", "method_parameters": {"beta": 1.0}},
            "no parameter 'beta'; it has layer",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_rows_that_do_not_go_with_the_retain_loss(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="retain_loss 'none' takes no retain examples"):
        make_trainer(make_model(), arguments(tmp_path, retain_loss="none"), retain=encoded(RETAIN))
    with pytest.raises(DataError, match="at least one retain example, or be 'none'"):
        make_trainer(make_model(), arguments(tmp_path), retain=())


@pytest.mark.parametrize(("layer", "depth"), [(2.0, 2), (0.5, 2)])
def test_a_layer_that_is_not_there(tmp_path: Path, layer: float, depth: int) -> None:
    args = arguments(tmp_path, method="rmu", method_parameters={"layer": layer})
    with pytest.raises(ValueError, match=f"below the {depth} layers of the model, got {layer:g}"):
        make_trainer(make_model(), args)


def test_a_steered_layer_that_nothing_trains(tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=3)
    model.model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    trainer = make_trainer(model, arguments(tmp_path, method="rmu"))
    with pytest.raises(ValueError, match="no gradient reaches the hidden states of layer 0"):
        trainer.train()


def test_recomputed_activations_change_no_step_of_rmu(tmp_path: Path) -> None:
    options = {"method": "rmu", "retain_weight": 2.0}
    models = make_model(num_hidden_layers=3), make_model(num_hidden_layers=3)
    make_trainer(models[0], arguments(tmp_path, **options)).train()
    recomputed = arguments(
        tmp_path,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
        **options,
    )
    make_trainer(models[1], recomputed).train()
    for (name, value), other in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert torch.equal(value, other), name


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    alternates = ["no", ["idk", "hm"], "so"]
    rows = [{**row, "alternate": text} for row, text in zip(FORGET, alternates, strict=True)]
    return Settings(
        model=str(save_model(tmp_path / "model", num_hidden_layers=3, attention_dropout=0.1)),
        forget=write_rows(tmp_path / "forget.jsonl", rows),
        retain=write_rows(tmp_path / "retain.jsonl", RETAIN),
        output=tmp_path / "output",
        epochs=3,
        batch_size=2,
        learning_rate=1e-3,
        checkpoint_steps=2,
    )


def replaced(settings: Settings, **changes: Any) -> Settings:
    return Settings(**{**vars(settings), **changes})


def test_rmu_trains_its_layer_and_those_below(settings: Settings) -> None:
    execute(prepare(replaced(settings, method="rmu", method_parameters={"layer": 1})))
    start, found = (
        AutoModelForCausalLM.from_pretrained(each).state_dict()
        for each in (settings.model, settings.output)
    )
    moved = {name for name, value in found.items() if not torch.equal(value, start[name])}
    assert {name.split(".")[2] for name in moved} == {"0", "1"}


def test_alternates_are_rows_of_their_own(settings: Settings) -> None:
    rows = read_rows(str(settings.forget))
    assert [row.alternates for row in rows] == [("no",), ("idk", "hm"), ("so",)]
    prepared = prepare(replaced(settings, method="altpo"))
    forget, refusals = prepared.sets["forget"], prepared.sets["refusal"]
    assert len(forget) == len(refusals) == 4
    assert forget[1] == forget[2]
    said = [
        prepared.encoding.tokenizer.decode([label for label in example.labels if label != -100])
        for example in refusals
    ]
    # Each learns its end, as an answer does that is to be given.
    assert said == [f" {text}</s>" for text in ("no", "idk", "hm", "so")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "altpo", "refusals": Path("refusals.txt")}, "'altpo' takes no refusals"),
        ({"retain": None}, "retain_loss 'cross_entropy' needs rows to keep"),
        ({"retain_loss": "none"}, "retain_loss 'none' takes no rows to keep"),
        ({"method": "rmu", "train_layers": 2, "method_parameters": {"layer": 0}}, "of which 1 lie"),
    ],
)
def test_settings_that_cannot_be(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError) as caught:
        prepare(replaced(settings, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "item 1 is empty"),
        (["no", ""], "item 2 is empty"),
        (3, "item 1 must be a string, got int"),
        ([None], "item 1 must be a string, got NoneType"),
    ],
)
def test_alternates_that_are_none(tmp_path: Path, given: Any, message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**FORGET[0], "alternate": given}])
    with pytest.raises(DataError, match=f'field "alternate", {message}'):
        read_rows(path)


def test_a_row_without_an_alternate(settings: Settings) -> None:
    bare = write_rows(settings.output.with_name("bare.jsonl"), FORGET)
    with pytest.raises(DataError, match="a row without an alternate has nothing to answer instead"):
        prepare(replaced(settings, method="altpo", forget=bare))


def test_methods_by_name() -> None:
    assert Method("altpo").needs_refusals
    assert Method("altpo").needs_reference
    assert not Method("rmu").needs_reference
    assert Method("task_vector").is_negated


def test_a_task_vector_of_partitioned_weights_is_refused() -> None:
    """As ZeRO-3 leaves them outside of a forward; a weight that is gathered is taken."""
    model = make_model()
    weight: Any = model.get_output_embeddings().weight
    weight.ds_shape = weight.shape
    TaskVector(model)
    weight.data = torch.empty(0)
    with pytest.raises(RunError, match=r"lm_head.weight has shape \[0\] here\): train with FSDP2"):
        TaskVector(model)
