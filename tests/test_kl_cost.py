"""The benchmark of the KL against a reference model: that it runs, and judges what it times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_one_command_writes_markdown_and_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kl_cost", "--json", str(tmp_path / "kl.json")]
    command += ["--tokens", "24", "--hidden", "16", "--ref-hidden", "24", "--vocabulary", "999"]
    command += ["--rounds", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "kl.md").read_text() in result.stdout
    figures = json.loads((tmp_path / "kl.json").read_text())
    assert len(figures["results"]) == 8
    for entry in figures["results"]:
        assert entry["title"] in result.stdout
        ours, plain = entry["measured"][0], entry["measured"][-1]
        assert (ours["name"], plain["name"]) == ("linear_kl_loss", "plain torch")
        for error in ("hidden_error", "weight_error"):
            if ours[error] is not None:
                assert ours[error] <= 2 * plain[error] + 2**-23
        trained = not entry["case"]["shape"]["frozen_head"]
        assert (ours["weight_error"] is not None) == trained
