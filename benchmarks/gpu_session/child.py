"""A worker process: tells the cases of its stage, then runs those that it is sent."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_session.cases import Case, Missing, Rows
from benchmarks.gpu_session.ledger import FAILED, MISSING, OK

ROWS_EVERY_SECONDS = 1.0
"""What is found so far is not written down more often."""
GRACE_SECONDS = 1.0
"""The parent kills first."""
MOST_TRACEBACK = 4000
"""Characters, of the end."""
DEVICE_LOST = 75
"""Exit status: what the case before did to the device leaves nothing for another one."""


class Channel:
    """The way to the parent: what was standard output. What is printed goes to the log instead."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._last_rows = -1e9

    def say(self, kind: str, body: Any) -> None:
        """One message."""
        self._file.write(json.dumps([kind, body], default=str) + "\n")
        self._file.flush()

    def rows(self, rows: Rows) -> None:
        """What a case has found so far."""
        now = time.monotonic()
        if now >= self._last_rows + ROWS_EVERY_SECONDS:
            self._last_rows = now
            self.say("rows", rows)


def run_case(case: Case, channel: Channel, device: str) -> dict[str, Any]:
    """How a case ends, with what the device has to say about it."""
    try:
        data = case.run(channel.rows)
        _synchronise(device)
    except Missing as reason:
        return {"status": MISSING, "why": str(reason)}
    except Exception as error:  # a failure is a result, not the end of the session
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return {"status": FAILED, "why": why, "traceback": traceback.format_exc()[-MOST_TRACEBACK:]}
    return {"status": OK, "data": data}


def _synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _has_lost(device: str) -> bool:
    """Whether the device answers nobody any more in this process."""
    try:
        _synchronise(device)
    except Exception:
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve cases until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(arguments)
    # From a thread that needs nothing of Python: a parent that died leaves nobody behind who hangs.
    faulthandler.dump_traceback_later(given.seconds + GRACE_SECONDS, exit=True)
    channel = Channel()
    from benchmarks.gpu_session import stages

    with contextlib.ExitStack() as stack:
        target = stack.enter_context(stages.target(rehearse=given.rehearse))
        cases = {case.name: case for case in stages.cases(given.stage, target)}
        channel.say("cases", [(case.name, case.seconds) for case in cases.values()])
        for line in sys.stdin:
            result = run_case(cases[line.strip()], channel, target.device)
            channel.say("result", result)
            if result["status"] == FAILED and _has_lost(target.device):
                os._exit(DEVICE_LOST)


if __name__ == "__main__":
    main()
