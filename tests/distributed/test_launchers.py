"""Runs under `torchrun` and `accelerate launch`, and a worker that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from tests.distributed import faulty_command
from tests.support.tiny_models import FORGET, RETAIN, one_thread, save_model, write_rows
from unilogit_kernels.unlearning.processes import check_launch

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

TORCHRUN = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d "
TORCHRUN += "--rdzv_endpoint 127.0.0.1:0 --monitor_interval 2"
UNLEARN = (
    "unlearn --model model --forget forget.jsonl --retain retain.jsonl --output out --stop-at none"
)
UNLEARN += " --epochs 3 --batch-size 1 --checkpoint-steps 2 --lr 1e-3 --warmup-steps 0"


def launch(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a folder with a model and two data files."""
    save_model(folder / "model")
    write_rows(folder / "forget.jsonl", FORGET)
    write_rows(folder / "retain.jsonl", RETAIN)
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, *line.split()],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=folder,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
    )


def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    """Its error is torchrun's, and that of the process that missed it, within a minute."""
    killed = tmp_path / "killed"
    done = launch(
        f"{TORCHRUN} -m {faulty_command.__name__} {UNLEARN}",
        tmp_path,
        **{faulty_command.KILL: f"0,3,{killed}"},
    )
    ended = time.time()
    assert done.returncode != 0
    assert ended - killed.stat().st_mtime < 60
    assert "error: process 1: another process of the run has ended" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2").exists()


def test_a_restart_with_the_store_of_before_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    world = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "::1"}
    of_torchrun = {"MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (world | of_torchrun).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.warns(UserWarning, match="anew 3 times.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_launch()
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "False"), ("RANK", "1")):
        with monkeypatch.context() as changed, warnings.catch_warnings():
            warnings.simplefilter("error")
            changed.setenv(name, value)
            check_launch()


@pytest.mark.prove
def test_torchrun_starts_anew(tmp_path: Path) -> None:
    """All workers, once one is killed; they go on from the checkpoint, to the end of the run.

    Without the variable torch 2.13 hands them the store of the first attempt, whose addresses they
    may take for those of now.
    """
    killed = tmp_path / "killed"
    done = launch(
        f"{TORCHRUN} --max_restarts 1 -m {faulty_command.__name__} {UNLEARN} --resume",
        tmp_path,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        **{faulty_command.KILL: f"0,3,{killed}"},
    )
    assert done.returncode == 0, done.stderr
    assert killed.exists()
    assert "failed (exitcode: -9)" in done.stderr
    assert "addresses of processes that are gone" not in done.stderr
    said = done.stdout.splitlines()
    assert "resuming from out/checkpoints/checkpoint-2" in said
    assert said[-1] == "6 steps; the model is in out"


def test_accelerate_launch(tmp_path: Path) -> None:
    """What it starts is what torchrun starts."""
    done = launch(
        "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        "--mixed_precision no --dynamo_backend no --main_process_port 0 -m unilogit_kernels.cli "
        "evaluate --model model --data forget=forget.jsonl --json out.json",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("figures and answers are in out.json") == 1
    assert json.loads((tmp_path / "out.json").read_text())["sets"]["forget"]["rows"] == 3
