"""A training of several processes is that of one which takes the batches of all."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from typer.testing import CliRunner

from tests.distributed.sharded_models import Partitioned
from tests.support.processes import Outcome, rank_outcomes, run_ranks
from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    make_model,
    make_tokenizer,
    one_thread,
    save_model,
    write_rows,
)
from tests.unlearning.tiny_trainer import arguments, logged, make_trainer
from unilogit_kernels.cli.app import app
from unilogit_kernels.testing import assert_within_budget
from unilogit_kernels.unlearning.data import DataError, Encoding, Row
from unilogit_kernels.unlearning.errors import LostProcessError, RunError
from unilogit_kernels.unlearning.evaluation import evaluate_rows
from unilogit_kernels.unlearning.processes import from_first, over_rows
from unilogit_kernels.unlearning.run import Settings, execute, prepare
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

STEPS: dict[str, Any] = {
    "num_train_epochs": 3,
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "per_device_train_batch_size": 1,
    "forget_weight": 0.7,
    "use_cpu": True,
}
PROCESSES = {"ddp": 2, "fsdp2": 2, "tensor parallel": 4}
"""Of which two, or two pairs, take rows of their own."""
LOGGED = ("loss", "forget_loss", "retain_loss", "grad_norm")


class Doing(TrainerCallback):
    """Does something in one rank, at the end of a step, before the other ranks' next collective."""

    def __init__(self, rank: int, step: int, action: Callable[[], None]) -> None:
        self.rank, self.step, self.action = rank, step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own = dist.get_rank() if dist.is_initialized() else 0
        if state.global_step == self.step and own == self.rank:
            self.action()


def be_late() -> None:
    time.sleep(3)


def losses(trainer: UnlearningTrainer, names: Sequence[str] = LOGGED) -> torch.Tensor:
    """What is logged of each step, by name."""
    return torch.tensor([logged(trainer, name) for name in names], dtype=torch.float64)


