"""`unilogit evaluate --output`: from a benchmark's files to results, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.tiny_models import FORGET, RETAIN, one_thread, save_model, write_rows
from tests.unlearning.benchmark_files import TOFU, write_tables
from unilogit_kernels.cli.app import app
from unilogit_kernels.unlearning.benchmarks import Generation, tofu

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

NAMED = "--benchmark tofu:forget10 --data-dir tofu --max-length 96"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, files of rows, and the fixtures of TOFU."""
    save_model(tmp_path / "model")
    write_rows(tmp_path / "forget.jsonl", FORGET)
    write_rows(tmp_path / "retain.jsonl", RETAIN)
    write_tables(tmp_path / "tofu", TOFU)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "200")
    # TOFU's 200 tokens would be most of this file's time.
    monkeypatch.setattr(tofu, "GENERATION", Generation(max_new_tokens=12, rouge="tofu"))
    return tmp_path


def run(line: str) -> Result:
    return CliRunner().invoke(app, line.split())


def test_all_metrics_of_a_benchmark_by_their_names(folder: Path) -> None:
    save_model(folder / "golden", seed=1)
    done = run(f"evaluate --model model --golden golden {NAMED} --output results")
    assert done.exit_code == 0, done.output
    assert "results and what they were computed from are in results" in done.output
    assert "not computed" not in done.stderr
    logs = json.loads((folder / "results/TOFU_EVAL.json").read_text())
    named = {
        *("forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio", "forget_quality"),
        *("retain_Q_A_Prob", "retain_Truth_Ratio", "ra_Q_A_Prob_normalised", "wf_Q_A_ROUGE"),
        *("model_utility", "extraction_strength", "exact_memorization", "privleak"),
        *("mia_loss", "mia_zlib", "mia_reference", "mia_min_k", "mia_min_k_plus_plus"),
        *("forget_kl_golden_to_model", "retain_kl_model_to_golden"),
    }
    assert named <= set(logs)
    for entry in logs.values():
        assert isinstance(entry["agg_value"], float)
    golden = json.loads((folder / "results/golden/TOFU_SUMMARY.json").read_text())
    assert (golden["forget_quality"], golden["privleak"]) == (1.0, 0.0)


def test_rows_of_one_s_own_and_what_they_lack(folder: Path) -> None:
    line = "evaluate --model model --data forget=forget.jsonl --data retain=retain.jsonl"
    done = run(f"{line} --output results --max-new-tokens 4 --no-generate")
    assert done.exit_code == 0, done.output
    assert "forget_Q_A_Prob" in done.output
    notes = " ".join(done.stderr.split())
    assert "not computed: forget_quality, for want of wrong answers" in notes
    assert "not computed: mia_min_k, for want of rows like those to forget" in notes
    assert (folder / "results/ROWS_EVAL.json").exists()
    other = run(f"{line} --output results --max-new-tokens 5 --no-generate")
    assert other.exit_code == 2
    assert "started with other settings: set forget" in other.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--data a=forget.jsonl --golden model", "--golden needs a folder for results"),
        (f"{NAMED}", "--benchmark needs a folder for results"),
        ("--output results", "--data names no set of rows"),
        ("", "--data names no set of rows"),
        (f"{NAMED} --data a=forget.jsonl --output results", "exclude each other"),
        ("--benchmark tofu:forget10 --output results", "pass --data-dir"),
        (f"{NAMED} --stop x --output results", "says itself how answers end"),
        ("--data a=forget.jsonl --output results --json x.json", "--json goes without --output"),
        ("--data a=forget.jsonl --output results --convention x", "convention must be one of"),
        ("--data a=forget.jsonl --output results --golden tofu", "neither a model nor results"),
        ("--data a=forget.jsonl --output results --golden nowhere", "loaded from 'nowhere'"),
        ("--data a=forget.jsonl --output forget.jsonl", "is not a directory"),
        ("--benchmark tofu:half --data-dir tofu --output results", "a split of TOFU"),
    ],
)
def test_wrong_input_is_told_before_anything_is_written(
    folder: Path, line: str, message: str
) -> None:
    done = run(f"evaluate --model model {line}")
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert not (folder / "results").exists()
