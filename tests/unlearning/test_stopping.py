"""A run ends where it is asked to, not steps later, and says what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.cli.test_cli import Run, run
from tests.support.tiny_models import (
    FORGET,
    encoded,
    make_model,
    make_tokenizer,
    on_one_thread,
    one_thread,
    write_rows,
)
from tests.unlearning.test_trainer import InterruptAt
from tests.unlearning.tiny_trainer import arguments, logged, make_trainer
from unilogit_kernels.unlearning.data import Encoding, Row
from unilogit_kernels.unlearning.evaluation import SetReport, evaluate_rows
from unilogit_kernels.unlearning.outcome import sentence_of
from unilogit_kernels.unlearning.run import RunError, Settings, execute, prepare
from unilogit_kernels.unlearning.stopping import Target, read_target, steps_to_next_look

__all__ = ["run"]
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

KEYED = [{**row, "key": row["completion"].strip()} for row in FORGET]
KEPT = [{"prompt": f"what {i}?", "completion": f" {w}", "key": w} for i, w in enumerate("stu")]


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a model that knows them."""
    folder = tmp_path_factory.mktemp("memorised")
    rows = [write_rows(folder / f"{n}.jsonl", r) for n, r in (("forget", KEYED), ("retain", KEPT))]
    make_model().save_pretrained(folder / "new")
    make_tokenizer().save_pretrained(folder / "new")
    learn = Settings.finetuning(
        model=str(folder / "new"),
        output=folder / "model",
        data=tuple(rows),
        epochs=60,
        batch_size=6,
        learning_rate=3e-3,
        warmup_steps=0,
    )
    with on_one_thread():
        execute(prepare(learn))
    return folder


def settings(memorised: Path, output: Path, **more: Any) -> Settings:
    given: dict[str, Any] = {"epochs": 60, "learning_rate": 1e-3, "warmup_steps": 0, **more}
    return Settings(
        model=str(memorised / "model"),
        forget=memorised / "forget.jsonl",
        retain=memorised / "retain.jsonl",
        output=output,
        batch_size=3,
        **given,
    )


def known(model: Path, rows: list[dict[str, Any]]) -> float:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    given = [Row(each["prompt"], each["completion"], None, "row") for each in rows]
    return evaluate_rows(loaded, given, Encoding(make_tokenizer()), generate=False).probability


def looks(log: list[dict[str, float]], name: str = "forget_probability") -> dict[int, float]:
    return {int(each["step"]): each[name] for each in log if name in each}


def test_it_stops_at_the_probability_that_an_evaluation_finds(
    memorised: Path, tmp_path: Path
) -> None:
    """At the first step that reaches it, whatever the steps between two looks."""
    asked = settings(memorised, tmp_path / "out", stop_at="probability=0.3")
    done = execute(prepare(asked))
    every = dataclasses.replace(asked, output=tmp_path / "every", check_steps=1)
    at_each_step = looks(execute(prepare(every)).log)
    assert done.steps == max(at_each_step)
    assert all(value > 0.3 for step, value in at_each_step.items() if step < done.steps)
    seen = looks(done.log)
    assert len(seen) < len(at_each_step)
    assert seen == {step: at_each_step[step] for step in seen}
    after = known(tmp_path / "out", KEYED)
    assert after <= 0.3
    assert seen[done.steps] == pytest.approx(after, rel=1e-5)
    assert done.ended is not None
    assert "at or below 0.3" in done.ended


def test_a_golden_model_s_results_are_a_target(memorised: Path, tmp_path: Path) -> None:
    golden = tmp_path / "GOLDEN_EVAL.json"
    golden.write_text(json.dumps({"forget_Q_A_Prob": {"agg_value": 0.3, "value_by_index": {}}}))
    steps = set()
    for name, stop_at in (
        ("number", "probability=0.3"),
        ("file", f"golden={golden}"),
        ("folder", f"golden={tmp_path}"),
    ):
        asked = settings(memorised, tmp_path / name, stop_at=stop_at, report_rows=0)
        steps.add(execute(prepare(asked)).steps)
    assert len(steps) == 1


def test_a_run_goes_on_with_the_golden_model_s_results_that_it_began_with(
    memorised: Path, tmp_path: Path
) -> None:
    golden = tmp_path / "GOLDEN_EVAL.json"

    def write(value: float) -> str:
        golden.write_text(json.dumps({"forget_Q_A_Prob": {"agg_value": value}}))
        return hashlib.sha256(golden.read_bytes()).hexdigest()

    first = write(0.1)
    asked = settings(memorised, tmp_path / "out", stop_at=f"golden={golden}", checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(asked), [InterruptAt(3)])
    record = json.loads((asked.output / "unlearning.json").read_text())
    assert record["inputs"]["golden results"] == first
    second = write(0.05)
    message = rf"with other inputs: golden results \({first} -> {second}\)"
    with pytest.raises(RunError, match=message):
        prepare(asked, resume=True)
    assert write(0.1) == first
    assert prepare(asked, resume=True).checkpoint is not None


