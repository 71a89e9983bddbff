"""The stages in turn, each in its share of the time, its cases in processes that may be killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from benchmarks.gpu_session.ledger import CUT, FAILED, LISTED, LOST, OK, ROWS, STARTED, Ledger

START_SECONDS = 90.0
"""A process that has not told its cases after so long never will: importing torch and starting a
GPU's driver take 5 to 20 s."""
START = "start"
"""The case of a stage that stands for the start of its processes."""
MOST_STARTS_IN_VAIN = 3
"""So many processes in a row that end before they tell their cases end their stage."""
LEAST_SECONDS = 5.0
"""With less than this left nothing is begun again: processes would not even start."""
RESERVE, LEAST_RESERVE_SECONDS = 0.03, 5.0
"""Share of the time, and seconds at least, left to the last summary and to killing."""


class Stage(NamedTuple):
    """A group of cases.

    Attributes:
        name: Of the stage.
        weight: Its share of the time is this over the sum of those of the stages that remain.
        workers: Processes at a time: 1 where time is measured.
    """

    name: str
    weight: float
    workers: int = 1


class Message(NamedTuple):
    """What a worker says.

    Attributes:
        worker: Which.
        kind: `cases` (once, a list of names and seconds), `rows` and `result` of the case that it
            runs, or `gone`: the process has ended.
        body: What it says.
    """

    worker: int
    kind: str
    body: Any


class Crew(Protocol):
    """Worker processes."""

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""

    def start(self, stage: str, seconds: float) -> int:
        """A new worker, which ends by itself after so long; returns its number."""

    def send(self, worker: int, case: str) -> None:
        """Have a worker that is idle run a case."""

    def receive(self, timeout: float) -> Message | None:
        """The next message of any worker, or None after so many seconds."""

    def stop(self, worker: int) -> None:
        """Kill a worker with all that it has started. Nothing more is heard of it."""


@dataclass
class _Worker:
    """What a worker does: it starts while `case` is None and `idle` is not set."""

    deadline: float
    case: str | None = None
    since: float = 0.0
    idle: bool = False


@dataclass
class _Run:
    """One go at a stage."""

    stage: Stage
    deadline: float
    cases: dict[str, float] | None = None
    todo: list[str] = field(default_factory=list)
    workers: dict[int, _Worker] = field(default_factory=dict)
    in_vain: int = 0

    @property
    def is_over(self) -> bool:
        """Whether every case has ended."""
        running = any(not worker.idle for worker in self.workers.values())
        return self.cases is not None and not self.todo and not running


