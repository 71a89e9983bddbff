"""The folder of a comparison: what lies in it where, and reading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.comparison.cell import GOLDEN, STARTING
from unilogit_kernels.unlearning.errors import RunError, reading

CELLS, PLAN, AUDIT = "cells", "plan.json", "audit.json"
"""The folder of its cells, the plan, and what was compared of what."""


def read_cell(folder: Path, cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """The file of a finished cell, or None.

    Raises:
        RunError: it is of other settings, or cannot be read.
    """
    path = folder / CELLS / f"{cell['name']}.json"
    if not path.exists():
        return None
    with reading(f"{path}: no results of a cell; delete it to have it run again"):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in cell if found["settings"].get(name) != cell[name]]
    if changed:
        raise RunError(
            f"{path} was run with other settings ({', '.join(changed)}): delete it, or choose "
            "another directory"
        )
    return found


def read_models(folder: Path) -> dict[str, Any]:
    """The results of the golden and the starting model.

    Raises:
        RunError: they are not there.
    """
    with reading(f"{folder}: holds no comparison"):
        paths = {role: folder / f"{role}.json" for role in (STARTING, GOLDEN)}
        return {role: json.loads(path.read_text("utf-8")) for role, path in paths.items()}