def test_too_much_damage_ends_a_run(memorised: Path, tmp_path: Path) -> None:
    """At the first step that exceeds the budget, if each is looked at."""
    asked = settings(
        memorised,
        tmp_path / "free",
        epochs=12,
        learning_rate=2e-3,
        forget_weight=30.0,
        retain_weight=0.0,
        max_retain_loss_rise=1e3,
        check_steps=1,
    )
    losses = list(looks(execute(prepare(asked)).log, "checked_retain_loss").values())
    rises = [loss - losses[0] for loss in losses]
    last = next(step for step, rise in enumerate(rises) if rise > 0.2)
    assert 1 < last < 12
    budget = (max(0.0, *rises[:last]) + rises[last]) / 2
    limited = dataclasses.replace(
        asked, output=tmp_path / "out", max_retain_loss_rise=budget, report_rows=5
    )
    done = execute(prepare(limited))
    assert done.steps == last
    assert done.ended is not None
    assert f"more than the {budget:g} of max_retain_loss_rise" in done.ended
    assert done.outcome is not None
    assert done.outcome.sentence.startswith("ended early: the retain loss has risen by")
    # It is the mean of -log p of the retain rows' labels.
    assert 0.5 < math.exp(-losses[0]) < 1


def test_a_large_set_is_looked_at_in_part_and_decided_on_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encoded([{"prompt": f"q{i}?", "completion": f" {i}"} for i in range(150)])
    model = make_model()
    args = arguments(tmp_path, stop_at="probability=0.9", max_steps=2)
    trainer = make_trainer(model, args, forget=rows)
    sizes: list[int] = []
    measure = trainer.watch._probability

    def counting(some: Any, size: int) -> float:
        sizes.append(len(some))
        return measure(some, size)

    monkeypatch.setattr(trainer.watch, "_probability", counting)
    trainer.train()
    assert sizes == [64, 150, 64, 150]
    assert trainer.state.global_step == 1


FALLS: dict[str, Any] = {"method": "cross_entropy", "learning_rate": 3e-2}
RISES: dict[str, Any] = {"method": "gradient_ascent", "learning_rate": 3e-2}


@pytest.mark.parametrize(
    ("stop_at", "options"), [("eval_loss=5", FALLS), ("loss=6", RISES), ("seen=0.5", FALLS)]
)
def test_a_metric_of_the_evaluations_ends_a_run(
    tmp_path: Path, stop_at: str, options: dict[str, Any]
) -> None:
    """From either side: a loss falls to its target, or rises to it."""
    values = iter([0.2, 0.4, 0.6, 0.8])
    args = arguments(
        tmp_path,
        stop_at=stop_at,
        eval_strategy="steps",
        eval_steps=1,
        num_train_epochs=9,
        retain_loss="none",
        forget_weight=1.0,
        **options,
    )
    trainer = make_trainer(
        make_model(),
        args,
        eval_dataset=encoded(FORGET),
        compute_metrics=lambda _: {"seen": next(values, 1.0)},
    )
    trainer.train()
    name, target = stop_at.removeprefix("eval_").split("=")
    found = logged(trainer, f"eval_{name}")
    below = [value <= float(target) for value in found]
    assert len(found) == trainer.state.global_step > 1
    assert below == [below[0]] * (len(found) - 1) + [not below[0]]
    assert trainer.watch.reason is not None
    assert f"(stop_at {stop_at})" in trainer.watch.reason


def test_a_metric_that_nobody_computes_is_named(tmp_path: Path) -> None:
    args = arguments(tmp_path, stop_at="accuracy=1", eval_strategy="steps", eval_steps=1)
    trainer = make_trainer(make_model(), args, eval_dataset=encoded(FORGET))
    with pytest.raises(ValueError, match=r"compute no eval_accuracy, but .*eval_loss"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_at": "0.2"}, "stop_at takes NAME=VALUE"),
        ({"stop_at": "probability="}, "stop_at takes NAME=VALUE"),
        ({"stop_at": "probability=1"}, "must be between 0 and 1"),
        ({"stop_at": "probability=low"}, "stop_at probability takes a number"),
        ({"stop_at": "golden=nowhere"}, "golden=nowhere: no such file"),
        ({"stop_at": "eval_loss=inf"}, "must be a finite number"),
        ({"stop_at": "eval_loss=1"}, "a metric of evaluations, and there are none"),
        ({"max_retain_loss_rise": 0.0}, "max_retain_loss_rise must be positive"),
        ({"max_retain_loss_rise": 1.0, "retain_loss": "none"}, "would have no effect"),
    ],
)
def test_targets_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_results_without_the_metric(tmp_path: Path) -> None:
    (tmp_path / "A_EVAL.json").write_text('{"privleak": {"agg_value": 1}}')
    with pytest.raises(RunError, match="has no forget_Q_A_Prob; it has privleak"):
        read_target(f"golden={tmp_path}")


