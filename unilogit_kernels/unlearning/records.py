"""What data files hold, record by record: JSONL, JSON arrays and parquet."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class DataError(ValueError):
    """A file of rows cannot be used; the message names the file, the line and the field."""


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        value: what it holds, as JSON has it: usually an object.
        source: file and line, or file and row, for messages.
    """

    value: Any
    source: str


def read_records(path: str | Path) -> list[Record]:
    """Every record of a file, in order.

    A file whose name ends in `.parquet` is a table; one that begins with `[` is a JSON array; any
    other one is JSONL: one JSON value a line, blank lines skipped.

    Args:
        path: of a file; text is UTF-8.

    Raises:
        DataError: no such file, not UTF-8, not JSON, or a table and no package that reads it.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return _table(path)
    text = _text(path)
    if not text.lstrip("\ufeff \t\r\n").startswith("["):
        return [Record(_load(line, source), source) for line, source in _lines(text, path)]
    values = _load(text.lstrip("\ufeff"), str(path))
    return [Record(value, f"{path}, row {row}") for row, value in enumerate(values, start=1)]


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """The lines of a UTF-8 text that are not blank, each with file and line for messages.

    Raises:
        DataError: no such file, or not UTF-8.
    """
    return list(_lines(_text(Path(path)), Path(path)))


def check_characters(text: str, what: str) -> None:
    """Refuse what is no text to a tokenizer: half a surrogate pair, or NUL.

    Raises:
        DataError: there is one; the message begins with `what` and names the place.
    """
    for position, character in enumerate(text):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            kind = "NUL" if character == "\0" else f"half a surrogate pair (\\u{ord(character):x})"
            raise DataError(f"{what} holds {kind} at character {position + 1}; remove it")


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        content = path.read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: not UTF-8 in line {line} ({error.reason})") from error


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """Lines as JSONL has them.

    Only a line feed ends one: what else Unicode calls a line break, such as U+2028, may stand in a
    string. A byte order mark may begin each line, since files that have one get concatenated.
    """
    for number, ended in enumerate(text.split("\n"), start=1):
        line = ended.removeprefix("\ufeff").removesuffix("\r")
        if line.strip():
            yield line, f"{path}, line {number}"


def _load(text: str, source: str) -> Any:
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
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{source}: not JSON ({error.msg}: {line}column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # A number too long, or brackets too deep.
        raise DataError(f"{source}: not JSON that can be read ({error})") from error


def _table(path: Path) -> list[Record]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        # As `datasets` does, which would leave a copy of the rows in its cache.
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path}: parquet is read by the package 'pyarrow', which is missing; run: "
            "pip install 'unilogit-kernels[parquet]', or write the file as JSONL"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # Whatever the reader of tables comes across.
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not parquet that can be read ({reason})") from error
    return [Record(value, f"{path}, row {row}") for row, value in enumerate(rows, start=1)]
