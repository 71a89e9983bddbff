"""Dataclasses from what a YAML or JSON file holds, with messages that name the field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from unilogit_kernels.unlearning.errors import RunError

_WORDS = {str: "text", bool: "true or false", int: "an integer", float: "a number"}


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
    if isinstance(hint, types.UnionType):  # X | None, of which there are no others here.
        if content is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, content, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(content, (list, tuple)):
            raise RunError(f"{where} must be a list, got {_kind(content)}")
        of = typing.get_args(hint)[0]
        return tuple(_value(of, each, f"{where}[{n}]") for n, each in enumerate(content))
    if origin is dict:
        if not isinstance(content, Mapping):
            raise RunError(f"{where} must be a mapping, got {_kind(content)}")
        of = typing.get_args(hint)[1]
        return {str(key): _value(of, each, f"{where}.{key}") for key, each in content.items()}
    if hint is Any:
        return content
    if hint is float and isinstance(content, int) and not isinstance(content, bool):
        return float(content)
    if not isinstance(content, hint) or (hint is int and isinstance(content, bool)):
        raise RunError(f"{where} must be {_WORDS[hint]}, got {content!r}")
    return content


def _kind(content: Any) -> str:
    return "nothing" if content is None else f"{type(content).__name__} {content!r}"