def test_looks_get_denser_towards_the_target() -> None:
    assert steps_to_next_look([(0, 1.0)], 0.2, 5) == 1
    assert steps_to_next_look([(0, 1.0), (1, 1.0)], 0.2, 5) == 2
    assert steps_to_next_look([(0, 1.0), (1, 1.0), (3, 0.99)], 0.2, 5) == 4
    assert steps_to_next_look([(0, 1.0), (3, 0.99), (7, 0.98)], 0.2, 5) == 5
    assert steps_to_next_look([(0, 1.0), (3, 0.99), (7, 0.6)], 0.2, 5) == 1
    # At a constant slope half of the way is taken, at a growing one half of what is foretold.
    assert steps_to_next_look([(0, 1.0), (4, 0.75), (8, 0.5)], 0, 9) == 4
    assert steps_to_next_look([(0, 1.0), (4, 0.9), (8, 0.5)], 0, 9) == 1
    # A figure that moves away is looked at as seldom as before.
    assert steps_to_next_look([(0, 0.5), (5, 0.6)], 0.2, 5) == 5


def report(probability: float, key_recall: float | None = None) -> SetReport:
    return SetReport(10, probability, probability, None, key_recall, 0, [])


GOAL = Target("probability", 0.2, "probability=0.2")


@pytest.mark.parametrize(
    ("forget", "retain", "target", "sentence"),
    [
        ((0.96, 1.0, 0.19, 0.0), (0.96, 1.0, 0.95, 0.98), GOAL, "forgotten; the rest is kept"),
        ((0.96, 1.0, 0.46, 0.27), (0.9, 1.0, 0.9, 1.0), GOAL, "still knows 27% of the rows to fo"),
        ((0.96, None, 0.46, None), (0.9, None, 0.9, None), None, "tokens is 0.46 (0.96 before)"),
        ((0.96, 1.0, 0.05, 0.0), (0.9, 1.0, 0.9, 1.0), GOAL, "forgotten, and further than needed"),
        ((0.96, 1.0, 0.2, 0.0), (0.9, 1.0, 0.7, 0.6), GOAL, "damaged the rest: 60% of the rows"),
        ((0.96, 1.0, 0.2, 0.0), (0.9, None, 0.7, None), GOAL, "to keep is 0.70 (0.90 before)"),
        ((0.1, 0.0, 0.1, 0.0), (0.9, None, 0.9, None), GOAL, "did not know the rows to forget"),
    ],
)
def test_sentences(
    forget: tuple[Any, ...], retain: tuple[Any, ...], target: Target | None, sentence: str
) -> None:
    before = {"forget": report(*forget[:2]), "retain": report(*retain[:2])}
    after = {"forget": report(*forget[2:]), "retain": report(*retain[2:])}
    assert sentence in sentence_of(before, after, target)
    assert sentence_of(before, after, target, "x").startswith("ended early: x; ")
    short = "its steps were over before the target: raise the learning rate (--lr)"
    assert (short in sentence_of(before, after, target)) == (target is GOAL and forget[2] > 0.21)
    assert short not in sentence_of(before, after, target, "x")


def test_the_command_says_what_came_of_it(
    memorised: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"unlearn --model {memorised / 'model'} --forget {memorised / 'forget.jsonl'}"
    line += f" --retain {memorised / 'retain.jsonl'} --output out --batch-size 3 --warmup-steps 0"
    result = run(f"{line} --epochs 60 --lr 1e-3 --args.eval_strategy epoch")
    assert result.exit_code == 0, result.output
    assert "stopped: the forget probability is" in result.output
    assert "(stop_at probability=0.2)" in result.output
    assert "Before and after" in result.output
    found = json.loads(Path("out/outcome.json").read_text())
    assert found["sentence"] in result.output
    assert found["ended"] in result.output
    assert found["after"]["forget"]["probability"] == pytest.approx(known(Path("out"), KEYED))
    assert found["before"]["forget"]["key_recall"] == 1.0
    assert set(found["after"]) == {"forget", "retain"}


def test_a_model_that_does_not_know_the_rows_has_nothing_to_forget(run: Run) -> None:
    line = "unlearn --model model --forget forget.jsonl --retain retain.jsonl --output out"
    result = run(line)
    assert result.exit_code == 2
    assert "there is nothing to forget: the probability of the forget rows is 0.0" in result.stderr
    assert not Path("out").exists()
    assert "the model did not know" in run(f"{line} --stop-at none --epochs 1").output


def test_the_evaluations_of_a_run(run: Run) -> None:
    line = "unlearn --model model --forget forget.jsonl --retain retain.jsonl --output out"
    options = "--stop-at retain_loss=5.4 --epochs 9 --lr 1e-2 --args.eval_strategy epoch"
    result = run(f"{line} {options}")
    assert result.exit_code == 0, result.output
    assert "stopped: eval_retain_loss is 5." in result.output
    log = json.loads(Path("out/outcome.json").read_text())
    assert "retain_loss=5.4" in log["ended"]
