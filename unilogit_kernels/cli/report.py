"""`unilogit report`: draw the report of a comparison again."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from unilogit_kernels.cli.console import say
from unilogit_kernels.unlearning.errors import RunError

_PACKAGES = {"jinja2": "jinja2", "matplotlib": "matplotlib", "yaml": "pyyaml"}
"""What comparisons need beside the extra `unlearn`, by the names of their modules."""


def report(
    folder: Annotated[Path, typer.Argument(help="What unilogit compare has written.")],
) -> None:
    """Draw the report of a comparison again, or of as much of it as there is."""
    check_packages()
    draw(folder)


def check_packages() -> None:
    """See that the extra `report` is installed.

    Raises:
        RunError: a package of it is not.
    """
    for module, package in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise RunError(
                f"the package {package!r} is missing; run: pip install 'unilogit-kernels[report]'"
            ) from error


def draw(folder: Path) -> None:
    """Write the report of a comparison and say where it is.

    Args:
        folder: of the comparison.

    Raises:
        RunError: it holds none.
    """
    from unilogit_kernels.unlearning.comparison.report.page import write_report

    say(f"the report is {write_report(folder)}")
