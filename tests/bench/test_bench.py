"""The harness: what it measures, what it refuses to call a speed-up, what it writes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner, Result

from unilogit_kernels import reference
from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.bench import compare, measure, peers, report
from unilogit_kernels.bench.devices import Cpu, Cuda, find_device
from unilogit_kernels.bench.measure import Measurement, Options
from unilogit_kernels.bench.oracle import Oracle
from unilogit_kernels.bench.peaks import peak_mib
from unilogit_kernels.bench.plots import swept_axis, write_plots
from unilogit_kernels.bench.problems import DTYPES, Problem, Shape
from unilogit_kernels.bench.provider import OURS, Job, Provider
from unilogit_kernels.bench.providers import providers
from unilogit_kernels.bench.suites import SUITES
from unilogit_kernels.cli.bench import bench
from unilogit_kernels.testing import FLOAT32_ROUNDINGS, TYPICAL_FACTOR

T = TypeVar("T")

LOGITS = Shape(6, 700, "float32")
LINEAR = Shape(6, 700, "bfloat16", 16)
SHAPES = [
    LOGITS,
    LINEAR,
    replace(LINEAR, frozen_head=True),
    replace(LINEAR, dtype="float32", softcap=30.0),
]
ROW = Measurement("other", "unilogit", "both", [2.0, 4.0, 3.0], 1.5, 1e-3, 1e-2, 12.3)
MINE = replace(ROW, provider=OURS["unilogit"], relative_to_ours=1.0)


class FakeDevice(Cpu):
    """Time is what the job says that it takes, in milliseconds."""

    clock = 0.0

    def time(self, run: Callable[[], T]) -> tuple[float, T]:
        before = FakeDevice.clock
        result = run()
        return FakeDevice.clock - before, result


# ---- providers and the oracle ------------------------------------------------------------------


PLAIN = {"unilogit": "eager Unilogit", "cross_entropy": "F.cross_entropy"}


def assert_near(
    oracle: Oracle,
    problem: Problem,
    provider: Provider,
    loss: Tensor | None,
    gradients: list[Tensor] | None = None,
) -> None:
    """Within the error budget of plain torch's provider, by the oracle's measures."""
    assert loss is not None
    by_name = {p.name: p for p in providers(provider.entry)}
    job = by_name[PLAIN[provider.loss]].prepare(problem)
    plain_loss = job.forward()
    assert plain_loss is not None
    plain_gradients = job.backward(plain_loss)
    assert plain_gradients is not None
    roundings = torch.finfo(DTYPES[problem.shape.dtype]).eps
    roundings += FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps
    error, plain = (oracle.loss_error(provider.loss, x.item()) for x in (loss, plain_loss))
    # A loss is a sum of terms of order 1, however small it is.
    scale = max(1.0, 1 / oracle.losses[provider.loss])
    assert error <= TYPICAL_FACTOR * plain + scale * roundings, provider.name
    if gradients is not None:
        error, plain = (
            oracle.gradient_error(provider.loss, x) for x in (gradients, plain_gradients)
        )
        assert error <= TYPICAL_FACTOR * plain + roundings, provider.name


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.title)
def test_every_provider_computes_its_loss(shape: Shape) -> None:
    """Each one that runs here is as accurate as plain torch at the loss that it claims."""
    problem = Problem(shape)
    oracle = Oracle(problem)
    ran = set()
    for provider in providers(shape.entry):
        if provider.unavailable(shape, "cpu") is not None or provider.compiles:
            continue
        job = provider.prepare(problem)
        loss = job.forward()
        gradients = job.backward(loss)
        ran.add(provider.loss)
        if provider.loss == "floor":
            assert loss is None
            assert gradients is None
            continue
        assert loss is not None
        assert gradients is not None
        assert_near(oracle, problem, provider, loss, gradients)
    assert ran == {"unilogit", "cross_entropy", "floor"}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.title)
@pytest.mark.parametrize("block", [1 << 21, 701])
def test_oracle_is_the_literal_definition(
    shape: Shape, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unilogit_kernels.bench.oracle._BLOCK_ELEMENTS", block)
    problem = Problem(shape)
    oracle = Oracle(problem)
    operands = [x.detach().double().requires_grad_(x.requires_grad) for x in problem.operands]
    trained = [x for x in operands if x.requires_grad]
    logits = operands[0] if shape.h is None else operands[0] @ operands[1].t()
    unilogit = reference.unilogit_loss(logits, problem.labels, softcap=shape.softcap)
    capped = reference.transform_logits(logits, softcap=shape.softcap)
    cross_entropy = torch.nn.functional.cross_entropy(capped, problem.labels)
    for name, loss in (("unilogit", unilogit), ("cross_entropy", cross_entropy)):
        gradients = list(torch.autograd.grad(loss, trained, retain_graph=True))
        assert oracle.loss_error(name, loss.item()) < 1e-12
        assert oracle.gradient_error(name, gradients) < 1e-12
        gradients[-1][0] += 0.1 * gradients[-1].norm()
        assert oracle.gradient_error(name, gradients) > 0.05


def test_oracle_samples_rows_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unilogit_kernels.bench.oracle._WEIGHT_ELEMENTS", 2 * 16 * 100)
    problem = Problem(replace(LINEAR, dtype="float32"))
    oracle = Oracle(problem)
    rows = oracle.weight_rows
    assert set(problem.labels.tolist()) <= set(rows.tolist())
    assert len(rows) <= 100
    ours = providers("linear")[0]
    job = ours.prepare(problem)
    loss = job.forward()
    gradients = job.backward(loss)
    assert gradients is not None
    assert_near(oracle, problem, ours, loss, gradients)
    gradients[1][rows[3]] += 1
    assert oracle.gradient_error("unilogit", gradients) > 0.5


def test_those_that_cannot_run_say_why() -> None:
    capped = replace(LINEAR, softcap=30.0)
    found = {
        p.name: p.unavailable(capped, "cpu") for e in ("logits", "linear") for p in providers(e)
    }
    assert found["Liger fused linear"] == "its kernels need a GPU"
    assert found["cut_cross_entropy (cce), through nll"] == "its kernels need a GPU"
    assert found["quack chunked"] == "has no softcap"
    assert found["F.linear_cross_entropy, auto"] == "has no softcap"
    assert found[OURS["unilogit"]] is None
    assert peers._needs("no_such_package")(LINEAR, "cuda") == (
        "the package no_such_package is not installed"
    )


def test_a_newer_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    needs = peers._needs("torch", gpu=True, capability=(9, 0))
    assert needs(LINEAR, "cuda") == "needs compute capability 9.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert needs(LINEAR, "cuda") is None


def test_liger_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger overwrites its input; the problem must survive, and the first result be right."""

    def overwriting(logits: Tensor, labels: Tensor, *, reduction: str, softcap: None) -> Tensor:
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)
        logits.detach().zero_()
        return nll

    module = SimpleNamespace(liger_cross_entropy=overwriting)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    problem = Problem(LOGITS)
    before = problem.operands[0].detach().clone()
    provider = next(p for p in providers("logits") if p.name == "Liger, through nll")
    loss = provider.prepare(problem).forward()
    assert_near(Oracle(problem), problem, provider, loss)
    assert torch.equal(problem.operands[0], before)


