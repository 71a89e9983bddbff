"""The texts of a row that a model is to judge: its answer, the same in other words, wrong ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from unilogit_kernels.unlearning.benchmarks.sets import EvaluationSet
from unilogit_kernels.unlearning.data import Encoding, Example, Row
from unilogit_kernels.unlearning.errors import reading

ANSWER, PARAPHRASE, WRONG, CHOICE = "answer", "paraphrase", "wrong", "choice"
"""Names of variants; the last two are followed by `/` and a number."""

Key = tuple[str, str]
"""The id of a row, and the name of a variant."""


def row_id(row: Row, position: int) -> str:
    """What names a row in its set: its id, or where it stands."""
    return row.id or str(position)


def asked_rows(each: EvaluationSet) -> list[Row]:
    """The rows of a set as a model is asked them: after the examples of few-shot prompting."""
    prefix = each.generation.few_shot
    if not prefix:
        return list(each.rows)
    return [dataclasses.replace(row, prompt=prefix + row.prompt) for row in each.rows]


def variants(each: EvaluationSet) -> dict[Key, Row]:
    """Every text of a set that its measures need, each as a row of its own, in order.

    A question whose right answers are several and not lettered offers all of them and the wrong
    ones: see `offered`.
    """
    found: dict[Key, Row] = {}
    plain = each.measures - {"multiple_choice"}
    compared = bool(each.measures & {"probability", "truth_ratio"})
    for position, row in enumerate(asked_rows(each)):
        name = row_id(row, position)
        if plain:
            found[name, ANSWER] = row
        if compared and row.paraphrase is not None:
            found[name, PARAPHRASE] = dataclasses.replace(row, completion=row.paraphrase)
        if compared:
            found.update(_numbered(name, row, WRONG, row.wrong))
        if "multiple_choice" in each.measures:
            found.update(_numbered(name, row, CHOICE, offered(row)[0]))
    return found


def offered(row: Row) -> tuple[tuple[str, ...], frozenset[int]]:
    """What a question of multiple choice offers, and the positions of what is right.

    Its choices; or, where it has none, all its right answers and then the wrong ones.
    """
    if row.choices:
        return row.choices, frozenset(() if row.choice is None else (row.choice,))
    right = (row.completion, *row.answers)
    return ((*right, *row.wrong), frozenset(range(len(right)))) if row.wrong else ((), frozenset())


def _numbered(name: str, row: Row, kind: str, texts: Sequence[str]) -> dict[Key, Row]:
    return {
        (name, f"{kind}/{number}"): dataclasses.replace(row, completion=text)
        for number, text in enumerate(texts)
    }


def encode_variants(
    encoding: Encoding, each: EvaluationSet, *, in_blocks: bool
) -> dict[Key, tuple[Example, ...]]:
    """The variants of a set as examples: with their end, but for choices.

    Args:
        encoding: of the model's tokenizer.
        each: the set.
        in_blocks: show a text that is too long for one example in several, so that all of it
            counts. Otherwise it is cut.

    Raises:
        RunError, DataError: a row cannot be encoded; the message names it.
    """
    endless = dataclasses.replace(encoding, append_eos=False)
    found: dict[Key, tuple[Example, ...]] = {}
    for key, row in variants(each).items():
        used = endless if key[1].startswith(f"{CHOICE}/") else encoding
        with reading(f"{row.source}: the tokenizer or its chat template fails on this row"):
            whole = in_blocks and not row.prompt
            found[key] = tuple(used.blocks(row)) if whole else (used.example(row),)
    return found
