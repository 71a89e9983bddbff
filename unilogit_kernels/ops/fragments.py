"""Fragments: arguments of an operator that belong together, by name.

A fragment is a `NamedTuple`. It gives a piece of a schema, how many arguments that is, and access
to them, so that nobody counts positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_SCHEMA_TYPES: tuple[tuple[object, str], ...] = (
    (Tensor, "Tensor"),
    (Tensor | None, "Tensor?"),
    (list[Tensor], "Tensor[]"),
    (float, "float"),
    (list[float], "float[]"),
    (int, "int"),
    (int | None, "int?"),
    (int | str | None, "int?"),  # A text has become a number before a call gets here.
    (bool, "bool"),
    (str, "str"),
    (torch.dtype | None, "ScalarType?"),
)


class Fragment(Protocol):
    """What an operator takes or returns, in part: a `NamedTuple` of what a schema can say."""

    def __iter__(self) -> Iterator[Any]:
        """The arguments in order."""


F = TypeVar("F", bound=Fragment)


def names(fragment: type[Fragment]) -> tuple[str, ...]:
    """The names of its arguments."""
    fields: tuple[str, ...] = fragment._fields  # type: ignore[attr-defined]  # of a NamedTuple
    return fields


def rebuilt(fragment: type[F], values: Iterable[Any]) -> F:
    """A fragment of that class with these values."""
    # A class of NamedTuple takes its fields one by one, in Python; on few rows it is felt.
    make: Callable[..., F] = tuple.__new__
    return make(fragment, values)


def schema(fragments: Sequence[type[Fragment]]) -> str:
    """What they say in a schema, one after the other."""
    return ", ".join(
        f"{_schema_type(hint)} {name}"
        for fragment in fragments
        for name, hint in get_type_hints(fragment).items()
        if name in names(fragment)
    )


def _schema_type(hint: object) -> str:
    return next(text for kind, text in _SCHEMA_TYPES if kind == hint)


def save(ctx: FunctionCtx, fragments: Iterable[Fragment]) -> None:
    """Save the tensors of fragments as autograd wants it, and the rest beside them."""
    tensors: list[Tensor] = []
    layout: list[tuple[type[Fragment], list[Any], list[tuple[int, int]]]] = []
    for fragment in fragments:
        values, lengths = list(fragment), []
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                tensors.append(value)
                lengths.append((place, -1))
            elif type(value) is list and value and isinstance(value[0], Tensor):
                tensors += value
                lengths.append((place, len(value)))
            else:
                continue
            values[place] = None
        layout.append((type(fragment), values, lengths))
    ctx.save_for_backward(*tensors)
    ctx.layout = layout  # type: ignore[attr-defined]


def saved(ctx: Any) -> list[Fragment]:
    """What `save` saved."""
    tensors = iter(ctx.saved_tensors)  # asked for once, as activation checkpointing wants it
    fragments: list[Fragment] = []
    for part, rest, lengths in ctx.layout:
        values = rest.copy()
        for place, length in lengths:
            one = length < 0
            values[place] = next(tensors) if one else list(itertools.islice(tensors, length))
        fragments.append(rebuilt(part, values))
    return fragments