# ---- measuring ---------------------------------------------------------------------------------


def _fake(
    name: str,
    order: list[str],
    milliseconds: float = 1.0,
    loss: str = "floor",
    error: bool = False,
    **options: Any,
) -> Provider:
    def prepare(problem: Problem) -> Job:
        if error:
            raise RuntimeError("no such device\nand more")

        def backward(_: Tensor | None) -> None:
            order.append(name)
            FakeDevice.clock += milliseconds

        return Job(lambda: None, backward)

    return Provider(name, "logits", loss, prepare, **options)


def _measure(
    everybody: list[Provider], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, Measurement]:
    monkeypatch.setattr(measure, "providers", lambda entry: everybody)
    options = {"memory": "none", "rounds": 3, **options}
    found = measure.measure(LOGITS, FakeDevice(), Options(**options))
    return {m.provider: m for m in found}


def test_measuring_alternates_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ours = OURS["unilogit"]
    names = [_fake(ours, order, 1000), _fake("b", order, 2500), _fake("x", order, error=True)]
    found = _measure(names, monkeypatch)
    assert order == [ours, "b"] * 4
    assert [len(m.milliseconds) for m in found.values()] == [3, 3, 0]
    assert found["b"].relative_to_ours == 2.5
    assert found["x"].missing == "RuntimeError: no such device"


