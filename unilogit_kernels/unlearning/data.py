"""Rows of text as token ids and labels: batches and their order, and the face of reading them.

`rows` reads files, `encoding` makes token ids of what they hold.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from unilogit_kernels.unlearning.encoding import IGNORED, Encoding, Example, Features
from unilogit_kernels.unlearning.rows import DataError, Row, read_refusals, read_rows

__all__ = [
    "IGNORED",
    "DataError",
    "Encoding",
    "Example",
    "Features",
    "FillerPair",
    "PairIndex",
    "PairSampler",
    "PairedDataset",
    "Row",
    "collate",
    "padding_id",
    "read_refusals",
    "read_rows",
]

_MASK = "attention_mask"


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
            what else there is per token, which is padded with 0. An `attention_mask` is kept:
            padding within an example, on the left too, stays masked.
        pad_id: fills `input_ids`.

    Returns:
        The same names, `[B, T, ...]`, and `attention_mask`, int64 `[B, T]`. There is none where the
        examples have `position_ids` and none of them a mask: models tell by that whether several
        texts are packed into one row, and no token attends to padding on its right.

    Raises:
        DataError: the examples differ in their columns, or a column is not one value per token.
    """
    columns = check_columns(examples, "")
    if any(_MASK in example for example in examples) or "position_ids" not in columns:
        examples = [{_MASK: torch.ones_like(e["labels"]), **e} for e in examples]
        columns = [*columns, _MASK]
    fill = {"input_ids": pad_id, "labels": IGNORED}
    batch = {
        name: pad_sequence([example[name] for example in examples], True, fill.get(name, 0))
        for name in columns
    }
    if _MASK in batch:
        batch[_MASK] = batch[_MASK].long()
    return batch


def check_columns(examples: Sequence[Features], name: str) -> list[str]:
    """The columns that every example has, but for the attention mask, which one may lack.

    Args:
        examples: at least one.
        name: of their set, for messages; may be empty.

    Raises:
        DataError: one has no labels, other columns than the first, or a column that is not one
            value per token.
    """
    name = f"{name} example".strip()
    first = sorted(examples[0].keys() - {_MASK})
    for position, example in enumerate(examples):
        columns = sorted(example.keys() - {_MASK})
        if "labels" not in columns:
            raise DataError(f"{name} {position} has no labels, only {', '.join(columns)}")
        if columns != first:
            raise DataError(
                f"{name} {position} has the columns {', '.join(columns)} where the first has "
                f"{', '.join(first)}: rows of one batch need the same"
            )
        for column, values in example.items():
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            if not isinstance(values, Tensor) or values.shape[:1] != example["labels"].shape:
                raise DataError(
                    f"{name} {position}: {column} must be a tensor with a value for each of the "
                    f"{len(example['labels'])} labels, got {shape}"
                )
    return first


def check_sets(name: str, examples: Any) -> None:
    """Check examples, or a dict of them by the name of their set; None is none.

    Args:
        name: of the argument, for messages.
        examples: see above.

    Raises:
        DataError: a set holds none, or see `check_columns`.
    """
    sets = {name: examples}
    if isinstance(examples, dict):
        sets = {f"{name} {of_set!r}": found for of_set, found in examples.items()}
    for each, found in sets.items():
        if found is not None and len(found) == 0:
            raise DataError(f"{each} holds no examples")
        if found is not None:
            check_columns(found, each)


def count_labels(example: Features) -> int:
    """How many labels of an example carry loss; the first never does, as nothing precedes it."""
    return int((example["labels"][1:] != IGNORED).sum())


PairIndex = tuple[int, tuple[int, ...]]
"""A forget row, and the retain rows that go with it."""


class FillerPair(NamedTuple):
    """A `PairIndex` that only fills a batch: its rows carry no loss, and are counted nowhere."""

    forget: int
    retain: tuple[int, ...]


class PairedDataset(Dataset[tuple[list[Features], list[Features]]]):
    """Forget examples, each with retain examples; which ones, the index says (`PairSampler`).

    A row without a label that carries loss adds nothing to a loss, nor to what it is divided by.

    Args:
        forget: at least one example, and at least one label that carries loss among them.
        retain: the same; or no example, where nothing is to be kept.
        refusals: what the model should say instead, one for each forget example; or none at all.

    Raises:
        DataError: there is no forget example, a set has no label that carries loss, there is not
            one refusal for each forget example, or the examples' columns do not go together.
    """

    def __init__(
        self,
        forget: Sequence[Features],
        retain: Sequence[Features] = (),
        refusals: Sequence[Features] = (),
    ) -> None:
        if refusals and len(refusals) != len(forget):
            raise DataError(
                f"there must be one refusal for each of the {len(forget)} forget examples, "
                f"got {len(refusals)}"
            )
        if not forget:
            raise DataError("there must be at least one forget example")
        self.forget, self.retain, self.refusals = forget, retain, refusals
        columns = {name: check_columns(examples, name) for name, examples in self._sets().items()}
        for name, found in columns.items():
            if found != columns["forget"]:
                raise DataError(
                    f"the {name} examples have the columns {', '.join(found)}, the forget examples "
                    f"{', '.join(columns['forget'])}: rows of one batch need the same"
                )
        self.without_labels = {
            name: sum(count_labels(example) == 0 for example in examples)
            for name, examples in self._sets().items()
        }
        for name, examples in self._sets().items():
            if self.without_labels[name] == len(examples):
                raise DataError(
                    f"no {name} example has a label that carries loss: all labels of the "
                    f"{len(examples)} are {IGNORED}, or belong to a first token"
                )

    def _sets(self) -> dict[str, Sequence[Features]]:
        sets = {"forget": self.forget, "retain": self.retain, "refusal": self.refusals}
        return {name: examples for name, examples in sets.items() if examples}

    def add_column(self, name: str, members: Sequence[Sequence[Tensor]]) -> None:
        """Give the examples one more column of numbers.

        Args:
            name: of the column.
            members: for each forget example its values, `[T_i]`, after those of its refusal, where
                there are refusals. Retain examples, which share their batches, get zeros.
        """

        def with_column(examples: Sequence[Features], values: Sequence[Tensor]) -> list[Features]:
            return [{**e, name: column} for e, column in zip(examples, values, strict=True)]

        like = members[0][0]
        zeros = [torch.zeros(len(e["labels"]), dtype=like.dtype) for e in self.retain]
        self.retain = with_column(self.retain, zeros)
        self.forget = with_column(self.forget, [values[-1] for values in members])
        if self.refusals:
            self.refusals = with_column(self.refusals, [values[0] for values in members])

    def forget_lengths(self) -> list[int]:
        """Tokens of each forget row, or of its refusal where that is longer."""
        members = [self.forget, self.refusals] if self.refusals else [self.forget]
        return [max(len(e["labels"]) for e in row) for row in zip(*members, strict=True)]

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: PairIndex) -> tuple[list[Features], list[Features]]:
        """The refusal, where there are any, and the forget example; the retain examples."""
        forget, retain = index
        members = [self.refusals[forget]] if self.refusals else []
        members = [*members, self.forget[forget]]
        kept = [self.retain[position] for position in retain]
        if isinstance(index, FillerPair):
            return _without_labels(members), _without_labels(kept)
        return members, kept


