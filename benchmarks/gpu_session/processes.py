"""Worker processes: they take names of cases on their input, and answer in JSON, line by line."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from benchmarks.gpu_session.session import Message

ROOT = Path(__file__).resolve().parents[2]


class Processes:
    """A `session.Crew` of real processes.

    Args:
        log: Receives what they print, and where those were that had to be killed.
        arguments: Further ones for each process.
        environment: Further variables for each.
    """

    def __init__(
        self, log: Path, arguments: tuple[str, ...] = (), environment: dict[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab")
        self._arguments = arguments
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._messages: queue.Queue[Message] = queue.Queue()
        self._count = 0

    def now(self) -> float:
        """See `Crew`."""
        return time.monotonic()

    def start(self, stage: str, seconds: float) -> int:
        """See `Crew`."""
        command = [sys.executable, "-m", "benchmarks.gpu_session.child", "--stage", stage]
        process = subprocess.Popen(
            [*command, "--seconds", f"{seconds:.1f}", *self._arguments],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # so that a compiler that it runs is killed with it
        )
        self._count += 1
        self._running[self._count] = process
        assert process.stdout is not None
        listener = (self._count, process, process.stdout)
        threading.Thread(target=self._listen, args=listener, daemon=True).start()
        return self._count

    def send(self, worker: int, case: str) -> None:
        """See `Crew`."""
        stdin = self._running[worker].stdin
        assert stdin is not None
        with contextlib.suppress(OSError):  # it is gone, which will be heard
            stdin.write(case.encode() + b"\n")
            stdin.flush()

    def receive(self, timeout: float) -> Message | None:
        """See `Crew`."""
        try:
            return self._messages.get(timeout=timeout)
        except queue.Empty:
            return None

    def stop(self, worker: int) -> None:
        """See `Crew`."""
        process = self._running.pop(worker, None)
        if process is None:
            return
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)  # one that hangs in a driver may not die at once

    def stop_all(self) -> None:
        """Kill whoever still runs."""
        for worker in list(self._running):
            self.stop(worker)

    def _listen(self, number: int, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        for line in output:
            try:
                kind, body = json.loads(line)
            except ValueError:
                continue  # half a line of one that was killed
            self._messages.put(Message(number, kind, body))
        self._messages.put(Message(number, "gone", _end_of(process.wait())))


def _end_of(code: int) -> str:
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}"
    return f"its process ended with status {code}"
