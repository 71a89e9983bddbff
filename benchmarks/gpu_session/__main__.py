"""`python -m benchmarks.gpu_session --minutes 8 --out DIR`: see docs/gpu.md."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu_session import summary
from benchmarks.gpu_session.ledger import Ledger
from benchmarks.gpu_session.processes import Processes
from benchmarks.gpu_session.session import Session, Stage

LEDGER, LOG = "results.jsonl", "output.log"


def stages() -> list[Stage]:
    """In order of value; weights are about seconds of eight minutes."""
    parallel = max(1, min(8, (os.cpu_count() or 1) // 2))
    return [
        Stage("machine", 60, parallel),
        Stage("right", 120, parallel),
        Stage("speed", 165),
        Stage("compile", 25, parallel),
        Stage("tuning", 60),
        Stage("profile", 45),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the time allows, and write down what is found as it is found."""
    names = [stage.name for stage in stages()]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder; what it has is not redone")
    parser.add_argument("--stages", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in small")
    given = parser.parse_args(arguments)
    wanted = given.stages.split(",")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"--stages takes {', '.join(names)}, got {', '.join(unknown)}")
    if not given.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {given.minutes:g}")
    environment: dict[str, str] = {}
    if given.rehearse:
        environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    more = ("--rehearse",) if given.rehearse else ()
    crew = Processes(given.out / LOG, more, environment)
    ledger = Ledger(given.out / LEDGER)
    chosen = [stage for stage in stages() if stage.name in wanted]

    def write() -> None:
        try:
            summary.write(ledger, given.out, minutes=given.minutes, rehearsal=given.rehearse)
        except Exception:  # what is measured yet is worth more than a table of the rest
            traceback.print_exc()

    signal.signal(signal.SIGTERM, _terminate)
    session = Session(chosen, crew, ledger, 60 * given.minutes, write)
    try:
        session.run()
    finally:
        crew.stop_all()
        write()
    summary.draw(given.out, seconds=session.left())
    print((given.out / summary.MARKDOWN).read_text())


def _terminate(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
