"""Sets of rows from a user's own files: what they are to the model, and what they allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from unilogit_kernels.unlearning.benchmarks.sets import (
    EvaluationSet,
    Generation,
    Measure,
    Role,
)
from unilogit_kernels.unlearning.data import Row
from unilogit_kernels.unlearning.measuring.variants import row_id

_ROLES: tuple[tuple[str, Role], ...] = (
    ("paraphrase", "paraphrase"),
    ("forget", "forget"),
    ("retain", "retain"),
    ("holdout", "holdout"),
    ("neighbo", "neighbours"),
)
"""Parts of a set's name, and the role that it tells of; the first that is found counts."""


def role_of(name: str) -> Role:
    """What a set of this name is to the model: general knowledge if the name says nothing else.

    Example:
        >>> role_of("forget"), role_of("forget_paraphrase"), role_of("capitals")
        ('forget', 'paraphrase', 'general')
    """
    return next((role for part, role in _ROLES if part in name.lower()), "general")


def sets_of_rows(
    rows: Mapping[str, Sequence[Row]], generation: Generation | None = None
) -> tuple[EvaluationSet, ...]:
    """Everything that can be measured on some rows, by the fields that they have.

    Args:
        rows: of each set, by a name that tells its role: see `role_of`.
        generation: how answers are made; by default as `Generation` has it.
    """
    return tuple(
        EvaluationSet(
            name,
            tuple(dataclasses.replace(row, id=row_id(row, n)) for n, row in enumerate(each)),
            role_of(name),
            measures_of(each, role_of(name)),
            generation or Generation(),
        )
        for name, each in rows.items()
    )


def measures_of(rows: Sequence[Row], role: Role) -> frozenset[Measure]:
    """What the fields of rows allow to measure; a field that only some have counts for those."""
    found: set[Measure] = {"probability", "divergence"}
    if all(row.choices for row in rows):
        found.add("multiple_choice")
    elif any(row.prompt for row in rows):
        found.add("rouge")
    if not any(row.prompt for row in rows):
        found.add("perplexity")
    if all(row.wrong for row in rows):
        found.add("truth_ratio")
    if any(row.key is not None and row.prompt for row in rows):
        found.add("key_recall")
    if role in ("forget", "holdout"):
        found.add("membership")
    if role in ("forget", "retain", "neighbours"):
        found.add("memorization")
    return frozenset(found)
