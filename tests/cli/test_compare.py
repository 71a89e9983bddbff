"""`unilogit compare` and `report`: from a plan to a page, also in two goes."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from tests.support.tiny_models import one_thread
from tests.unlearning.tiny_comparison import plan_content, write_inputs
from unilogit_kernels.cli.app import app
from unilogit_kernels.unlearning.comparison import cell, run, training
from unilogit_kernels.unlearning.comparison.cost import Peak
from unilogit_kernels.unlearning.comparison.report import page as page_module
from unilogit_kernels.unlearning.comparison.report.style import PAPER, panel

FEW = {"forget": "forget.jsonl", "retain": "retain.jsonl"}

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@contextmanager
def same_peak() -> Iterator[Peak]:
    yield Peak(2**30)


@contextmanager
def inputs(folder: Path) -> Iterator[Path]:
    """A base model, rows and a plan; what is measured of time and memory is always the same."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patched.setattr(training, "seconds", lambda: 0.0)
        patched.setattr(cell, "peak_of", same_peak)
        Path("plan.yaml").write_text(yaml.safe_dump(plan_content(write_inputs(folder))))
        yield folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with inputs(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with inputs(tmp_path_factory.mktemp("whole")) as made:
        done = command("compare plan.yaml --output out")
        assert done.exit_code == 0, done.output
        assert "2 of 2: npo-lr0.003-w1-seed1" in done.output
    torch.set_num_threads(threads)
    return made / "out"


def command(line: str) -> Result:
    return CliRunner().invoke(app, line.split())


def written(folder: str) -> dict[str, int]:
    """When each cell was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(folder, "cells").glob("*.json")}


def test_what_is_finished_is_not_repeated_and_the_report_is_the_same(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return cell.run_cell(*given)

    with monkeypatch.context() as patched:
        patched.setattr(run, "run_cell", interrupted)
        stopped = command("compare plan.yaml --output halves")
    assert stopped.exit_code == 130
    assert "goes on with the next cell" in stopped.output
    before = written("halves")
    assert len(before) == 2
    half = command("report halves")
    assert half.exit_code == 0, half.output
    assert "1 to be run" in Path("halves/report.html").read_text()

    rest = command("compare plan.yaml --output halves")
    assert rest.exit_code == 0, rest.output
    assert "2 of 3 cells are finished already" in rest.output
    after = written("halves")
    assert len(after) == 5
    assert {name: after[name] for name in before} == before
    assert Path("halves/report.html").read_bytes() == (whole / "report.html").read_bytes()


def test_the_page_needs_no_other_file_and_says_what_it_shows(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert "<h1>Two methods &amp; &lt;a tiny model&gt;</h1>" in page
    assert "<p>Nobody &lt;else&gt; was there.</p>" in page
    assert re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*|url\((?!#)[^)]*""", page) == []
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(ids)) == len(ids)
    pictures = sorted(path.stem for path in (whole / "figures").glob("*.png"))
    figures = re.findall(r'<div class="drawn" role="img" aria-label="([^"]+)"', page)
    assert len(figures) == len(pictures) == page.count("<figure>") == 19
    for section in (
        *("tradeoff", "table", "weights", "apart", "curves", "truth", "answers", "trials"),
        *("cost", "cells", "record"),
    ):
        assert f'<section id="{section}"' in page
    # The colours of both schemes reach the figures by their names alone.
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()
    assert "var(--s0)" in drawn


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Windows have a least width, which frames have not.
FRAME = """<!DOCTYPE html><title>frame</title>
<iframe src="page.html" width="{width}" height="3000" style="border: 0"></iframe>
<script>addEventListener("message", (told) => {{ document.title = told.data; }});</script>
"""
MEASURE = """
<script>
addEventListener("load", () => {
  const width = document.documentElement.clientWidth, found = [];
  const box = (e) => e.getBoundingClientRect();
  if (document.documentElement.scrollWidth > width) found.push("scrolls to the side");
  for (const figure of document.querySelectorAll("figure, .swatch")) {
    const { width: w, height: h } = box(figure.querySelector("svg"));
    if (w < 20 || h < 8) found.push(`a picture of ${w} x ${h}`);
  }
  for (const figure of document.querySelectorAll("figure")) {
    for (const text of figure.querySelectorAll("text")) {
      const { left, right } = box(text);
      if (left < 0 || right > width) found.push(`"${text.textContent}" from ${left} to ${right}`);
      if (text.textContent.trim() && box(text).height < 9) found.push("type too small");
    }
  }
  for (const e of document.querySelectorAll("h1, h2, h3, p, td, th, dd, dt, li, pre, summary")) {
    if (getComputedStyle(e).visibility === "visible" && box(e).right > width + 1
        && !e.closest("thead")) found.push(`${e.tagName}: ${e.textContent.trim()}`);
  }
  parent.postMessage("measured " + JSON.stringify({ width, found }), "*");
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the report in")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(whole: Path, tmp_path: Path, width: int) -> None:
    """No error, no clipped text, no scrolling to the side, and every figure has a size."""
    page = tmp_path / "page.html"
    page.write_text((whole / "report.html").read_text().replace("</body>", f"{MEASURE}</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    options += ["--hide-scrollbars", "--virtual-time-budget=10000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(
        [str(BROWSER), *options], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>measured (.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr
    assert json.loads(html.unescape(title[1])) == {"width": width, "found": []}


@pytest.mark.parametrize("name", ["a", "a method with a title as long as this one"])
def test_the_legend_of_a_picture_has_room(name: str) -> None:
    titles = [f"{name} {n}" for n in range(9)]
    summary = SimpleNamespace(methods=[SimpleNamespace(title=title) for title in titles])
    figure, _ = panel()
    page_module._add_legend(figure, summary, PAPER)  # type: ignore[arg-type]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == titles
    assert legend.get_window_extent().width <= figure.bbox.width


def test_a_cell_that_fails_is_a_row_with_its_error(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, "out")
    failed = Path("out/cells/npo-lr0.003-w1-seed1.json")
    failed.unlink()

    def failing(*given: Any) -> Any:
        raise ValueError("no luck <today>")

    with monkeypatch.context() as patched:
        patched.setattr(run, "run_cell", failing)
        done = command("compare plan.yaml --output out")
        assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "npo-lr0.003-w1-seed1 failed: ValueError: no luck <today>" in told
    page = Path("out/report.html").read_text()
    assert "no luck &lt;today&gt;" in page
    assert "4 finished, 1 failed" in page
    monkeypatch.setattr(page_module, "write_report", lambda folder: Path("drawn"))
    again = command("compare plan.yaml --output out")
    assert "2 of 2 cells are finished already" in again.output
    assert "error" in json.loads(failed.read_text())
    retried = command("compare plan.yaml --output out --retry")
    assert retried.exit_code == 0, retried.output
    assert failed.read_bytes() == (whole / "cells" / failed.name).read_bytes()


def test_another_plan_goes_on_where_all_that_cells_share_is_the_same(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_cell", lambda *given: {"error": "not meant to be run"})
    monkeypatch.setattr(page_module, "write_report", lambda folder: Path("drawn"))
    shutil.copytree(whole, "out")

    def go_on(**change: Any) -> Result:
        Path("plan.yaml").write_text(yaml.safe_dump(plan_content(write_inputs(folder), **change)))
        return command("compare plan.yaml --output out")

    assert "2 of 4 cells are finished already" in go_on(seeds=[0, 1, 2]).output
    other = go_on(unlearn={"steps": 9, "batch_size": 2, "warmup_steps": 0})
    assert other.exit_code == 2
    assert "with other unlearn.steps (8 -> 9), which all of its cells share" in " ".join(
        other.output.split()
    )
    changed = go_on(methods=[{"name": "npo", "label": "NPO", "parameters": {"beta": 9.0}}])
    assert "was run with other settings (parameters)" in " ".join(changed.output.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": []}, "methods must hold at least one"),
        ({"methods": ["anger"]}, "method must be one of"),
        ({"methods": ["task_vector"]}, "no step of matched forgetting"),
        ({"methods": ["dpo"]}, "needs refusals"),
        ({"methods": ["npo", "npo"]}, "two are called 'npo'"),
        ({"learning_rates": [0.0]}, "learning_rates must be positive, got 0.0"),
        ({"seeds": "none"}, "seeds must be a list, got 'none'"),
        ({"steps": 3}, "the plan has no 'steps'"),
        ({"data": {}}, "exactly one of made_up, benchmark and files, got none"),
        ({"data": {"files": {"forget": "forget.jsonl"}}}, "must name a file of the set 'retain'"),
        ({"data": {"made_up": {"sellers": 3}}}, "data.made_up: "),
        (
            {"data": {"files": FEW, "sets": ["x"]}},
            "data.sets: there is no set 'x'; there are forget, retain",
        ),
        ({"model": {}}, "model.base is what"),
        ({"model": {"base": "base", "cached": True}}, "model.cached needs train_layers"),
        ({"model": {"base": "nowhere"}}, "loaded from 'nowhere'"),
        ({"checks": {"every": 0}}, "checks.every must be at least 1, got 0"),
        ({"choose": {"by": ["retain.rouge"]}}, "choose.by must name sets"),
        ({"choose": {"by": ["friends.exact"]}}, "choose.by: there is no set 'friends'"),
        ({"robustness": {"bits": 1}}, "robustness.bits must be 0 or at least 2, got 1"),
    ],
)
def test_wrong_plans(folder: Path, change: dict[str, Any], message: str) -> None:
    plan = plan_content(FEW, **change)
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    done = command("compare plan.yaml --output out")
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert not Path("out/cells").exists()


def test_other_inputs_that_are_no_use(folder: Path) -> None:
    for line, message in (
        ("compare nothing.yaml --output out", "the plan nothing.yaml"),
        ("compare plan.yaml --output out --processes 0", "processes must be at least 1"),
        ("compare plan.yaml --output plan.yaml", "is not a directory"),
        ("report base", "base: holds no comparison"),
    ):
        done = command(line)
        assert done.exit_code == 2, done.output
        assert message in " ".join(done.output.split())
