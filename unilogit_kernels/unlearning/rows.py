"""Rows of text, read from files and checked.

A row is `{"prompt": ..., "completion": ...}`, where only the completion carries loss, or
`{"text": ...}`, where every token but the first does. A row may carry a `"key"`: the part of the
completion that an answer must contain to count as recalled (see `recall`).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.recall import fold


class DataError(ValueError):
    """A file of rows cannot be used; the message names the file, the line and the field."""


@dataclass(frozen=True)
class Row:
    """One line of a data file.

    Attributes:
        prompt: what the completion continues; empty for a `{"text"}` row.
        completion: the text that carries the loss.
        key: what an answer must contain to count as recalled, or None.
        source: file and line, for messages.
        alternates: what to answer instead, for method `altpo`.
    """

    prompt: str
    completion: str
    key: str | None
    source: str
    alternates: tuple[str, ...] = ()


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSONL file.

    Args:
        path: a UTF-8 file with one JSON object a line; blank lines are skipped.

    Returns:
        The rows, in order; at least one.

    Raises:
        DataError: no such file, not UTF-8, no rows, or a line that is not a row.
    """
    rows = [_parse(line, source) for line, source in _read_lines(Path(path))]
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def read_refusals(path: str | Path, forget: Sequence[Row]) -> list[Row]:
    """What to answer instead: a refusal for the prompt of each row to forget, taken in turn.

    Args:
        path: a UTF-8 text file with one refusal a line; blank lines are skipped.
        forget: the rows to forget, all with a prompt.

    Raises:
        DataError: no such file, not UTF-8, no lines, or a row without a prompt.
    """
    refusals = []
    for line, source in _read_lines(Path(path)):
        _check_characters(line, f"{source}: the refusal")
        refusals.append(line.strip())
    if not refusals:
        raise DataError(f"{path}: holds no refusals")
    for row in forget:
        if not row.prompt:
            raise DataError(f"{row.source}: a row without a prompt cannot be refused")
    rows = []
    for number, row in enumerate(forget):
        refusal = refusals[number % len(refusals)]
        # As the answer it stands for: most follow the prompt after a space.
        space = row.completion[: len(row.completion) - len(row.completion.lstrip())]
        rows.append(Row(row.prompt, space + refusal, None, f"{path} for {row.source}"))
    return rows


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a UTF-8 file that are not blank, each with file and line for messages.

    Only a line feed ends a line, as JSONL has it: what else Unicode calls a line break, such as
    U+2028, may stand in a string. A byte order mark may begin each line, since files that have one
    get concatenated.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: not UTF-8 in line {line} ({error.reason})") from error
    for number, ended in enumerate(text.split("\n"), start=1):
        line_text = ended.removeprefix("\ufeff").removesuffix("\r")
        if line_text.strip():
            yield line_text, f"{path}, line {number}"


def _parse(line: str, source: str) -> Row:
    record = _load(line, source)
    if not isinstance(record, dict):
        raise DataError(f"{source}: expected a JSON object, got {type(record).__name__}")
    if ("text" in record) == ("prompt" in record or "completion" in record):
        raise DataError(
            f'{source}: expected the fields "prompt" and "completion", or "text" alone, '
            f"got {reprlib.repr(sorted(record))}"
        )
    fields = ("text",) if "text" in record else ("prompt", "completion")
    for field in (*fields, *(("key",) if record.get("key") is not None else ())):
        if field not in record:
            raise DataError(f'{source}: field "{field}" is missing')
        value = record[field]
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(f'{source}: field "{field}" must be a string, got {kind}')
        _check_characters(value, f'{source}: field "{field}"')
        if field != "prompt" and not value.strip():
            raise DataError(f'{source}: field "{field}" is empty')
    key = record.get("key")
    if key is not None and not fold(key):
        raise DataError(f'{source}: field "key" has no visible character')
    alternates = _alternates(record.get("alternate"), source)
    return Row(record.get("prompt", ""), record[fields[-1]], key, source, alternates)


def _alternates(given: Any, source: str) -> tuple[str, ...]:
    texts = given if isinstance(given, list) else [] if given is None else [given]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f'{source}: field "alternate" must be a text or a list of texts, got '
                f"{reprlib.repr(given)}"
            )
        _check_characters(text, f'{source}: field "alternate"')
    return tuple(texts)


def _load(line: str, source: str) -> Any:
    """One value of strict JSON: no NaN or Infinity, and no name twice in an object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise DataError(f"{source}: field {reprlib.repr(name)} is given twice")
            found[name] = value
        return found

    def refuse(constant: str) -> None:
        raise DataError(f"{source}: not JSON ({constant} is no JSON number)")

    try:
        return json.loads(line, object_pairs_hook=unique, parse_constant=refuse)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not JSON ({error.msg}: column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # A number too long, or brackets too deep.
        raise DataError(f"{source}: not JSON that can be read ({error})") from error


def _check_characters(text: str, what: str) -> None:
    """Refuse what is no text to a tokenizer: half a surrogate pair, or NUL."""
    for position, character in enumerate(text):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            kind = "NUL" if character == "\0" else f"half a surrogate pair (\\u{ord(character):x})"
            raise DataError(f"{what} holds {kind} at character {position + 1}; remove it")
