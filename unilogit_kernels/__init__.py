"""Fused, memory-flat unlearning losses for large-vocabulary language models.

The names are those of `unilogit_kernels.public`, which is imported, and torch with it, when one of
them is first used: so `unilogit --help` need not wait for torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unilogit_kernels.public import *  # noqa: F403
    from unilogit_kernels.public import __all__ as __all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name, a folder of the package, or `__all__`."""
    is_special = name.startswith("__") and name != "__all__"
    if not is_special and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    public = None if is_special else importlib.import_module(f"{__name__}.public")
    if public is None or name not in (*public.__all__, "__all__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(public, name)
    return value


def __dir__() -> list[str]:
    public = importlib.import_module(f"{__name__}.public")
    return sorted({*globals(), *public.__all__})
