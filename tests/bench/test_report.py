"""What the harness refuses to call a speed-up, and what it writes."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bench.shapes import LINEAR, LOGITS, MINE, ROW
from unilogit_kernels.bench import compare, report
from unilogit_kernels.bench.devices import Cpu
from unilogit_kernels.bench.measure import Measurement, Options
from unilogit_kernels.bench.plots import swept_axis
from unilogit_kernels.bench.problems import Shape
from unilogit_kernels.bench.suites import SUITES


@pytest.mark.parametrize(
    ("other", "cell", "ratio"),
    [
        (ROW, "1.50x faster", 1.5),
        (replace(ROW, relative_to_ours=0.8), "1.25x slower", 0.8),
        (replace(ROW, loss="floor", relative_to_ours=0.8), "1.25x this bound", None),
        (
            replace(ROW, gradient_error=1e-4),
            "not compared: gradient error 1.0e-02 here, 1.0e-04 there",
            None,
        ),
        (
            replace(ROW, loss_error=1e-5),
            "not compared: loss error 1.0e-03 here, 1.0e-05 there",
            None,
        ),
        (replace(ROW, gradient_error=float("nan")), "its gradient is wrong: error nan", None),
        (replace(ROW, loss_error=0.7), "its loss is wrong: error 7.0e-01", None),
        (replace(ROW, missing="not installed", milliseconds=[]), "not installed", None),
    ],
)
def test_no_speed_up_without_comparable_errors(
    other: Measurement, cell: str, ratio: float | None
) -> None:
    mine, theirs = report.rows([MINE, other])
    assert cell in theirs[5]
    assert mine[5] == ""
    if other.missing is None:
        assert compare.speed_up(MINE, other) == ratio


def test_roundings_of_float32_are_no_difference() -> None:
    exact = replace(ROW, loss_error=1e-9, gradient_error=1e-9)
    mine = replace(MINE, loss_error=5e-7, gradient_error=5e-7)
    assert compare.why_incomparable(mine, exact) is None


def test_forward_alone_is_judged_by_its_loss() -> None:
    mine, other = (replace(m, mode="forward") for m in (MINE, ROW))
    assert compare.speed_up(mine, replace(other, gradient_error=1e-9)) == 1.5
    assert compare.speed_up(mine, replace(other, loss_error=1e-9)) is None


def test_the_fastest_peer_is_right_and_no_bound() -> None:
    fast = replace(ROW, provider="wrong", milliseconds=[0.1], gradient_error=2.0)
    bound = replace(ROW, provider="copy", loss="floor", milliseconds=[0.1])
    found = compare.fastest_peer([MINE, fast, bound, ROW])
    assert found is ROW
    assert compare.fastest_peer([MINE]) is None


def _report(shapes: list[Shape]) -> report.Report:
    bound = replace(ROW, provider="copy", loss="floor", relative_to_ours=0.5, peak_mib=None)
    eager = replace(ROW, provider="eager Unilogit", peak_mib=-1.0)
    gone = Measurement("Liger", "cross_entropy", missing="its kernels need a GPU")
    results = [report.Result(s, "both", 1.0, [MINE, eager, gone, bound]) for s in shapes]
    return report.Report({"processor": "this one"}, "unilogit bench", results)


def test_everything_is_written_and_read_again(tmp_path: Path) -> None:
    written = _report([LOGITS, LINEAR])
    path = tmp_path / "deep" / "out.json"
    report.write(written, path)
    assert report.read(path) == written
    with path.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    assert lines[1]["provider"] == "eager Unilogit"
    assert float(lines[1]["speed_up"]) == 1.5
    assert lines[2]["missing"] == "its kernels need a GPU"
    assert lines[3]["speed_up"] == ""
    text = path.with_suffix(".md").read_text()
    assert "## logits 6 x 700 float32, forward and backward" in text
    assert "| eager Unilogit | unilogit | 3 | 2 - 4 | 3 | 1.50x faster |" in text
    summary = next(line for line in text.splitlines() if line.startswith("| logits"))
    assert summary == (
        "| logits 6 x 700 float32, forward and backward | 3 | 2.00x | 1.50x |  | "
        "eager Unilogit (unilogit) | 1.50x | 12 | 0 | 1.0e-02 | 1.0e-02 |"
    )


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    measured: list[Shape] = []

    def fake(shape: Shape, device: object, options: Options, *_: object) -> list[Measurement]:
        if len(measured) == 1 and shape == LINEAR:
            raise KeyboardInterrupt
        measured.append(shape)
        return [MINE]

    monkeypatch.setattr(report, "measure", fake)
    common: dict[str, Any] = {"console": Console(quiet=True), "path": path}
    with pytest.raises(KeyboardInterrupt):
        report.run([LOGITS, LINEAR], Cpu(), [Options()], **common)
    measured.append(LOGITS)
    found = report.run([LOGITS, LINEAR], Cpu(), [Options()], resume=True, **common)
    assert measured == [LOGITS, LOGITS, LINEAR]
    assert [result.shape for result in found.results] == [LOGITS, LINEAR]
    assert len(json.loads(path.read_text())["results"]) == 2


def test_suites() -> None:
    for name, suite in SUITES.items():
        for device in ("cpu", "cuda"):
            shapes = suite(device)
            assert len(set(shapes)) == len(shapes), name
            assert len({shape.title for shape in shapes}) == len(shapes), name
    titles = " ".join(shape.title for shape in SUITES["models"]("cuda"))
    assert "Gemma-2 9B: linear 8,192 x 3,584 x 256,000 bfloat16, frozen head, softcap 30" in titles
    for axis, name in (("n", "sweep-n"), ("vocab_size", "sweep-v"), ("h", "sweep-h")):
        shapes = [s for s in SUITES[name]("cpu") if s.dtype == "float32"]
        assert swept_axis(shapes) == axis