def _shard_on_cpus() -> None:
    """Have accelerate apply FSDP2, which it does on accelerators alone, to a model on CPUs."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def with_adapter() -> Any:
    """LoRA beside and on the head."""
    model = make_model()
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    return peft.get_peft_model(model, config)


def _shard_vocabulary_too(folder: str) -> PreTrainedModel:
    """The model as transformers loads it over 2 x 2 processes: FSDP2 and tensor parallel."""
    sizes = {"tp_size": 2, "fsdp_size": 2}
    # accelerate takes it on accelerators alone.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=sizes)


def _train(
    way: str, folder: str, options: dict[str, Any], make: Callable[[], Any] = make_model
) -> tuple[torch.Tensor, list[Any]]:
    args = arguments(Path(folder), ddp_backend="gloo", **STEPS, **options)
    assert args.world_size == PROCESSES[way]
    model, others = make(), {}
    if way == "fsdp2":
        _shard_on_cpus()
    if way == "tensor parallel":
        if options.get("retain_loss") == "kl":
            others["teacher"] = model  # whole in each process
        model = _shard_vocabulary_too(f"{folder}/model")
    late = [Doing(1, 2, be_late)] if make is make_model else []
    trainer = make_trainer(model, args, callbacks=late, **others)
    seen: list[Any] = []
    collate = trainer.data_collator

    def remember(pairs: Any) -> Any:
        seen.append([[e["input_ids"].tolist() for e in kept] for _, kept in pairs])
        return collate(pairs)

    trainer.data_collator = remember
    trainer.train()
    assert isinstance(trainer.model_wrapped, FSDPModule) == (way != "ddp")
    return losses(trainer), seen


@pytest.mark.parametrize(
    ("way", "options"),
    [
        pytest.param(
            "ddp", {"train_sampling_strategy": "group_by_length"}, marks=pytest.mark.prove
        ),
        ("ddp", {"method": "npo", "gradient_accumulation_steps": 2}),
        pytest.param("fsdp2", {}, marks=pytest.mark.prove),
        ("fsdp2", {"method": "idk_dpo", "retain_loss": "kl"}),
        ("tensor parallel", {"method": "npo", "stop_at": "probability=1e-6"}),
        pytest.param("tensor parallel", {"retain_loss": "kl"}, marks=pytest.mark.prove),
    ],
    ids=str,
)
def test_the_losses_of_one_process(way: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Of an odd number of rows, with a rank that is late by seconds; each draws its own rows."""
    together = {
        **options,
        "gradient_accumulation_steps": 2 * options.get("gradient_accumulation_steps", 1),
    }
    alone = []
    for model in (make_model().double(), make_model()):
        trainer = make_trainer(model, arguments(tmp_path, **STEPS, **together))
        trainer.train()
        alone.append(losses(trainer))
    assert alone[0].shape[1] == 3 * -(-3 // together["gradient_accumulation_steps"])
    save_model(tmp_path / "model")
    ranks = run_ranks(_train, way, str(tmp_path), options, ranks=PROCESSES[way])
    (found, first), (other, second) = ranks[:: PROCESSES[way] // 2]
    assert torch.equal(found, other)
    if way == "tensor parallel":  # Those that share a vocabulary take the same rows.
        assert (ranks[1][1], ranks[3][1]) == (first, second)
    for values, exact, plain, name in zip(found, *alone, LOGGED, strict=True):
        assert_within_budget(values.float(), exact, plain.float(), name)
    # The last batch of an epoch of 3 rows is a filler.
    mine, others = ([batch[0][0] for batch in each[:2]] for each in (first, second))
    assert mine[0] != others[0] != mine[1]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_adapters_and_the_base_below_them(way: str, tmp_path: Path) -> None:
    """The teacher is the wrapped model itself: the losses of one process, on both."""
    options = {"method": "undial", "retain_loss": "kl"}
    trainer = make_trainer(
        with_adapter(), arguments(tmp_path, **STEPS, **options, gradient_accumulation_steps=2)
    )
    trainer.train()
    (found, _), (other, _) = run_ranks(_train, way, str(tmp_path), options, with_adapter)
    assert torch.equal(found, other)
    torch.testing.assert_close(found, losses(trainer))
    assert float(found[2, 0]) == 0 < float(found[2, -1])


def _to_part(part: torch.Tensor, parameter: torch.Tensor) -> None:
    """Leave this rank its part of a gradient, and nothing of the weight, as ZeRO-3's hooks do."""
    assert parameter.grad is not None
    world, flat = dist.get_world_size(), parameter.grad.flatten()
    flat = torch.nn.functional.pad(flat, [0, world * len(part) - len(flat)])
    dist.all_reduce(flat)
    part.grad = flat.chunk(world)[dist.get_rank()] / world
    parameter.grad = None
    parameter.data = parameter.new_empty(0)


def _train_partitioned(folder: str) -> torch.Tensor:
    model = make_model()
    parts = Partitioned(model).parts
    for parameter, part in parts.items():
        parameter.register_post_accumulate_grad_hook(partial(_to_part, part))
    optimizer = torch.optim.SGD(parts.values(), lr=STEPS["learning_rate"])
    args = arguments(Path(folder), ddp_backend="gloo", **STEPS, max_grad_norm=0)
    trainer = make_trainer(model, args, optimizers=(optimizer, None))
    accelerator: Any = trainer.accelerator
    accelerator.prepare_model = lambda model, **_: model  # DDP has no place here
    trainer.train()
    return losses(trainer, LOGGED[:3])


def test_the_losses_of_one_process_with_weights_as_zero_3_keeps_them(tmp_path: Path) -> None:
    alone = []
    for model in (make_model().double(), make_model()):
        options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0}
        trainer = make_trainer(model, arguments(tmp_path, **STEPS, **options))
        trainer.train()
        alone.append(losses(trainer, LOGGED[:3]))
    found, other = run_ranks(_train_partitioned, str(tmp_path))
    assert torch.equal(found, other)
    for values, exact, plain, name in zip(found, *alone, LOGGED, strict=False):
        assert_within_budget(values.float(), exact, plain.float(), name)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        model=str(save_model(tmp_path / "model")),
        forget=write_rows(tmp_path / "forget.jsonl", FORGET),
        retain=write_rows(tmp_path / "retain.jsonl", RETAIN),
        output=tmp_path / "output",
        epochs=3,
        batch_size=1,
        learning_rate=1e-3,
        warmup_steps=0,
        checkpoint_steps=2,
    )


