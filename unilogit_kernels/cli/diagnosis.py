"""`unilogit doctor` among the other commands; `doctor.py` runs without typer, too."""

from __future__ import annotations

from typing import Annotated

import typer

from unilogit_kernels.cli.doctor import main
from unilogit_kernels.unlearning.processes import check_alone


def doctor(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[--json]")] = None,
) -> None:
    """Show versions, devices, which backends can run here, and what each extra gives."""
    check_alone("doctor")
    main(arguments or [])