def test_a_peer_is_compared_with_ours_for_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    everybody = [
        _fake(OURS["unilogit"], order, 1000),
        _fake(OURS["cross_entropy"], order, 500, loss="cross_entropy"),
        _fake("peer", order, 1000, loss="cross_entropy"),
        _fake("bound", order, 800),
    ]
    found = _measure(everybody, monkeypatch)
    assert found["peer"].relative_to_ours == 2.0
    assert found["bound"].relative_to_ours == 0.8


def test_fast_steps_get_more_rounds_and_slow_ones_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ours = OURS["unilogit"]
    fast = _measure([_fake(ours, order, 10), _fake("b", order, 30)], monkeypatch)
    assert len(fast["b"].milliseconds) == 50
    slow = _measure([_fake(ours, order, 10), _fake("b", order, 6000)], monkeypatch, rounds=7)
    assert len(slow[ours].milliseconds) == 7
    assert len(slow["b"].milliseconds) == 3
    late = _measure([_fake(ours, order), _fake("b", order)], monkeypatch, rounds=7, seconds=0)
    assert [len(m.milliseconds) for m in late.values()] == [3, 1]


def test_only_a_very_slow_first_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.0)
    order: list[str] = []
    found = _measure([_fake(OURS["unilogit"], order)], monkeypatch, rounds=7)
    assert len(found[OURS["unilogit"]].milliseconds) == len(order) - 1 == 3
    monkeypatch.setattr(measure, "VERY_SLOW_SECONDS", 0.0)
    order.clear()
    found = _measure([_fake(OURS["unilogit"], order)], monkeypatch, rounds=7)
    assert len(found[OURS["unilogit"]].milliseconds) == len(order) == 1


def test_a_peer_that_would_take_too_long_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PROBES", ((3, 0.0),))
    order: list[str] = []
    ours = OURS["unilogit"]
    names = [_fake(ours, order), _fake("b", order, loss="unilogit")]
    found = _measure(names, monkeypatch)
    assert order.count("b") == 1
    assert found["b"].missing == "too slow: 0.0 s a step for 2 of the 6 tokens"
    assert found[ours].missing is None


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDevice, "free_bytes", lambda self: 2**20)
    order: list[str] = []
    names = [_fake(OURS["unilogit"], order), _fake("b", order, logits_copies=100)]
    found = _measure(names, monkeypatch)
    assert found[OURS["unilogit"]].missing is None
    assert "does not fit: about 0.0 GiB more" in str(found["b"].missing)
    monkeypatch.setattr(FakeDevice, "free_bytes", lambda self: 10)
    order.clear()
    assert all("does not fit" in str(m.missing) for m in _measure(names, monkeypatch).values())
    assert order == []


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_halves_of_a_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(problem: Problem) -> Job:
        def forward() -> Tensor:
            FakeDevice.clock += 3 if torch.is_grad_enabled() else 2
            return torch.zeros(())

        def backward(_: Tensor | None) -> None:
            FakeDevice.clock += 7

        return Job(forward, backward)

    ours = Provider(OURS["unilogit"], "logits", "floor", prepare)
    whole = Provider("bound", "logits", "floor", prepare, modes=("both",))
    found = _measure([ours, whole], monkeypatch, mode=mode)
    assert list(found) == [OURS["unilogit"]]
    assert found[OURS["unilogit"]].median == {"forward": 2, "backward": 7}[mode]


