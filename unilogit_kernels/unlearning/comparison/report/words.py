"""Answers beside each other, with the words that differ."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import NamedTuple


class Words(NamedTuple):
    """Some words of a text that stand together.

    Attributes:
        text: they, with the white space between them.
        differs: whether the other text does not have them here.
    """

    text: str
    differs: bool


def differing(text: str, other: str) -> list[Words]:
    """A text in parts: what it shares with another, and what it does not.

    Args:
        text: that is shown.
        other: that it is compared with.

    Example:
        >>> for part in differing("It is based in Oslo.", "It is based in Rome."):
        ...     print(part)
        Words(text='It is based in', differs=False)
        Words(text='Oslo.', differs=True)
    """
    mine, others = text.split(), other.split()
    found = []
    for kind, start, end, _, _ in SequenceMatcher(None, mine, others, False).get_opcodes():
        if end > start:
            found.append(Words(" ".join(mine[start:end]), kind != "equal"))
    return found