def interrupt() -> None:
    raise KeyboardInterrupt


def run_lost() -> None:
    raise OSError("no space left")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run(
    settings: Settings, resume: bool, doing: list[tuple[int, int, Callable[[], None]]]
) -> list[float]:
    try:
        done = execute(prepare(settings, resume=resume), [Doing(*each) for each in doing])
    except KeyboardInterrupt:
        return []
    except OSError:
        os._exit(1)  # as the command line ends
    return [log["loss"] for log in done.log if "loss" in log]


def test_a_checkpoint_of_two_resumes_on_two_and_on_one(settings: Settings, tmp_path: Path) -> None:
    whole = run_ranks(_run, settings, False, [])[0]
    assert len(whole) == 6
    for name in ("two", "one"):
        output = tmp_path / name
        stopped = dataclasses.replace(settings, output=output)
        run_ranks(_run, stopped, False, [(rank, 3, interrupt) for rank in range(2)])
        assert {p.name for p in (output / "checkpoints").iterdir()} == {"checkpoint-2"}
    two = dataclasses.replace(settings, output=tmp_path / "two")
    assert run_ranks(_run, two, True, [])[0] == whole
    notes: list[str] = []
    resumed = prepare(
        dataclasses.replace(settings, output=tmp_path / "one"), resume=True, note=notes.append
    )
    assert notes == [
        "the run was started in 2 processes and goes on in 1: gradient accumulation 2 in place of "
        "1 keeps its steps"
    ]
    found = [log["loss"] for log in execute(resumed).log if "loss" in log]
    # One process from the start differs by rounding alone.
    alone = dataclasses.replace(settings, output=tmp_path / "alone", gradient_accumulation=2)
    plain = _run(alone, False, [])
    assert_within_budget(
        torch.tensor(found), torch.tensor(whole, dtype=torch.float64), torch.tensor(plain)
    )
    weights = [
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (settings.output, two.output)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_processes_that_cannot_share_a_step(settings: Settings) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(settings), [Doing(0, 3, interrupt)])
    for outcome in rank_outcomes(_run, settings, True, []):
        assert isinstance(outcome.error, RunError)
        assert "a step of this run is 1 batches" in str(outcome.error)


@pytest.mark.parametrize("action", [kill, run_lost], ids=lambda action: action.__name__)
def test_a_process_that_is_gone_ends_the_others(
    settings: Settings, action: Callable[[], None]
) -> None:
    """The newest checkpoint stays, and the others say within seconds what has happened."""
    failed, other = _outcomes(settings, action)
    assert failed.exit_code == (-signal.SIGKILL if action is kill else 1)
    assert isinstance(other.error, LostProcessError)
    assert "another process of the run has ended" in str(other.error)
    assert (settings.output / "checkpoints" / "checkpoint-2").exists()


def _outcomes(settings: Settings, action: Callable[[], None]) -> list[Outcome]:
    return rank_outcomes(_run, settings, False, [(0, 3, action)], seconds=60)


def _evaluate(folder: str, options: str) -> str:
    os.chdir(folder)
    done = CliRunner().invoke(app, f"{EVALUATE} {options}".split())
    assert done.exit_code == 0, done.output
    return done.output


EVALUATE = "evaluate --model model --data forget=forget.jsonl --data retain=retain.jsonl"
EVALUATE += " --batch-size 1"


