"""Dataclasses from what a YAML or JSON file holds, with messages that name the field."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from unilogit_kernels.unlearning.config import convert
from unilogit_kernels.unlearning.errors import RunError


def build(cls: type[Any], content: Any, where: str) -> Any:
    """A dataclass whose fields are numbers, texts, lists, mappings and such dataclasses.

    A field's metadata may hold a `range`, a `limits.Range`, that its numbers must lie in.

    Args:
        cls: the dataclass.
        content: a mapping of its fields.
        where: what messages call it; the names of fields follow a dot.

    Raises:
        RunError: it is no such mapping.
    """
    if not isinstance(content, Mapping):
        raise RunError(f"{where} must be a mapping, got {_kind(content)}")
    known = {each.name: each for each in dataclasses.fields(cls)}
    prefix = "" if where == "the plan" else f"{where}."
    for name in content:
        if name not in known:
            raise RunError(f"{where} has no {name!r}; it has {', '.join(known)}")
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for name, each in known.items():
        if name not in content:
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
                raise RunError(f"{where} lacks {name}")
            continue
        given[name] = _value(hints[name], content[name], f"{prefix}{name}")
        limits = each.metadata.get("range")
        if limits is not None:
            many = given[name] if isinstance(given[name], tuple) else (given[name],)
            for value in many:
                problem = limits.problem(value)
                if problem is not None:
                    raise RunError(f"{prefix}{name} must be {problem}, got {value}")
    return cls(**given)


def _value(hint: Any, content: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, content, where)
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        if not isinstance(content, list):
            raise RunError(f"{where} must be a list, got {content!r}")
        of = typing.get_args(hint)[0]
        return tuple(build(of, each, f"{where}[{n}]") for n, each in enumerate(content))
    return convert(where, content, hint)


def _kind(content: Any) -> str:
    return "nothing" if content is None else f"{type(content).__name__} {content!r}"
