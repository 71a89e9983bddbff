"""The modules of `benchmarks/`: that they run, and what they write of what they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import ROOT

SIZES = ["--rounds", "1", "--tokens", "24", "--hidden", "16", "--vocabulary", "999"]


def _run(module: str, path: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """The results in the JSON that one command writes, beside the Markdown that it prints."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--json", str(path), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    text = path.with_suffix(".md").read_text()
    assert text in result.stdout
    figures = json.loads(path.read_text())
    assert figures["command"].startswith(f"python -m benchmarks.{module} --json")
    assert all(found["title"] in text for found in figures["results"])
    return list(figures["results"])


def test_kl_cost(tmp_path: Path) -> None:
    found = _run("kl_cost", tmp_path / "kl.json", [*SIZES, "--ref-hidden", "24"])
    assert len(found) == 8
    for entry in found:
        ours, plain = entry["measured"][0], entry["measured"][-1]
        assert (ours["name"], plain["name"]) == ("linear_kl_loss", "plain torch")
        for error in ("hidden_error", "weight_error"):
            if ours[error] is not None:
                assert ours[error] <= 2 * plain[error] + 2**-23
        trained = not entry["case"]["shape"]["frozen_head"]
        assert (ours["weight_error"] is not None) == trained


def test_inactive_rows(tmp_path: Path) -> None:
    found = _run("inactive_rows", tmp_path / "rows.json", [*SIZES, "--dtype", "float32"])
    assert [entry["rows"] for entry in found] == ["ignored", "inactive"] * 2
    assert all(len(entry["all_ms"]) == len(entry["some_ms"]) == 1 for entry in found)


def test_bfloat16_cast(tmp_path: Path) -> None:
    sizes = ["--size", "24", "16", "999", "--rounds", "2"]
    for entry in _run("bfloat16_cast", tmp_path / "cast.json", sizes):
        assert list(entry["parts_ms"]) == ["GEMMs", "casts", "the rest"]
        assert all(milliseconds > 0 for milliseconds in entry["parts_ms"].values())
        assert [len(times) for times in entry["milliseconds"].values()] == [2, 2, 2]