def test_an_evaluation_is_shared(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3 and 5 rows by 2 processes: the report of one, written and printed once."""
    outputs = run_ranks(_evaluate, str(tmp_path), "--json shared.json")
    assert "figures and answers are in shared.json" in outputs[0]
    assert outputs[1] == ""
    monkeypatch.chdir(tmp_path)
    _evaluate(str(tmp_path), "--json alone.json")
    shared, alone = (json.loads(Path(f"{name}.json").read_text()) for name in ("shared", "alone"))
    assert shared == alone
    assert len(shared["sets"]["retain"]["answers"]) == 5


def test_every_metric_is_shared(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 2 processes compute of a model and its golden one are the files of one process."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "golden", seed=7)
    outputs = run_ranks(_evaluate, str(tmp_path), "--golden golden --output shared")
    assert outputs[0].count("results and what they were computed from are in shared") == 1
    assert outputs[1] == ""
    _evaluate(str(tmp_path), "--golden golden --output alone")
    files = [path.relative_to("alone") for path in Path("alone").rglob("*") if path.is_file()]
    assert {path.parts[0] for path in files} >= {"tokens", "answers", "divergences", "golden"}
    for path in files:
        # Dates, and how many processes there were, are in these two.
        if path.name not in ("audit.json", "evaluation.json"):
            assert (Path("shared") / path).read_bytes() == (Path("alone") / path).read_bytes(), path
    # One process goes on where two were, and finds nothing left to do.
    before = {
        path: path.stat().st_mtime_ns for path in Path("shared").glob("*/*") if path.is_file()
    }
    _evaluate(str(tmp_path), "--golden golden --output shared")
    kept = [path for path in before if path.parts[1] in ("tokens", "answers", "divergences")]
    assert len(kept) >= 6
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)


def _evaluate_shared(model: PreTrainedModel, share_rows: bool) -> list[float]:
    encoding = Encoding(make_tokenizer(), append_eos=True)
    rows = [Row(row["prompt"], row["completion"], None, "") for row in RETAIN]
    report = evaluate_rows(model, rows, encoding, generate=False, share_rows=share_rows)
    return [report.probability, report.sequence_probability]


def _evaluate_in_parts(folder: str) -> list[float]:
    return _evaluate_shared(_shard_vocabulary_too(folder), True)


def test_an_evaluation_of_a_model_that_is_in_parts(tmp_path: Path) -> None:
    """2 x 2 processes, of which two and two take the same of 5 rows."""
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    found = run_ranks(_evaluate_in_parts, str(tmp_path / "model"), ranks=4)
    assert found.count(found[0]) == 4
    exact = torch.tensor(_evaluate_shared(model.double(), False), dtype=torch.float64)
    plain = torch.tensor(_evaluate_shared(model.float(), False))
    assert_within_budget(torch.tensor(found[0]), exact, plain)


def _from_first(folder: str, fails: bool) -> tuple[int, list[str]]:
    def work() -> int:
        (Path(folder) / str(dist.get_rank())).touch()
        if fails:
            raise DataError("nothing there")
        return 10 + dist.get_rank()

    return from_first(work), sorted(path.name for path in Path(folder).iterdir())


def test_the_first_process_works_for_all(tmp_path: Path) -> None:
    assert run_ranks(_from_first, str(tmp_path), False) == [(10, ["0"])] * 2
    failed = rank_outcomes(_from_first, str(tmp_path), True)
    assert [type(outcome.error) for outcome in failed] == [DataError, RunError]
    assert str(failed[1].error) == "nothing there"


def _share(rows: list[int], wrong: int | None) -> tuple[list[int], list[int]]:
    mine: list[int] = []

    def work(share: list[int]) -> list[int]:
        mine.extend(share)
        if wrong in share:
            raise ZeroDivisionError(f"row {wrong}")
        return [row * row for row in share]

    return over_rows(rows, work), mine


def test_rows_are_shared_and_their_results_are_everywhere() -> None:
    """All take equally many, of 5 rows and of fewer rows than processes."""
    for rows in ([3, 1, 4, 1, 5], [7, 9]):
        for found, mine in run_ranks(_share, rows, None, ranks=3):
            assert found == [row * row for row in rows]
            assert len(mine) == -(-len(rows) // 3)
    assert _share([2, 3], None) == ([4, 9], [2, 3])
    failed = rank_outcomes(_share, [3, 1, 4], 4, ranks=3)
    assert [type(outcome.error) for outcome in failed] == [RunError, RunError, ZeroDivisionError]
    assert "process 2 failed: ZeroDivisionError: row 4" in str(failed[0].error)