def _without_labels(examples: Sequence[Features]) -> list[Features]:
    return [{**e, "labels": torch.full_like(e["labels"], IGNORED)} for e in examples]


def rows_of_pairs(pairs: Sequence[tuple[list[Features], list[Features]]]) -> list[Features]:
    """The rows of a batch: refusals first, if there are any, then forget rows, then retain rows."""
    rows = [example for members in zip(*(f for f, _ in pairs), strict=True) for example in members]
    return rows + [example for _, retain in pairs for example in retain]


Pair = tuple[list[Features], list[Features]]
"""What a forget row brings into a batch: it and its refusal, and its retain rows."""


def collate_pairs(items: Sequence[Pair] | Sequence[Features], pad_id: int) -> Features:
    """A batch of `rows_of_pairs`, or, in an evaluation, of plain examples."""
    examples = [item for item in items if isinstance(item, dict)]
    pairs = [item for item in items if not isinstance(item, dict)]
    return collate(examples or rows_of_pairs(pairs), pad_id)


class PairSampler(Sampler[PairIndex]):
    """Shuffles the forget rows each epoch, and runs through the retain rows on their own.

    The retain rows are an endless chain of permutations that goes on from epoch to epoch, so each
    is seen equally often however many there are. Both are functions of seed and epoch alone, so a
    resumed run draws what an uninterrupted one does.

    Processes that share an epoch take whole batches of it in turn. Where its rows run out, pairs
    without loss fill the last ones, so that no row counts twice and a step is that of one process.

    Args:
        dataset: whose rows are drawn.
        retain_per_forget: retain rows for each forget row, 0 for none.
        seed: of both orders.
        multiple_of: what the number of pairs is filled up to a multiple of.
        sorted_span: so many pairs that follow each other are made of the same rows, but those
            sorted by length, the longest first: batches then hold rows of about one length.
    """

    def __init__(
        self,
        dataset: PairedDataset,
        retain_per_forget: int,
        seed: int,
        multiple_of: int = 1,
        sorted_span: int = 1,
    ) -> None:
        self.forget_size, self.retain_size = len(dataset.forget), len(dataset.retain)
        self.retain_per_forget, self.seed, self.multiple_of = retain_per_forget, seed, multiple_of
        self.sorted_span, self.epoch = sorted_span, 0
        self._forget_lengths, self._retain_lengths = list[int](), list[int]()
        if sorted_span > 1:
            self._forget_lengths = dataset.forget_lengths()
            self._retain_lengths = [len(example["labels"]) for example in dataset.retain]

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.forget_size // self.multiple_of) * self.multiple_of

    def __iter__(self) -> Iterator[PairIndex]:
        each = self.retain_per_forget
        chain = self._retain_chain(self.epoch * self.forget_size * each)
        order = self._permutation("forget", self.epoch, self.forget_size)
        for start in range(0, self.forget_size, self.sorted_span):
            forget = order[start : start + self.sorted_span]
            retain = [next(chain) for _ in range(len(forget) * each)]
            if self.sorted_span > 1:
                forget.sort(key=self._forget_lengths.__getitem__, reverse=True)
                retain.sort(key=self._retain_lengths.__getitem__, reverse=True)
            for at, row in enumerate(forget):
                yield row, tuple(retain[at * each : (at + 1) * each])
        for _ in range(len(self) - self.forget_size):
            yield FillerPair(0, (0,) * self.retain_per_forget)

    def _retain_chain(self, start: int) -> Iterator[int]:
        cycle, skipped = divmod(start, max(self.retain_size, 1))
        while True:
            yield from self._permutation("retain", cycle, self.retain_size)[skipped:]
            cycle, skipped = cycle + 1, 0

    def _permutation(self, name: str, cycle: int, size: int) -> list[int]:
        return random.Random(f"{name}/{self.seed}/{cycle}").sample(range(size), size)
