"""Finding and reading a benchmark's files, whatever they were saved as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.records import DataError, Record, read_records
from unilogit_kernels.unlearning.rows import Row, rows_of

_ENDINGS = (".jsonl", ".json", ".parquet")

Shape = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes of a record of a benchmark's own shape one that `rows_of` takes."""


@dataclass
class Files:
    """The files of one benchmark in a folder.

    A table `raw/forget` is the first of `raw/forget.jsonl`, `raw/forget.json`,
    `raw/forget.parquet`, and the parquet files that the Hub saves a table as,
    `raw/forget-*.parquet` or `raw/forget/*.parquet`.

    Attributes:
        folder: that holds them.
        missing: what was looked for and is not there, by name, with what cannot be done without it.
    """

    folder: Path
    missing: dict[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the table is there."""
        return bool(self.paths(name))

    def paths(self, name: str) -> list[Path]:
        """The files of a table, none where it is not there."""
        for ending in _ENDINGS:
            path = self.folder / f"{name}{ending}"
            if path.is_file():
                return [path]
        parts = [*self.folder.glob(f"{name}-*.parquet"), *self.folder.glob(f"{name}/*.parquet")]
        return sorted(parts)

    def records(self, name: str) -> list[Record]:
        """The records of a table that must be there.

        Raises:
            DataError: it is not, or cannot be read.
        """
        paths = self.paths(name)
        if not paths:
            raise DataError(
                f"{self.folder / name}: no such table (as .jsonl, .json or .parquet), which the "
                "benchmark cannot do without"
            )
        return [record for path in paths for record in read_records(path)]

    def rows(self, name: str, shape: Shape | None = None) -> tuple[Row, ...]:
        """The rows of a table that must be there, each with an `id`: its own, or its position.

        Args:
            name: of the table.
            shape: what a record is made of first; objects only.

        Raises:
            DataError: the table is not there, cannot be read, or holds what is no row.
        """
        records = self.records(name)
        if shape is not None:
            records = [Record(_shaped(shape, record), record.source) for record in records]
        rows = rows_of(records, self.folder / name)
        named = [row.id for row in rows]
        if len(set(named)) == len(named) and all(named):
            return tuple(rows)
        return tuple(replace(row, id=str(place)) for place, row in enumerate(rows))

    def optional(self, name: str, without: str, shape: Shape | None = None) -> tuple[Row, ...]:
        """The rows of a table; none, and a note of it, where it is not there.

        Args:
            name: of the table.
            without: what cannot be computed without it.
            shape: see `rows`.

        Raises:
            DataError: it cannot be read, or holds what is no row.
        """
        if not self.has(name):
            self.missing[name] = without
            return ()
        return self.rows(name, shape)


def _shaped(shape: Shape, record: Record) -> Any:
    if not isinstance(record.value, dict):
        kind = type(record.value).__name__
        raise DataError(f"{record.source}: expected a JSON object, got {kind}")
    try:
        return shape(record.value)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{record.source}: not a record of this table ({type(error).__name__}: {error}), got "
            f"the fields {', '.join(sorted(map(str, record.value)))}"
        ) from error