class Session:
    """Runs stages, and has each result written down.

    Args:
        stages: In order of value.
        crew: What runs the cases.
        ledger: Where results go; what it knows already is not run again.
        seconds: For everything.
        after_stage: Called when a stage has had its time.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        crew: Crew,
        ledger: Ledger,
        seconds: float,
        after_stage: Callable[[], None] = lambda: None,
    ) -> None:
        self._stages, self._crew, self._ledger = stages, crew, ledger
        self._start, self._seconds = crew.now(), seconds
        self._end = self._start + seconds - max(RESERVE * seconds, LEAST_RESERVE_SECONDS)
        self._after_stage = after_stage

    def run(self) -> None:
        """Every stage in its share of the time; what is left goes to those that were cut."""
        stages = list(self._stages)
        while stages and self._end - self._crew.now() > LEAST_SECONDS:
            unfinished = []
            for i, stage in enumerate(stages):
                rest = sum(later.weight for later in stages[i:])
                share = (self._end - self._crew.now()) * stage.weight / rest
                if not self._run_stage(stage, self._crew.now() + share):
                    unfinished.append(stage)
            stages = unfinished

    def left(self) -> float:
        """Seconds that nobody has used."""
        return self._start + self._seconds - self._crew.now()

    def _run_stage(self, stage: Stage, deadline: float) -> bool:
        """Whether nothing is left to do."""
        run = _Run(stage, deadline)
        try:
            while not run.is_over and self._crew.now() < deadline:
                if run.in_vain >= MOST_STARTS_IN_VAIN:
                    return True
                self._staff(run)
                self._hear(run)
                self._kill_overdue(run)
        finally:
            for number, worker in run.workers.items():
                self._crew.stop(number)
                if worker.case is not None:
                    self._ledger.append(stage.name, worker.case, CUT)
            self._note_start(run)
            self._after_stage()
        return run.is_over

    def _note_start(self, run: _Run) -> None:
        """Say so if no process has told its cases, or if one has where none had before."""
        stage, failed = run.stage.name, START in self._ledger.last(run.stage.name)
        if run.cases is None:
            ended = f"{run.in_vain} ended or were killed before" if run.in_vain else "time was up"
            why = f"no process told its cases: {ended}; see the log"
            self._ledger.append(stage, START, FAILED, why=why)
        elif failed:
            self._ledger.append(stage, START, OK, why="at another try")

    def _staff(self, run: _Run) -> None:
        """As many workers as there is work for; one, as long as nobody knows the cases."""
        busy = sum(worker.case is not None for worker in run.workers.values())
        wanted = 1 if run.cases is None else min(run.stage.workers, len(run.todo) + busy)
        now = self._crew.now()
        while len(run.workers) < wanted:
            number = self._crew.start(run.stage.name, run.deadline - now)
            run.workers[number] = _Worker(now + START_SECONDS)

    def _hand_out(self, run: _Run, number: int) -> None:
        worker = run.workers[number]
        worker.case, worker.idle = None, True
        if not run.todo:
            return
        case = run.todo.pop(0)
        now = self._crew.now()
        assert run.cases is not None
        worker.case, worker.idle, worker.since = case, False, now
        worker.deadline = now + run.cases[case]
        self._ledger.append(run.stage.name, case, STARTED)
        self._crew.send(number, case)

    def _hear(self, run: _Run) -> None:
        """Wait for a message, or until a worker is overdue."""
        deadlines = [worker.deadline for worker in run.workers.values() if not worker.idle]
        until = min([run.deadline, *deadlines])
        message = self._crew.receive(max(0.0, until - self._crew.now()))
        if message is None or message.worker not in run.workers:
            return
        worker = run.workers[message.worker]
        if message.kind == "cases":
            self._learn(run, message.body)
            run.in_vain = 0
            self._hand_out(run, message.worker)
        elif message.kind == "gone":
            self._lose(run, message.worker, str(message.body))
        elif worker.case is not None and message.kind == "rows":
            self._ledger.append(run.stage.name, worker.case, ROWS, rows=message.body)
        elif worker.case is not None:
            seconds = round(self._crew.now() - worker.since, 2)
            self._ledger.append(run.stage.name, worker.case, seconds=seconds, **message.body)
            self._hand_out(run, message.worker)

    def _learn(self, run: _Run, cases: Sequence[tuple[str, float]]) -> None:
        if run.cases is None:
            run.cases = dict(cases)
            ended = self._ledger.ended(run.stage.name)
            run.todo = [name for name in run.cases if name not in ended]
            self._ledger.append(run.stage.name, "*", LISTED, count=len(run.cases))

    def _lose(self, run: _Run, number: int, why: str) -> None:
        """A worker is no more; what it ran is lost, and not tried again."""
        worker = run.workers.pop(number)
        if worker.case is not None:
            self._ledger.append(run.stage.name, worker.case, LOST, why=why)
        elif not worker.idle:
            run.in_vain += 1

    def _kill_overdue(self, run: _Run) -> None:
        now = self._crew.now()
        for number, worker in list(run.workers.items()):
            if not worker.idle and worker.deadline <= now < run.deadline:
                self._crew.stop(number)
                what = worker.case or "the start of a process"
                self._lose(run, number, f"{what} took too long, and was killed")
