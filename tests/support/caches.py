"""What functions of the package remember of how calls are laid out."""

from __future__ import annotations

import sys

LAID_OUT = tuple(
    f"unilogit_kernels.{name}"
    for name in ("backends.triton", "backends.cuda", "backends.gpu", "fused_linear")
)
"""Modules whose functions remember what follows from settings, constants and sizes."""


def forget_layouts() -> None:
    """Lay everything out anew: something that layouts follow from was replaced."""
    for name, module in list(sys.modules.items()):
        if name.startswith(LAID_OUT):
            for value in vars(module).values():
                clear = getattr(value, "cache_clear", None)
                if callable(clear):
                    clear()
