"""Texts as token ids that go on from one another, for any tokenizer.

The ids of a text and of what continues it decode to exactly the two, one after the other. No
tokenizer is trusted with that: some put a space before every text, some begin or end every text,
some merge across the boundary. What comes out is decoded and compared.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from transformers import PreTrainedTokenizerBase

from unilogit_kernels.unlearning.rows import DataError

# Texts that a continuation is encoded after, where none of its tokens may reach before it.
_ANCHORS = ("\n", ".", "a", "0", "\u00e9", ":")


@dataclass(frozen=True)
class Written:
    """A text and its token ids, of which the first `special` stand for none of it."""

    text: str
    ids: list[int]
    special: int = 0


@dataclass(frozen=True)
class Writer:
    """Writes texts with a tokenizer, and reads them back."""

    tokenizer: PreTrainedTokenizerBase

    def begin(self, text: str, source: str, *, special: bool) -> Written:
        """The ids of a text that others continue.

        Args:
            text: what to write.
            source: for messages.
            special: begin with what the tokenizer puts before every text, unless the text itself
                does. What it puts after one is left out.

        Raises:
            DataError: the tokenizer cannot write the text.
        """
        ids = self._tokens(text)
        decoded = self.read(ids)
        if _letters(decoded) != _letters(text) or (text and not ids):
            raise _unwritable(source, text, decoded)
        start = self._start_ids if special else []
        if start and ids[: len(start)] == start:
            start = []
        return Written(text, start + ids, len(start))

    def go_on(self, before: Written, text: str, source: str) -> Written:
        """The ids of a text and, after them, of what continues it.

        The first way is taken that decodes to the continuation. A tokenizer that does not give
        every text back as it was (it may lowercase, or fold white space) is held to what it makes
        of the whole instead.

        Args:
            before: the text that is continued.
            text: what continues it.
            source: for messages.

        Raises:
            DataError: no way decodes to either.
        """
        own = before.ids[before.special :]
        both, start = before.text + text, self.read(own)
        # Where white space before the boundary is lost, only the whole tells what was there.
        faithful = _last_space(start) == _last_space(before.text)
        whole, tried = self._tokens(both), list[tuple[list[int], str]]()
        for ids in filter(None, self._ways(own, whole, text)):
            read = self.read([*own, *ids])
            if read == start + text and faithful:
                return Written(both, [*before.ids, *ids], before.special)
            tried.append((ids, read))
        reference = self.read(whole)
        wanted = [reference] if _letters(reference) == _letters(both) else []
        for text_read, (ids, read) in product([*wanted, start + text], tried):
            if read == text_read:
                return Written(both, [*before.ids, *ids], before.special)
        raise _unwritable(source, both, tried[0][1] if tried else reference)

    def read(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of some ids, as the tokenizer gives it back, with nothing tidied."""
        return str(
            self.tokenizer.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def read_on(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ids add to those before them, special tokens left out.

        A tokenizer that puts a space before every text takes one away again in decoding, so ids
        decoded on their own can lack a space that they stand for.
        """
        start = self.read(before, skip_special_tokens=True)
        text = self.read([*before, *ids], skip_special_tokens=True)
        if text.startswith(start):
            return text[len(start) :]
        return self.read(ids, skip_special_tokens=True)

    @cached_property
    def markers(self) -> dict[str, int]:
        """Tokens that are never made of other text, such as ends of turns, as they are written."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {str(token): number for number, token in added if str(token).strip()}

    @cached_property
    def _start_ids(self) -> list[int]:
        """What the tokenizer puts before every text."""
        for text in _ANCHORS:
            whole: list[int] = self.tokenizer(text)["input_ids"]
            plain = self._tokens(text)
            for start in range(len(whole) - len(plain) + 1 if plain else 0):
                if whole[start : start + len(plain)] == plain:
                    return whole[:start]
        raise DataError(
            f"the tokenizer ({type(self.tokenizer).__name__}) writes a text otherwise where it "
            "adds special tokens; use one that adds them before and after it"
        )

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _ways(self, own: list[int], whole: list[int], text: str) -> Iterator[list[int]]:
        """Ids for a text that goes on after others, best first."""
        if whole[: len(own)] == own:
            yield whole[len(own) :]
        # A token of the whole spans the boundary, which a generated answer could not have, or a
        # space comes or goes beside a marker.
        pieces = [text] if self._marker is None else self._marker.split(text)
        for anchor in _ANCHORS:
            written = [self._after(anchor, piece) for piece in pieces]
            if None not in written:
                yield [token for ids in written for token in ids or ()]
        yield self._tokens(text)

    def _after(self, anchor: str, piece: str) -> list[int] | None:
        """Ids of a marker, or of other text after an anchor; None if they reach into the anchor."""
        if piece in self.markers:
            return [self.markers[piece]]
        first, both = self._tokens(anchor), self._tokens(anchor + piece)
        return both[len(first) :] if both[: len(first)] == first else None

    @cached_property
    def _marker(self) -> re.Pattern[str] | None:
        """Splits a text at its markers, and keeps them."""
        longest_first = sorted(map(re.escape, self.markers), key=len, reverse=True)
        return re.compile(f"({'|'.join(longest_first)})") if longest_first else None


def _letters(text: str) -> str:
    """What a tokenizer may not change: all but case, accents, variants, spaces and controls."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in plain if unicodedata.category(c)[0] not in "MZC")


def _last_space(text: str) -> str:
    return text[len(text.rstrip()) :]


def _unwritable(source: str, text: str, decoded: str) -> DataError:
    pairs = enumerate(zip(text, decoded, strict=False))
    end = min(len(text), len(decoded))
    place = next((position for position, (a, b) in pairs if a != b), end)
    near = slice(max(place - 10, 0), place + 15)
    return DataError(
        f"{source}: the tokenizer cannot write this: of {reprlib.repr(text[near])} it makes "
        f"{reprlib.repr(decoded[near])}; reword the row, or take it out"
    )
