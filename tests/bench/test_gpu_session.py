"""A session on a GPU: it stops in time, loses nothing, and runs through on a CPU."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_session import summary, tuning
from benchmarks.gpu_session.__main__ import LEDGER, stages
from benchmarks.gpu_session.cases import Missing, in_order_of_value
from benchmarks.gpu_session.ledger import CUT, FAILED, LOST, OK, ROWS, STARTED, Ledger, read
from benchmarks.gpu_session.profiling import read_counters
from benchmarks.gpu_session.search import search
from benchmarks.gpu_session.session import START, Message, Session, Stage
from benchmarks.gpu_session.timeline import Event, describe
from tests.support import ROOT
from unilogit_kernels import explain_plan
from unilogit_kernels.bench.measure import Measurement
from unilogit_kernels.fused_linear import plan
from unilogit_kernels.fused_linear.plan import Plan

# ---- the clock ---------------------------------------------------------------------------------

START_TAKES, KILL_TAKES = 5.0, 0.5
"""Seconds that a process takes to start, and to be killed."""
CRASHES = -1.0
NAMES = [stage.name for stage in stages()]
Seconds = dict[str, float]
"""Of each case of a stage: `inf` hangs, `CRASHES` takes its process with it."""


MEASURED = Measurement("somebody", "unilogit", "both", [2.0, 1.0], loss_error=1e-7)
ROW = {**asdict(MEASURED), "settings": {"lanes": 8}, "ms": 1.0}
"""Part of what any stage may have found so far."""


class FakeCrew:
    """Workers of a made-up clock, which jumps to whatever happens next."""

    def __init__(self, cases: dict[str, Seconds], silent: Sequence[str] = ()) -> None:
        self.cases, self.silent = cases, silent
        self.clock = 0.0
        self.sent: list[str] = []
        self._stages: dict[int, str] = {}
        self._events: list[tuple[float, int, Message]] = []
        self._count = itertools.count(1)

    def now(self) -> float:
        return self.clock

    def start(self, stage: str, seconds: float) -> int:
        worker = next(self._count)
        self._stages[worker] = stage
        if stage not in self.silent:
            self._later(START_TAKES, worker, "cases", [(name, 60.0) for name in self.cases[stage]])
        return worker

    def send(self, worker: int, case: str) -> None:
        self.sent.append(case)
        seconds = self.cases[self._stages[worker]][case]
        if seconds == CRASHES:
            self._later(1.0, worker, "gone", "its process died of SIGSEGV")
        elif seconds < math.inf:
            self._later(seconds / 2, worker, "rows", [ROW])
            self._later(seconds, worker, "result", {"status": OK, "data": {}})

    def receive(self, timeout: float) -> Message | None:
        assert timeout >= 0
        while self._events and self._events[0][0] <= self.clock + timeout:
            at, _, message = heapq.heappop(self._events)
            if message.worker in self._stages:
                timeout -= at - self.clock
                self.clock = at
                return message
        self.clock += timeout
        return None

    def stop(self, worker: int) -> None:
        self.clock += KILL_TAKES
        del self._stages[worker]

    def _later(self, seconds: float, worker: int, kind: str, body: Any) -> None:
        event = (self.clock + seconds, next(self._count), Message(worker, kind, body))
        heapq.heappush(self._events, event)


def run(path: Path, crew: FakeCrew, seconds: float, of: Sequence[Stage] = ()) -> Ledger:
    ledger = Ledger(path)
    summaries: list[float] = []

    def after_stage() -> None:
        summary.write(ledger, path.parent, minutes=seconds / 60, rehearsal=True)
        summaries.append(crew.now())

    crew.clock = start = 100.0
    Session(of or stages(), crew, ledger, seconds, after_stage).run()
    assert crew.now() <= start + seconds
    assert len(summaries) >= len(of or stages())
    assert (path.parent / summary.MARKDOWN).exists()
    return ledger


def quick() -> dict[str, Seconds]:
    return {name: {f"{name} {i}": 3.0 for i in range(6)} for name in NAMES}


@pytest.mark.parametrize("seconds", [60.0, 480.0])
@pytest.mark.parametrize("trouble", ["hangs", "is slow", "never starts", "crashes"])
@pytest.mark.parametrize("where", NAMES)
def test_it_stops_in_time_whatever_happens(
    tmp_path: Path, where: str, trouble: str, seconds: float
) -> None:
    cases = quick()
    every = {"hangs": math.inf, "is slow": 59.0, "crashes": CRASHES}.get(trouble, 3.0)
    cases[where] = dict.fromkeys([f"{where} {i}" for i in range(40)], every)
    crew = FakeCrew(cases, [where] if trouble == "never starts" else [])
    ledger = run(tmp_path / LEDGER, crew, seconds)
    if seconds > 400:  # the others have their share, however bad one of them is
        for name in NAMES:
            if name != where:
                assert Counter(r["status"] for r in ledger.last(name).values()) == {OK: 6}
        found = {record["status"] for record in ledger.last(where).values()}
        expected = {"hangs": {LOST}, "crashes": {LOST}, "is slow": {OK}, "never starts": {FAILED}}
        assert found - {ROWS} == expected[trouble]


def test_a_hang_costs_its_own_case_alone(tmp_path: Path) -> None:
    crew = FakeCrew({"one": {"good": 3.0, "bad": math.inf, "worse": CRASHES, "better": 3.0}})
    ledger = run(tmp_path / LEDGER, crew, 300.0, [Stage("one", 1)])
    statuses = {case: record["status"] for case, record in ledger.last("one").items()}
    assert statuses == {"good": OK, "bad": LOST, "worse": LOST, "better": OK}
    assert "too long" in ledger.last("one")["bad"]["why"]
    assert "SIGSEGV" in ledger.last("one")["worse"]["why"]


def test_what_is_cut_keeps_its_rows_and_is_tried_again(tmp_path: Path) -> None:
    """The first share of `one` is too short for its case; what others leave is enough."""
    crew = FakeCrew({"one": {"long": 50.0}, "two": {"short": 1.0}})
    of = [Stage("one", 1), Stage("two", 2)]
    ledger = run(tmp_path / LEDGER, crew, 140.0, of)
    statuses = [r["status"] for r in ledger.records if r["case"] == "long"]
    assert statuses == [STARTED, ROWS, CUT, STARTED, ROWS, OK]
    assert ledger.last("one")["long"]["rows"] == [ROW]


def test_workers_share_a_stage(tmp_path: Path) -> None:
    cases = {"one": {str(i): 10.0 for i in range(40)}}
    crew = FakeCrew(cases)
    ledger = run(tmp_path / LEDGER, crew, 100.0, [Stage("one", 1, workers=8)])
    assert len(ledger.ended("one")) == 40
    assert sorted(crew.sent) == sorted(cases["one"])


# ---- what is known -----------------------------------------------------------------------------


def test_what_is_known_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    first = FakeCrew(quick())
    run(path, first, 60.0)
    with path.open("a") as file:
        file.write('{"stage": "right", "case": "half a li')
    second = FakeCrew(quick())
    ledger = run(path, second, 480.0)
    assert len(first.sent) > 3
    assert len(second.sent) < 6 * len(NAMES)
    assert all(len(ledger.ended(name) - {START}) == 6 for name in NAMES)


def test_a_case_that_ends_the_session_twice_is_to_blame(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    for attempt in range(3):
        ledger = Ledger(path)
        assert ledger.ended("one") == ({"bad"} if attempt == 2 else set())
        ledger.append("one", "bad", STARTED)
    assert ledger.last("one")["bad"]["status"] == LOST


# ---- what stages are made of -------------------------------------------------------------------


def test_values_come_first_then_pairs() -> None:
    parameters = {"a": (1, 2, 3), "b": (True, False), "c": tuple("wxyz")}
    first, pairs, rest = in_order_of_value(parameters)
    assert len(first) + len(pairs) + len(rest) == 24
    for name, values in parameters.items():
        assert {each[name] for each in first} == set(values)
    for one, other in itertools.combinations(parameters, 2):
        met = {(each[one], each[other]) for each in [*first, *pairs]}
        assert met == set(itertools.product(parameters[one], parameters[other]))
    assert len(first) <= 6


def test_gains_are_added_up_as_long_as_they_help() -> None:
    """`a` and `b` gain alone and together; `c` gains alone, and spoils them; `d` fails."""
    noted: list[int] = []

    def milliseconds(settings: dict[str, Any]) -> float:
        if settings.get("d"):
            raise RuntimeError("out of registers")
        a, b, c = (settings.get(name, 0) for name in "abc")
        return float(10.0 - a - b - (3.0 if c and not (a or b) else -2.0 * c))

    knobs = {"a": (1, 4), "b": (2,), "c": (1,), "d": (1,)}
    found = search(knobs, milliseconds, lambda rows: noted.append(len(rows)))
    assert found["settings"] == {"a": 4, "b": 2}
    assert (found["today"], found["best"]) == (10.0, 4.0)
    assert noted == list(range(1, len(found["rows"]) + 1))
    assert any("registers" in row.get("error", "") for row in found["rows"])


def test_settings_are_tried_and_taken_back() -> None:
    from unilogit_kernels.backends import gpu
    from unilogit_kernels.backends.triton import log_odds, settings

    def now() -> tuple[Any, ...]:
        sweep = gpu.sweep_size(1 << 18, 132, 50 << 20, smallest=4, resident=32)
        return settings.current_settings(), sweep, log_odds.LARGEST_TILE

    known = replace(settings.TABLE["cuda:90"])
    with tuning.replaced(settings, "current_settings", lambda: known):
        before = now()
        changes = {"lanes": 8, "maxnreg": None, "sweep_warps": 8, "LARGEST_TILE": 4096}
        with tuning.launch_settings(changes):
            changed, sweep, largest = now()
            assert (changed.lanes, changed.capped_lanes, changed.options) == (8, 8, {})
            assert (sweep, largest) == (8, 4096)
        assert now() == before
        with pytest.raises(Missing, match="NO_SUCH"), tuning.launch_settings({"NO_SUCH": 1}):
            pass


def test_sizes_of_the_plan_are_tried_and_taken_back() -> None:
    def now() -> Plan:
        return explain_plan(2048, 3584, 262_144).plan

    before = now()
    for name, value in (("TILE_BYTES", 64 << 20), ("SAVED_PARTS", 4)):
        with tuning.plan_sizes({name: value}):
            assert (now() != before) == (name == "TILE_BYTES")
            size = getattr(plan, name)
            assert (size["cuda"] if isinstance(size, dict) else size) == value
        assert now() == before


def test_a_timeline() -> None:
    """Two steps of a long kernel, a gap of 10 µs, and two kernels of which one runs inside."""
    step = [Event("long", 0, 100), Event("short", 110, 130), Event("short", 112, 120)]
    again = [Event(e.name, e.start + 131, e.end + 131) for e in step]
    found = describe([*again, *step], 2)
    assert (found["busy_us"], found["span_us"], found["launches"]) == (120.0, 130.5, 3.0)
    assert (found["gaps"], found["gaps_us"], found["longest_gap_us"]) == (1.0, 10.0, 10.0)
    assert [kernel["name"] for kernel in found["kernels"]] == ["long", "short"]
    assert found["kernels"][1]["calls"] == 2.0


def test_hardware_counters_are_read() -> None:
    text = "\n".join(
        [
            "==PROF== Connected to process 7",
            '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
            '"0","7","sweep","dram__bytes_read.sum","Gbyte","2.5"',
            '"0","7","sweep","gpu__time_duration.sum","us","1,200"',
            '"1","7","sweep","dram__bytes_read.sum","Mbyte","500"',
            '"1","7","sweep","dram__bytes_write.sum","Mbyte","n/a"',
        ]
    )
    assert read_counters(text) == [
        {
            "name": "sweep",
            "launches": 2,
            "dram__bytes_read.sum": 3e9,
            "gpu__time_duration.sum": 1.2e6,
        }
    ]
    assert read_counters("no counters") == []


# ---- a bare machine ----------------------------------------------------------------------------

BARE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError("No module named " + repr(name))

sys.meta_path.insert(0, Nothing())
from benchmarks.gpu_session import one_step, plots, stages
from benchmarks.gpu_session.target import Target

class Cpu(Target):
    device = "cpu"
    missing = lambda self: None
    def timer(self):
        from unilogit_kernels.bench.devices import Cpu
        return Cpu()

for stage in {stages}:
    cases = stages.cases(stage, Cpu())
    print(stage, len(cases), cases[0].run(print) if stage == "machine" else "")
"""
EXTRAS = (
    "rich",
    "typer",
    "pydantic",
    "pytest",
    "transformers",
    "numpy",
    "matplotlib",
    "safetensors",
)


