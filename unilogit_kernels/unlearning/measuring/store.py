"""What has been computed of a set, on disk: written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from unilogit_kernels.unlearning.evaluation import Answer
from unilogit_kernels.unlearning.measuring.variants import Key
from unilogit_kernels.unlearning.metrics.tokens import Floats, TokenRecord

_COLUMNS = tuple(field.name for field in dataclasses.fields(TokenRecord))


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let a file appear only once it is complete.

    Args:
        path: of the file; its folder is made.
        write: writes to the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    write(unfinished)
    unfinished.replace(path)


def write_json(path: Path, content: Any, *, indent: int = 2, sort_keys: bool = False) -> None:
    """Write strict JSON; a number that is not finite is null."""
    text = json.dumps(_plain(content), indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    write_whole(path, lambda unfinished: _write_text(unfinished, text + "\n"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _plain(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(name): _plain(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    if isinstance(content, (float, np.floating)):
        return float(content) if np.isfinite(content) else None
    return content


def save_records(path: Path, records: Mapping[Key, TokenRecord]) -> None:
    """Write records to a safetensors file.

    The columns of all records lie one after the other, `[tokens]`; `end` says where each record
    ends, and the metadata's `keys` which row and variant it is of.

    Args:
        path: of the file.
        records: in their order, at least one.
    """
    tensors = {
        column: np.concatenate([getattr(record, column) for record in records.values()])
        for column in _COLUMNS
    }
    tensors["end"] = np.cumsum([len(record) for record in records.values()])
    keys = json.dumps([list(key) for key in records], ensure_ascii=False)
    write_whole(path, lambda unfinished: save_file(tensors, unfinished, {"keys": keys}))


def load_records(path: Path) -> dict[Key, TokenRecord]:
    """Read what `save_records` wrote."""
    with safe_open(path, "numpy") as file:
        columns = [file.get_tensor(column) for column in _COLUMNS]
        end = file.get_tensor("end")
        keys = json.loads(file.metadata()["keys"])
    parts = [np.split(column, end[:-1]) for column in columns]
    return {
        (row, variant): TokenRecord(*values)
        for (row, variant), *values in zip(keys, *parts, strict=True)
    }


def save_divergences(path: Path, ids: Sequence[str], found: Floats) -> None:
    """Write `[rows, 2]` divergences to a safetensors file, with the ids of their rows."""
    tensors = {"golden_to_model": found[:, 0].copy(), "model_to_golden": found[:, 1].copy()}
    names = {"ids": json.dumps(list(ids), ensure_ascii=False)}
    write_whole(path, lambda unfinished: save_file(tensors, unfinished, names))


def load_divergences(path: Path) -> Floats:
    """Read what `save_divergences` wrote: `[rows, 2]`."""
    with safe_open(path, "numpy") as file:
        columns = [file.get_tensor(n) for n in ("golden_to_model", "model_to_golden")]
    return np.stack(columns, axis=1)


def save_answers(path: Path, answers: Mapping[str, Answer]) -> None:
    """Write answers by the ids of their rows."""
    write_json(path, {name: dataclasses.asdict(answer) for name, answer in answers.items()})


def load_answers(path: Path) -> dict[str, Answer]:
    """Read what `save_answers` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: Answer(**answer) for name, answer in content.items()}
