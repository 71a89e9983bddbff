"""What a module of this folder measured, as JSON and Markdown beside each other."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def command_of(module: str, arguments: list[str] | None) -> str:
    """How the module was called, for the report; `arguments` are those of its `main`."""
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join([f"python -m benchmarks.{module}", *given])


def write(
    path: Path,
    facts: dict[str, Any],
    command: str,
    title: str,
    lines: Sequence[str],
    results: Sequence[Any],
) -> None:
    """Print and write Markdown, and write JSON to `path`.

    Args:
        path: Of the JSON; the Markdown lies beside it.
        facts: About the machine.
        command: Which made the figures.
        title: Of the Markdown, which goes on with the facts.
        lines: The rest of the Markdown.
        results: The figures, for the JSON.
    """
    about = ", ".join(f"{key} {value}" for key, value in facts.items())
    text = "\n".join([f"# {title}", "", f"{about}.", "", *lines, ""])
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    figures = {"machine": facts, "command": command, "results": results}
    path.write_text(json.dumps(figures, indent=1) + "\n")
