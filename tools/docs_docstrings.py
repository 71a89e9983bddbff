"""An extension of griffe: docstrings as `help()` shows them.

The shared text of parameters is put into a docstring when the package is imported
(`functional/documented.py`), and the sections of examples have the singular's name.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from griffe import Docstring, Extension, Function, Object


class Docstrings(Extension):  # type: ignore[misc]  # untyped where griffe is not installed
    """Completes what was read from the sources."""

    def on_function(self, *, func: Function, **_: Any) -> None:
        """Take the completed docstring of a function that has one."""
        if any(decorator.callable_path.endswith("documented") for decorator in func.decorators):
            module = importlib.import_module(func.parent.path if func.parent else "")
            text = getattr(module, func.name).__doc__
            func.docstring = Docstring(text, parent=func)

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Let an example be code."""
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", value, flags=re.MULTILINE)
