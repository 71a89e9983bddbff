"""Rows of text as token ids and labels: batches and their order, and the face of reading them.

`rows` reads files, `encoding` makes token ids of what they hold.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
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
    "PairIndex",
    "PairSampler",
    "PairedDataset",
    "Row",
    "collate",
    "padding_id",
    "read_refusals",
    "read_rows",
]


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
