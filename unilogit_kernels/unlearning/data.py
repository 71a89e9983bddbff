"""Rows of text as token ids and labels: reading, checking, batching.

A row is `{"prompt": ..., "completion": ...}`, where only the completion carries loss, or
`{"text": ...}`, where every token but the first does. A row may carry a `"key"`: the part of the
completion that an answer must contain to count as recalled (see `evaluation`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of tokens that carry no loss, as Hugging Face models take it."""


Features = dict[str, Tensor]
"""One example, or a batch of them, by the names the model's forward has for its arguments."""


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
    """

    prompt: str
    completion: str
    key: str | None
    source: str


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSONL file.

    Args:
        path: a UTF-8 file with one JSON object a line; blank lines are skipped.

    Returns:
        The rows, in order; at least one.

    Raises:
        DataError: no such file, not UTF-8, no rows, or a line that is not a row.
    """
    path = Path(path)
    lines = _read_text(path).splitlines()
    rows = [
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
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
    path = Path(path)
    refusals = [line for line in _read_text(path).splitlines() if line.strip()]
    if not refusals:
        raise DataError(f"{path}: holds no refusals")
    for row in forget:
        if not row.prompt:
            raise DataError(f"{row.source}: a row without a prompt cannot be refused")
    rows = []
    for number, row in enumerate(forget):
        refusal = refusals[number % len(refusals)].strip()
        # As the answer it stands for: most follow the prompt after a space.
        space = row.completion[: len(row.completion) - len(row.completion.lstrip())]
        rows.append(Row(row.prompt, space + refusal, None, f"{path} for {row.source}"))
    return rows


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from error


def _parse(line: str, source: str) -> Row:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # Numbers and nesting have limits, too.
        raise DataError(f"{source}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{source}: expected a JSON object, got {type(record).__name__}")
    if ("text" in record) == ("prompt" in record or "completion" in record):
        raise DataError(
            f'{source}: expected the fields "prompt" and "completion", or "text" alone, '
            f"got {sorted(record)}"
        )
    fields = ("text",) if "text" in record else ("prompt", "completion")
    for field in (*fields, *(("key",) if record.get("key") is not None else ())):
        if field not in record:
            raise DataError(f'{source}: field "{field}" is missing')
        if not isinstance(record[field], str):
            kind = type(record[field]).__name__
            raise DataError(f'{source}: field "{field}" must be a string, got {kind}')
        if any("\ud800" <= character <= "\udfff" for character in record[field]):
            raise DataError(f'{source}: field "{field}" holds half a surrogate pair, not text')
        if field != "prompt" and not record[field].strip():
            raise DataError(f'{source}: field "{field}" is empty')
    return Row(record.get("prompt", ""), record[fields[-1]], record.get("key"), source)


@dataclass(frozen=True)
class Example:
    """One row, encoded.

    Attributes:
        input_ids: token ids.
        labels: of the same length; -100 where a token carries no loss. Not shifted.
        truncated: whether the row was longer than `max_length`.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    def features(self) -> Features:
        """What a model is fed."""
        return {
            "input_ids": torch.tensor(self.input_ids),
            "labels": torch.tensor(self.labels),
        }


@dataclass(frozen=True)
class Encoding:
    """Decides how a row becomes token ids.

    Attributes:
        tokenizer: of the model.
        max_length: rows are cut after so many tokens.
        chat_template: put prompts through the tokenizer's chat template, as one user message.
            None: where there is one. `{"text"}` rows are always taken as they are.
        append_eos: end each row with the end-of-sequence token, which then carries loss too.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 512
    chat_template: bool | None = None
    append_eos: bool = True

    @property
    def uses_chat_template(self) -> bool:
        """Whether prompts go through the chat template."""
        if self.chat_template is None:
            return self.tokenizer.chat_template is not None
        return self.chat_template

    def prompt_ids(self, row: Row) -> list[int]:
        """The token ids that an answer to the row continues."""
        text, special = self._prompt(row)
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if special and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # Some tokenizers end every text; the row goes on.
        return ids

    def example(self, row: Row) -> Example:
        """The row as token ids and labels; labels are -100 but for the completion.

        Raises:
            DataError: no token of the completion is left within `max_length`, or the tokenizer
                makes none of it.
        """
        prompt = self.prompt_ids(row)
        text, special = self._prompt(row)
        whole: list[int] = self.tokenizer(text + row.completion, add_special_tokens=special)[
            "input_ids"
        ]
        if special and whole and whole[-1] == self.tokenizer.eos_token_id:
            whole.pop()
        if whole[: len(prompt)] != prompt:
            # A token of the whole text spans the boundary; a generated answer could not have it.
            completion = self.tokenizer(row.completion, add_special_tokens=False)["input_ids"]
            whole = prompt + completion
        if self.append_eos and self.tokenizer.eos_token_id is not None:
            whole = [*whole, self.tokenizer.eos_token_id]
        labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
        if len(prompt) == 0:
            labels[:1] = [IGNORED]  # Nothing precedes the first token, so nothing predicts it.
        labels = labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"{row.source}: of {len(whole)} tokens, {len(prompt)} of them the prompt's, none "
                f"carries loss within the {self.max_length} of max_length"
            )
        return Example(whole[: self.max_length], labels, truncated=len(whole) > self.max_length)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Every row as an example.

        Raises:
            DataError: see `example`.
        """
        return [self.example(row) for row in rows]

    def _prompt(self, row: Row) -> tuple[str, bool]:
        """The prompt as text, and whether the tokenizer is to add its special tokens."""
        if not self.uses_chat_template or not row.prompt:
            return row.prompt, True
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": row.prompt}], tokenize=False, add_generation_prompt=True
        )
        return str(text), False


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: any will do where the tokenizer has none, since padding is masked."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def collate(examples: Sequence[Features], pad_id: int) -> Features:
    """Pad examples on the right to one length.

    Args:
        examples: `labels` `[T_i]` and `input_ids` `[T_i]` or `inputs_embeds` `[T_i, H]` each, and
            what else there is per token, which is padded with 0.
        pad_id: fills `input_ids`.

    Returns:
        The same names, `[B, T, ...]`, and `attention_mask`, int64 `[B, T]`.
    """
    fill = {"input_ids": pad_id, "labels": IGNORED}
    batch = {
        name: pad_sequence([example[name] for example in examples], True, fill.get(name, 0))
        for name in examples[0]
    }
    lengths = torch.tensor([len(example["labels"]) for example in examples])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


PairIndex = tuple[int, tuple[int, ...]]
"""A forget row, and the retain rows that go with it."""


class PairedDataset(Dataset[tuple[list[Features], list[Features]]]):
    """Forget examples, each with retain examples; which ones, the index says (`PairSampler`).

    Args:
        forget: at least one example.
        retain: at least one example.
        refusals: what the model should say instead, one for each forget example; or none at all.
    """

    def __init__(
        self,
        forget: Sequence[Features],
        retain: Sequence[Features],
        refusals: Sequence[Features] = (),
    ) -> None:
        if refusals and len(refusals) != len(forget):
            raise DataError(
                f"there must be one refusal for each of the {len(forget)} forget examples, "
                f"got {len(refusals)}"
            )
        if not forget or not retain:
            raise DataError(
                f"no set may be empty: {len(forget)} forget, {len(retain)} retain examples"
            )
        self.forget, self.retain, self.refusals = forget, retain, refusals

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: PairIndex) -> tuple[list[Features], list[Features]]:
        """The refusal, where there are any, and the forget example; the retain examples."""
        forget, retain = index
        members = [self.refusals[forget]] if self.refusals else []
        return [*members, self.forget[forget]], [self.retain[position] for position in retain]


class PairSampler(Sampler[PairIndex]):
    """Shuffles the forget rows each epoch, and runs through the retain rows on their own.

    The retain rows are an endless chain of permutations that goes on from epoch to epoch, so each
    is seen equally often however many there are. Both are functions of seed and epoch alone, so a
    resumed run draws what an uninterrupted one does.

    Args:
        dataset: whose rows are drawn.
        retain_per_forget: retain rows for each forget row.
        seed: of both orders.
    """

    def __init__(self, dataset: PairedDataset, retain_per_forget: int, seed: int) -> None:
        self.forget_size, self.retain_size = len(dataset.forget), len(dataset.retain)
        self.retain_per_forget, self.seed = retain_per_forget, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.forget_size

    def __iter__(self) -> Iterator[PairIndex]:
        chain = self._retain_chain(self.epoch * self.forget_size * self.retain_per_forget)
        for forget in self._permutation("forget", self.epoch, self.forget_size):
            yield forget, tuple(next(chain) for _ in range(self.retain_per_forget))

    def _retain_chain(self, start: int) -> Iterator[int]:
        cycle, skipped = divmod(start, self.retain_size)
        while True:
            yield from self._permutation("retain", cycle, self.retain_size)[skipped:]
            cycle, skipped = cycle + 1, 0

    def _permutation(self, name: str, cycle: int, size: int) -> list[int]:
        return random.Random(f"{name}/{self.seed}/{cycle}").sample(range(size), size)
