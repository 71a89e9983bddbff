"""The CUDA sources and what is compiled from them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
_PACKAGED = _HERE / "csrc"
_REPOSITORY = _HERE.parents[2] / "csrc" / "cuda"

HEADERS = (
    "platform.h",
    "transform.h",
    "row_parts.h",
    "row_math.h",
    "row_walk.h",
    "kernels.h",
    "pair_math.h",
    "pair_kernels.h",
)
"""What a kernel is compiled from."""

STANDARD = "c++17"
"""The language that the sources are written in."""

FATBIN_PATTERN = "kernels-{digest}.fatbin"
"""Name of the fatbin beside this module: of which sources it is made is a part of it."""

_DIGEST_CHARACTERS = 16


class Kernel(NamedTuple):
    """One kernel: a macro of `kernels.h` or `pair_kernels.h`, and its arguments.

    Attributes:
        macro: As `LOG_ODDS_UPDATE`.
        arguments: As `("Bfloat16", "plain")`.

    Example:
        >>> kernel = Kernel("LOG_ODDS_UPDATE", ("Bfloat16", "plain"))
        >>> kernel.name
        'log_odds_update_Bfloat16_plain'
    """

    macro: str
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The entry point's name in a binary."""
        return "_".join((self.macro.lower(), *self.arguments))

    @property
    def source(self) -> str:
        """A source that defines this kernel alone, to be compiled where the headers are found."""
        return f'#include "pair_kernels.h"\n{self.macro}({", ".join(self.arguments)})\n'


def directory() -> Path:
    """Where the sources are: in the package, or in the repository that it is imported from.

    Raises:
        RuntimeError: In neither.
    """
    for path in (_PACKAGED, _REPOSITORY):
        if (path / HEADERS[0]).is_file():
            return path
    raise RuntimeError(
        f"the CUDA sources are neither in {_PACKAGED} nor in {_REPOSITORY}; reinstall the package"
    )


@functools.cache
def digest() -> str:
    """Identifies the sources."""
    whole = hashlib.sha256()
    for name in HEADERS:
        whole.update((directory() / name).read_bytes())
    return whole.hexdigest()[:_DIGEST_CHARACTERS]


def fatbin() -> Path | None:
    """The fatbin that was built from these very sources, if there is one."""
    path = _HERE / FATBIN_PATTERN.format(digest=digest())
    return path if path.is_file() else None
