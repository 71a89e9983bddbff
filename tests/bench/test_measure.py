"""What the harness measures: turns, rounds, halves of a step, peaks of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from tests.bench.shapes import LOGITS
from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.bench import compare, measure
from unilogit_kernels.bench.devices import Cpu
from unilogit_kernels.bench.measure import Measurement, Options
from unilogit_kernels.bench.peaks import peak_mib
from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.provider import OURS, Job, Provider

T = TypeVar("T")


class FakeDevice(Cpu):
    """Time is what the job says that it takes, in milliseconds."""

    clock = 0.0

    def time(self, run: Callable[[], T]) -> tuple[float, T]:
        before = FakeDevice.clock
        result = run()
        return FakeDevice.clock - before, result


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
