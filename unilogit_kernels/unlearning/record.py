"""What a run leaves in its output folder while it lasts, and what must agree to go on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import chat_template_utils

from unilogit_kernels import __version__
from unilogit_kernels.unlearning.data import Encoding, Example
from unilogit_kernels.unlearning.errors import RunError, reading

_FILE = "unlearning.json"
CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, in its output folder."""
PROCESSES = "processes"
"""The name, among a run's inputs, of how many processes shared it when it started."""
_BLOCK = 2**22
"""Bytes of a file that are read at once."""
_PARTS = ("optimizer*", "scheduler.pt", "rng_state*.pth")
"""Of a checkpoint: what the Trainer leaves as it is where there is none of it."""


@dataclass(frozen=True)
class Record:
    """What is written of a run when it starts.

    Attributes:
        settings: what it was asked for, by name.
        inputs: digests of what it was given, and versions of what runs it, by name.
        date: when it started: chat templates that print the date print this one, always.
    """

    settings: dict[str, Any]
    inputs: dict[str, str]
    date: datetime

    def write(self, output: Path, file: str = _FILE) -> None:
        """Claim the output folder.

        Args:
            output: the folder.
            file: the record's name in it.
        """
        output.mkdir(parents=True, exist_ok=True)
        content = {**vars(self), "date": self.date.isoformat()}
        (output / file).write_text(json.dumps(content, indent=2), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Record | None:
        """The record in a file, or None where there is none.

        Raises:
            RunError: it cannot be read.
        """
        if not path.exists():
            return None
        with reading(f"{path}: no record of a run; choose another output directory"):
            content = json.loads(path.read_text(encoding="utf-8"))
            settings, inputs = content["settings"], content["inputs"]
            if not isinstance(settings, dict) or not isinstance(inputs, dict):
                raise RunError(
                    f"{path}: no record of a run, or one of another version of this package"
                )
            return Record(settings, inputs, datetime.fromisoformat(content["date"]))

    def accumulation(self, started_with: int, processes: int) -> int:
        """Batches that each process takes in a step, so that a step is that of the run's start.

        Args:
            started_with: the run's gradient accumulation, in each of the processes of its start.
            processes: that go on with it.

        Raises:
            RunError: they cannot share a step's batches evenly.
        """
        before = int(self.inputs.get(PROCESSES, processes))
        each, left = divmod(before * started_with, processes)
        if left:
            raise RunError(
                f"a step of this run is {before * started_with} batches (processes: {before}, "
                f"gradient accumulation: {started_with}), which {processes} processes cannot share "
                f"evenly: start a number of them that divides {before * started_with}"
            )
        return each

    def check(self, output: Path, kind: str, now: dict[str, Any]) -> None:
        """See that a run that goes on does so with what it was started with.

        The number of processes may differ: see `accumulation`.

        Args:
            output: its folder, for the message.
            kind: `"settings"` or `"inputs"`.
            now: what it would go on with.

        Raises:
            RunError: something differs; the message names it.
        """
        before: dict[str, Any] = getattr(self, kind)
        now = {name: value for name, value in now.items() if name != PROCESSES}
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            details = ", ".join(f"{name} ({before.get(name)} -> {now[name]})" for name in changed)
            raise RunError(f"the run in {output} was started with other {kind}: {details}")


def read_record(output: Path) -> Record | None:
    """The record of the unfinished run in a folder, or None where there is no run.

    Raises:
        RunError: the folder holds a finished model, or a record that cannot be read.
    """
    with reading(f"the output {output}"):
        if (output / "config.json").exists():
            raise RunError(f"{output} already holds a model; choose another output directory")
    return Record.read(output / _FILE)


def newest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of the run in a folder, or None.

    The Trainer writes its state last, so a checkpoint without it, or with half of it, was cut short
    and is passed over. So is one whose optimizer, schedule or random state is missing: the Trainer
    would go on with new ones, without a word. DeepSpeed, which keeps them in its own way, says so
    itself.
    """
    finished: dict[int, Path] = {}
    for folder in (output / CHECKPOINTS).glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            of_deepspeed = (folder / "latest").exists()
            whole = of_deepspeed or all(any(folder.glob(part)) for part in _PARTS)
            if whole and folder.name == f"checkpoint-{state['global_step']}":
                finished[int(state["global_step"])] = folder
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return finished[max(finished)] if finished else None


def digests(
    model: PreTrainedModel,
    encoding: Encoding,
    sets: Mapping[str, Sequence[Example]],
    processes: int,
) -> dict[str, str]:
    """What a run is given, in a form that is small and changes with it.

    The weights are hashed whole, in as many threads as torch has: about a second for each GB of
    them and core, once per start.

    Args:
        model: loaded.
        encoding: of the rows.
        sets: encoded rows by name.
        processes: how many share the work.

    Returns:
        By name: a digest of each set of rows as encoded, of the weights, of the model's
        configuration and of the chat template; versions; the number of processes.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    return {
        **{f"{name} rows": _digest(_row_bytes(rows)) for name, rows in sets.items()},
        "weights": _weights_digest(model),
        "configuration": _digest([json.dumps(config, sort_keys=True, default=str).encode()]),
        "chat template": _digest([json.dumps(encoding.tokenizer.chat_template).encode()]),
        "unilogit-kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        PROCESSES: str(processes),
    }


def _row_bytes(rows: Sequence[Example]) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps([row.input_ids, row.labels]).encode()


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file: what `sha256sum` prints, so that others can check it."""
    with path.open("rb") as file:
        return _digest(iter(lambda: file.read(_BLOCK), b""))


def _weights_digest(model: PreTrainedModel) -> str:
    def of_one(named: tuple[str, Tensor]) -> bytes:
        name, weight = named
        header = f"{name} {weight.dtype} {list(weight.shape)}".encode()
        # Bytes of any dtype, without a copy where the weight lies on the CPU.
        content = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _digest([header, content.numpy().data]).encode()

    # hashlib leaves the interpreter's lock to others while it hashes.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return _digest(threads.map(of_one, sorted(model.state_dict().items())))


@contextmanager
def printing_date(date: datetime, encoding: Encoding) -> Iterator[None]:
    """Let chat templates that print the date print this one.

    transformers gives templates `strftime_now`, which asks its module's `datetime`; what is passed
    to a template as an argument cannot be a function.

    Args:
        date: what they print.
        encoding: whose template is used.

    Raises:
        RunError: the installed transformers gets the date in another way.
    """

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Fixed:
            return cls.fromtimestamp(date.timestamp(), tz)

    before = chat_template_utils.datetime  # type: ignore[attr-defined]
    chat_template_utils.datetime = Fixed  # type: ignore[attr-defined]
    try:
        if "strftime_now" in str(encoding.tokenizer.chat_template):
            _check_date(date, encoding)
        yield
    finally:
        chat_template_utils.datetime = before  # type: ignore[attr-defined]


def _check_date(date: datetime, encoding: Encoding) -> None:
    printed = encoding.tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}],
        chat_template="{{ strftime_now('%Y-%m-%d %H:%M:%S') }}",
        tokenize=False,
    )
    if printed != date.strftime("%Y-%m-%d %H:%M:%S"):
        raise RunError(
            f"the chat template prints the date, and transformers {transformers.__version__} gives "
            "no way to fix it, so that a resumed run would differ: pass --no-chat-template, or "
            "write a date into the template"
        )
