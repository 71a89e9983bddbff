"""What is known so far: one JSON object a line, appended and flushed as it is learnt."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""`stage`, `case` and `status`; with it `seconds`, `data`, `rows`, `why`, `traceback`."""

LISTED, STARTED, ROWS, CUT = "listed", "started", "rows", "cut"
"""How many cases there are; one has begun; what it has found so far; it was stopped, to be tried
another time."""
OK, FAILED, MISSING, LOST = "ok", "failed", "missing", "lost"
"""How a case ends: as it should; with an error; not possible here; killed, or dead by itself."""
ENDS = (OK, FAILED, MISSING, LOST)

MOST_ATTEMPTS = 2
"""A case that was running as often when everything ended is to blame, and is not begun again."""


class Ledger:
    """The records of a session, in a file that is never rewritten.

    Args:
        path: Of the file. What it holds already counts as known; half a line, as a killed process
            leaves it, does not.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records = list(read(path))
        self._file = path.open("a")
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")
        self._forget_cases_to_blame()

    def append(self, stage: str, case: str, status: str, **more: Any) -> None:
        """Add a record, on the disk before this returns."""
        record = {"stage": stage, "case": case, "status": status, **more}
        self.records.append(record)
        self._file.write(json.dumps(record, default=str) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def ended(self, stage: str) -> set[str]:
        """The cases of a stage that are not to be run again."""
        return {r["case"] for r in self.records if r["stage"] == stage and r["status"] in ENDS}

    def last(self, stage: str) -> dict[str, Record]:
        """The last word on each case of a stage that has one, by case; rows so far among them."""
        found: dict[str, Record] = {}
        for record in self.records:
            if record["stage"] != stage or record["status"] in (LISTED, STARTED, CUT):
                continue
            before = found.get(record["case"], {})
            found[record["case"]] = {**before, **record}
        return found

    def _forget_cases_to_blame(self) -> None:
        running: dict[tuple[str, str], int] = defaultdict(int)
        for record in self.records:
            key = (record["stage"], record["case"])
            if record["status"] == STARTED:
                running[key] += 1
            elif record["status"] != ROWS:
                running[key] = 0
        for (stage, case), attempts in running.items():
            if attempts >= MOST_ATTEMPTS:
                why = f"the session ended {attempts} times while it ran"
                self.append(stage, case, LOST, why=why)


def read(path: Path) -> Iterator[Record]:
    """The records in a file, which another process may be writing."""
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"stage", "case", "status"} <= record.keys():
            yield record


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it sees the old text or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)
