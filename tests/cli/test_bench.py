"""`unilogit bench`: shapes, modes and files that it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.bench.shapes import MINE, ROW
from unilogit_kernels.bench import report
from unilogit_kernels.cli.bench import bench


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """Run `unilogit bench` without measuring."""
    monkeypatch.setattr(report, "measure", lambda *_: [MINE, ROW])
    app = typer.Typer()
    app.command()(bench)
    return lambda line: CliRunner().invoke(app, line.split())


def test_the_command_chooses_shapes(run: Callable[[str], Result], tmp_path: Path) -> None:
    line = f"--suite models --dtype bfloat16 --head frozen --shape gemma --json {tmp_path}/a.json"
    result = run(line)
    assert result.exit_code == 0, result.output
    assert "1 of 1" in result.output
    assert "1.50x faster" in result.output
    (found,) = report.read(tmp_path / "a.json").results
    assert found.shape.title.startswith("Gemma-2 9B: linear 64 x 3,584 x 256,000 bfloat16, frozen")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".md", ".png"}
    (tmp_path / "a.md").unlink()
    assert run(f"--redraw --json {tmp_path}/a.json").exit_code == 0
    assert (tmp_path / "a.md").exists()


def test_the_command_takes_a_size_and_modes(run: Callable[[str], Result], tmp_path: Path) -> None:
    line = "--size 8,16,100 --dtype float32 --head trained --mode forward --mode backward"
    assert run(f"{line} --json {tmp_path}/a.json").exit_code == 0
    results = report.read(tmp_path / "a.json").results
    assert [r.title for r in results] == [
        "linear 8 x 16 x 100 float32, trained head, forward without gradients",
        "linear 8 x 16 x 100 float32, trained head, backward",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--device tpu", "must be 'cpu' or 'cuda'"),
        ("--suite all", "must be one of targets"),
        ("--mode twice", "must be one of forward"),
        ("--shape nothing", "no shape is left"),
        ("--size 5", "must be N,V or N,H,V"),
        ("--redraw", "needs an existing --json"),
        ("--redraw --json broken.json", "broken.json is no report"),
        ("--resume --json broken.json", "broken.json is no report"),
        ("--json broken.json/new.json", "is a file"),
        ("--seconds nan", "must be positive, got nan"),
    ],
)
def test_the_command_refuses(
    run: Callable[[str], Result],
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("broken.json").write_text('{"results": ')
    result = run(line)
    assert result.exit_code == 2
    assert message in result.output
