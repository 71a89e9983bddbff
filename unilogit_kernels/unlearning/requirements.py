"""The packages of the extra `unlearn` whose versions decide what can be imported."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

OLDEST = {"transformers": "4.57", "accelerate": "1.10"}
"""The floors of the extra `unlearn` in pyproject.toml."""


@functools.cache
def check_requirements() -> None:
    """See that they are there and new enough.

    Raises:
        ImportError: one is too old; a `ModuleNotFoundError` where it is missing.
    """
    for package, oldest in OLDEST.items():
        remedy = f"run: pip install 'unilogit-kernels[unlearn]' (it takes {package} >= {oldest})"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise ModuleNotFoundError(
                f"unilogit_kernels.unlearning needs the package {package}: {remedy}", name=package
            ) from None
        if _release(found) < _release(oldest):
            raise ImportError(
                f"unilogit_kernels.unlearning needs {package} >= {oldest}, but {found} is "
                f"installed: {remedy}. The losses of unilogit_kernels.huggingface work with it",
                name=package,
            )


def _release(number: str) -> tuple[int, ...]:
    """Major and minor, which is all that a floor names."""
    return tuple(int(part) for part in number.split(".")[:2])
