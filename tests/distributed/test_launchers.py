"""Runs under `torchrun` and `accelerate launch`, and a worker that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import faulty_command
from tests.support.tiny_models import FORGET, RETAIN, one_thread, save_model, write_rows

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