def test_nothing_but_torch_and_triton_is_needed() -> None:
    code = BARE.format(absent=EXTRAS, stages=NAMES)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'matplotlib': None" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES


# ---- the whole, on a CPU -----------------------------------------------------------------------


def command(out: Path, *arguments: str) -> list[str]:
    start = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(out), "--rehearse"]
    return [*start, *arguments]


def records(out: Path) -> list[dict[str, Any]]:
    return list(read(out / LEDGER))


def children(pid: int) -> list[int]:
    """Its processes; Linux only."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


@pytest.mark.prove
@pytest.mark.timeout(360)
def test_rehearsal(tmp_path: Path) -> None:
    """Every stage runs through; what a killed session has found already is not done again."""
    killed = subprocess.Popen(command(tmp_path, "--stages", "machine"), cwd=ROOT)
    while not any(r["status"] == OK for r in records(tmp_path)):
        time.sleep(0.3)
        assert killed.poll() in (None, 0)
    workers = children(killed.pid)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.3)  # they end with the case that they run
    started = time.monotonic()
    minutes = 5.0
    done = subprocess.run(
        command(tmp_path, "--minutes", str(minutes)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60 * minutes
    ends = Counter(
        (r["stage"], r["case"]) for r in records(tmp_path) if r["status"] in (OK, FAILED, LOST)
    )
    assert set(ends.values()) == {1}
    figures = json.loads((tmp_path / summary.JSON).read_text())
    for stage, counts in figures["counts"].items():
        assert counts["left"] == counts["lost"] == counts["failed"] == 0, (stage, done.stdout)
        assert counts["ok"] > 0, stage
    assert set(figures["counts"]) == set(NAMES)
    text = (tmp_path / summary.MARKDOWN).read_text()
    assert (tmp_path / "speed.png").stat().st_size > 0
    for heading in ("## Machine", "## Right", "## Rates", "## plan: ", "## launch: ", "## step: "):
        assert heading in text