def test_peak_memory_sees_what_a_step_holds() -> None:
    shape = Shape(64, 100_000, "float32")
    problem_bytes = 64 * 100_000 * 4 / 2**20

    def holding(copies: int) -> Provider:
        def prepare(problem: Problem) -> Job:
            def forward() -> Tensor:
                return torch.ones(copies + 1, *problem.operands[0].shape).sum()

            return Job(forward, lambda _: [])

        return Provider("x", "logits", "unilogit", prepare)

    few, many = (peak_mib(shape, Cpu(), "both", holding(k)) for k in (1, 5))
    assert many - few == pytest.approx(4 * problem_bytes, rel=0.1)


def test_memory_kept_from_the_first_step_hides_no_peak() -> None:
    shape = Shape(64, 100_000, "float32")

    def prepare(problem: Problem) -> Job:
        def backward(_: Tensor | None) -> None:
            allocate((shape.n, shape.vocab_size), torch.float32, torch.device("cpu")).fill_(1)

        return Job(lambda: None, backward)

    peak = peak_mib(shape, Cpu(), "both", Provider("x", "logits", "unilogit", prepare))
    assert peak == pytest.approx(0, abs=0.3 * shape.gradient_bytes / 2**20)


def test_peak_of_a_fresh_process() -> None:
    """Through the whole path, for one provider."""
    names = Options(rounds=1, memory="ours", only=("copy into existing",))
    found = measure.measure(Shape(64, 40_000, "float32"), Cpu(), names)
    peaks = [m.peak_mib for m in found if compare.is_ours(m)]
    assert len(peaks) == 2
    assert all(peak is not None and abs(peak) < 20 for peak in peaks)
    assert found[-1].peak_mib is None


# ---- devices -----------------------------------------------------------------------------------


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 'cpu' or 'cuda', got 'tpu'"):
        find_device("tpu")
    with pytest.raises(ValueError, match="no GPU is available"):
        find_device("cuda")


def test_cuda_times_events_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 1.25

    class Buffer:
        def zero_(self) -> None:
            log.append("flush")

    properties = SimpleNamespace(
        L2_cache_size=100, name="GPU", major=9, minor=0, multi_processor_count=132, uuid="u-1"
    )
    sizes: list[int] = []

    def empty(size: int, **_: Any) -> Buffer:
        sizes.append(size)
        return Buffer()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    device = Cuda()
    assert sizes == [200]
    assert device.time(lambda: log.append("run") or 5) == (1.25, 5)  # type: ignore[func-returns-value]
    assert log == ["flush", "record", "run", "record", "wait"]

    def smi(query: list[str], **_: Any) -> SimpleNamespace:
        assert "--id=GPU-u-1" in query
        return SimpleNamespace(
            stdout="580.1, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 41\n"
        )

    monkeypatch.setattr(subprocess, "run", smi)
    facts = device.facts()
    assert facts["clocks.sm"] == "1980 MHz"
    assert facts["capability"] == "9.0"

    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert "unknown" in device.facts()["clocks"]


def test_cuda_peaks_are_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    device = object.__new__(Cuda)
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 100,
        "max_memory_allocated": 150,
        "memory_reserved": 400,
        "mem_get_info": (1000, 2000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert device.start_peak() == 100
    assert device.peak() == 150
    assert device.free_bytes() == 1300


# ---- comparing and reporting -------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("shapes", "axis"),
    [
        ([replace(LINEAR, n=n) for n in (1, 2, 4)], "n"),
        ([replace(LINEAR, vocab_size=v) for v in (100, 200, 300)], "vocab_size"),
        ([replace(LINEAR, h=h, n=h) for h in (16, 32, 64)], None),
        ([replace(LINEAR, n=n) for n in (1, 2)], None),
    ],
)
def test_plots(shapes: list[Shape], axis: str | None, tmp_path: Path) -> None:
    assert swept_axis(shapes) == axis
    (path,) = write_plots(_report(shapes), tmp_path / "plot")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_entries_are_not_drawn_into_one_plot(tmp_path: Path) -> None:
    written = write_plots(_report([LOGITS, LINEAR]), tmp_path / "plot")
    assert [path.name for path in written] == ["plot-logits-both.png", "plot-linear-both.png"]


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


# ---- the command -------------------------------------------------------------------------------


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
