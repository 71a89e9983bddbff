"""What a stage consists of, and in which order many combinations are worth trying."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]
Report = Callable[[Rows], None]
"""Takes all that a case has found so far, which is written down at once."""


class Missing(Exception):  # noqa: N818  (it is no error)
    """What a case needs is not here; the message says what."""


class Case(NamedTuple):
    """One thing to try.

    Attributes:
        name: Unique within its stage.
        run: Returns what is found, fit for JSON. Raises `AssertionError` for a wrong result,
            `Missing` where it cannot be tried, or whatever goes wrong.
        seconds: Until it is killed.
    """

    name: str
    run: Callable[[Report], dict[str, Any]]
    seconds: float = 60.0


Combination = dict[str, Hashable]


def in_order_of_value(
    parameters: Mapping[str, Sequence[Hashable]], seed: int = 0
) -> tuple[list[Combination], list[Combination], list[Combination]]:
    """All combinations, in three lots.

    Returns:
        First so many that each value is there, then so many that any two values meet that can,
        then the rest: a fault shows with one value, or with two that meet, hardly ever with three.
    """
    names = list(parameters)
    everything = [
        dict(zip(names, values, strict=True)) for values in itertools.product(*parameters.values())
    ]
    # Next to each other are combinations that differ in one value: shuffled, they cover sooner.
    random.Random(seed).shuffle(everything)
    first, rest = _covering(everything, 1)
    pairs, rest = _covering(rest, 2, first)
    return first, pairs, rest


def _covering(
    combinations: Sequence[Combination], together: int, known: Sequence[Combination] = ()
) -> tuple[list[Combination], list[Combination]]:
    """Those that bring something that none before has, and the others."""
    seen = {meeting for each in known for meeting in _meetings(each, together)}
    new: list[Combination] = []
    old: list[Combination] = []
    for each in combinations:
        found = _meetings(each, together)
        (old if found <= seen else new).append(each)
        seen |= found
    return new, old


def _meetings(combination: Combination, together: int) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(combination.items(), min(together, len(combination))))


def in_turns(lists: Sequence[Sequence[Case]]) -> list[Case]:
    """One of each, then another of each: a cut leaves something of all."""
    turns = itertools.zip_longest(*lists)
    return [case for turn in turns for case in turn if case is not None]


def family_of(name: str) -> str:
    """What cases that differ in flags alone share of their names: `"triton/sweep"`."""
    words = []
    for word in name.split(" "):
        if "=" in word and not word.startswith("entry="):
            break
        words.append(word)
    return " ".join(words)


def name_of(*parts: Hashable, **values: Hashable) -> str:
    """A case's name: `"triton/sweep dtype=bfloat16 layout=odd"`."""
    said = [f"{key}={value}" for key, value in values.items()]
    return " ".join(["/".join(map(str, parts)), *said])
