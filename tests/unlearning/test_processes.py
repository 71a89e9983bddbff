"""Several processes are one run, or are told that they are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.test_cli import UNLEARN, Run, run
from tests.unlearning.test_runs import EVALUATE, refused
from unilogit_kernels.unlearning import processes
from unilogit_kernels.unlearning.run import RunError

__all__ = ["run"]


def launch(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes under torchrun, on the CPU."""
    command = "-m torch.distributed.run --nproc_per_node 2 --rdzv_endpoint 127.0.0.1:0"
    return subprocess.run(
        [
            sys.executable,
            *command.split(),
            "--rdzv_backend",
            "c10d",
            "-m",
            "unilogit_kernels.cli",
            *line.split(),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **environment,
        },
    )


def test_two_processes_are_one_run(run: Run) -> None:
    """Of 3 rows, 1 to a process: 2 steps an epoch, where one process takes 3."""
    done = launch(f"{UNLEARN} --epochs 4 --batch-size 1 --checkpoint-steps 3")
    assert done.returncode == 0, done.stderr
    first, *table, last = done.stdout.splitlines()
    assert first == "3 rows to forget, 5 to keep; each prompt goes as it is"
    assert last == "8 steps; the model is in out"
    assert sum("Before and after" in line for line in table) == 1
    assert table[-1].startswith("the model did not know the rows to forget before either")
    assert done.stderr.count("8/8") <= 1
    assert json.loads(Path("out/unlearning.json").read_text())["inputs"]["processes"] == "2"
    AutoModelForCausalLM.from_pretrained("out")


def test_two_processes_tell_an_error_once(run: Run) -> None:
    done = launch(f"{UNLEARN} --max-length 2")
    assert done.returncode != 0
    assert done.stderr.count("error: forget.jsonl, line 1: ") == 1
    assert not Path("out").exists()


def test_an_error_in_one_process_is_one_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the first of two, and the second says how it fared."""

    def gather(every: list[Any], mine: Any) -> None:
        every[:] = [mine, other]

    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    other: Any = None
    assert processes.together(lambda: 3) == 3
    other = ("RunError", "the disk is full", True)
    with pytest.raises(RunError, match=r"^the disk is full$"):
        processes.together(lambda: 3)
    other = ("ValueError", "strange", False)
    with pytest.raises(RunError, match="process 1 failed: ValueError: strange"):
        processes.together(lambda: 3)
    with pytest.raises(ZeroDivisionError):
        processes.together(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("line", "environment", "message"),
    [
        (UNLEARN, {"WORLD_SIZE": "2"}, "WORLD_SIZE says that 2 processes"),
        (UNLEARN, {"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer, got 'two'"),
        (
            UNLEARN,
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "torchrun --nproc_per_node N",
        ),
        (
            EVALUATE,
            {"WORLD_SIZE": "2", "RANK": "0"},
            "WORLD_SIZE says that 2 processes share the work",
        ),
    ],
)
def test_processes_that_would_not_find_each_other(
    run: Run, monkeypatch: pytest.MonkeyPatch, line: str, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(run(line), message)


def test_a_world_of_one_beside_a_launch_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.check_world(2)
    with pytest.raises(RunError, match="this one is in a world of 1"):
        processes.check_world(1)


def test_cpus_are_used_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not processes.on_cpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert processes.on_cpu()
