"""The harness: what it compares, what it refuses to call a speed-up, what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from unilogit_kernels.bench import report
from unilogit_kernels.bench.measure import Measurement, measure, peak_beyond_inputs_and_gradients
from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.providers import OURS, Provider, providers

LOGITS = Shape(6, 700, "float32")
LINEAR = Shape(6, 700, "bfloat16", 16)
ROW = Measurement("other", "unilogit", [2.0, 4.0, 3.0], 1.5, 1e-3, 1e-2, 12.3)


@pytest.mark.parametrize("shape", [LOGITS, LINEAR, replace(LINEAR, frozen_head=True)])
def test_every_provider_computes_its_loss(shape: Shape) -> None:
    """Each one that runs here is close to the float64 result of the loss that it claims."""
    problem = Problem(shape)
    for provider in providers(shape.entry):
        if provider.missing() is not None or provider.name.startswith("compiled"):
            continue
        result = provider.prepare(problem)()
        if provider.loss == "floor":
            assert result is None
            continue
        assert result is not None
        loss, gradients = result
        exact_loss, exact_gradients = problem.exact[provider.loss]
        tolerance = 0.05 if shape.dtype == "bfloat16" else 1e-3
        assert loss.item() == pytest.approx(exact_loss.item(), rel=tolerance)
        for ours, exact in zip(gradients, exact_gradients, strict=True):
            assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def test_measure_alternates_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def fake(name: str, error: bool = False) -> Provider:
        def prepare(problem: Problem):  # type: ignore[no-untyped-def]
            if error:
                raise RuntimeError("no such device\nand more")

            def step() -> None:
                order.append(name)

            return step

        return Provider(name, "logits", "floor", prepare)

    everybody = [fake(OURS), fake("b"), fake("broken", error=True)]
    monkeypatch.setattr("unilogit_kernels.bench.measure.providers", lambda entry: everybody)
    results = measure(LOGITS, rounds=3, memory=False)
    assert order == [OURS, "b"] + [OURS, "b"] * 3
    assert [len(m.milliseconds) for m in results] == [3, 3, 0]
    assert results[2].missing == "RuntimeError: no such device"


def test_peak_memory_sees_what_a_step_holds() -> None:
    shape = Shape(64, 100_000, "float32")
    problem_bytes = 64 * 100_000 * 4 / 2**20

    def holding(copies: int) -> Provider:
        def prepare(problem: Problem):  # type: ignore[no-untyped-def]
            return lambda: (torch.ones(copies + 1, *problem.operands[0].shape).sum(), [])

        return Provider("x", "logits", "unilogit", prepare)

    few, many = (peak_beyond_inputs_and_gradients(shape, holding(k)) for k in (1, 5))
    assert many - few == pytest.approx(4 * problem_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("other", "cell"),
    [
        (ROW, "1.50x"),
        (replace(ROW, loss="floor", gradient_error=None), "(1.50x)"),
        (replace(ROW, gradient_error=1e-4), "(1.50x)"),
        (replace(ROW, missing="not installed", milliseconds=[]), "not installed"),
    ],
)
def test_no_speed_up_without_comparable_errors(other: Measurement, cell: str) -> None:
    ours = replace(ROW, provider=OURS, relative_to_ours=1.0)
    rows = report.rows([ours, other])
    assert cell in rows[1]
    assert rows[0][4] == ""


def test_report_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    console = Console(quiet=True)
    written = report.run([LOGITS], rounds=2, memory=False, console=console)
    report.write(written, tmp_path / "deep" / "out.json")
    again = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert again["results"][0]["shape"]["vocab_size"] == 700
    assert again["machine"]["torch"] == torch.__version__
    text = (tmp_path / "deep" / "out.md").read_text()
    assert "## logits 6 x 700 float32" in text
    assert OURS in text
