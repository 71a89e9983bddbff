"""The benchmark with a large vocabulary: losses from logits, memory that runs out, tables."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import large_vocabulary
from benchmarks.limited_run import FROM_LOGITS, FUSED, FromLogits, is_out_of_memory
from tests.support import ROOT
from tests.support.tiny_models import FORGET, RETAIN, encoded, make_model, one_thread, save_model
from tests.unlearning.tiny_trainer import arguments, make_trainer
from unilogit_kernels.testing import assert_tensors_within_budget
from unilogit_kernels.unlearning.data import collate
from unilogit_kernels.unlearning.demo.tofu_shape import make_tofu_shaped, write_tofu_shaped
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

COMMITTED = ROOT / "benchmarks/results/large-vocabulary.json"
METHODS = {"literal": "unilogit", "ascent": "gradient_ascent"}
"""Ours, by the name of the loss from logits that they are beside."""


@pytest.mark.parametrize("loss", FROM_LOGITS)
def test_losses_from_logits_are_those_of_the_fused_trainer(loss: str, tmp_path: Path) -> None:
    batch = collate(encoded([*FORGET[:2], *RETAIN[:2]]), pad_id=0)

    def gradients(trainer: UnlearningTrainer) -> dict[str, Tensor]:
        model = trainer.model
        assert model is not None
        trainer.compute_loss(model, dict(batch)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def from_logits(model: nn.Module) -> dict[str, Tensor]:
        rows = {"forget": encoded(FORGET), "retain": encoded(RETAIN)}
        chosen = FROM_LOGITS[loss]
        return gradients(FromLogits(model, arguments(tmp_path), forget_loss=chosen, **rows))

    fused = gradients(make_trainer(make_model(), arguments(tmp_path, method=METHODS[loss])))
    exact, plain = from_logits(make_model().double()), from_logits(make_model())
    assert_tensors_within_budget(fused, exact, plain)


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "no"))
    assert not is_out_of_memory(OSError(errno.ENOENT, "no"))
    assert not is_out_of_memory(RuntimeError("shapes"))


def test_the_committed_tables_follow_from_the_committed_records(tmp_path: Path) -> None:
    path = tmp_path / COMMITTED.name
    path.write_text(COMMITTED.read_text())
    large_vocabulary.main(["--json", str(path), "--redraw"])
    committed = COMMITTED.with_suffix(".md").read_text()
    assert path.with_suffix(".md").read_text() == committed
    assert path.with_suffix(".png").stat().st_size > 10_000
    records = json.loads(COMMITTED.read_text())["results"]
    under = [r for r in records if r["limit_mib"] is not None]
    assert not any(r["died"] for r in under if r["loss"] == FUSED)
    assert any(r["died"] for r in under if r["loss"] == "literal")


def _limited(folder: Path, loss: str, limit_mib: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.limited_run", "--folder", str(folder)]
    command += ["--share", "20", "--loss", loss, "--rows", "16", "--limit-mib", str(limit_mib)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


@pytest.mark.prove  # Two processes that import everything.
def test_the_literal_loss_dies_where_the_fused_one_runs(tmp_path: Path) -> None:
    write_tofu_shaped(make_tofu_shaped(sellers=10, forget_sellers=2), tmp_path / "data")
    save_model(tmp_path / "memorised", vocab_size=131_072, hidden_size=8)
    fused = _limited(tmp_path, FUSED, 1024)
    assert (fused["died"], fused["steps"]) == (None, 2)
    literal = _limited(tmp_path, "literal", 1024)
    assert literal["steps"] == 0
    assert "you tried to allocate" in literal["died"]
