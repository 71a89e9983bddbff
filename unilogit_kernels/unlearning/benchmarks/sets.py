"""What a benchmark consists of: sets of rows, what is measured on each, how answers are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from unilogit_kernels.unlearning.rows import Row

Role = Literal["forget", "retain", "holdout", "neighbours", "general", "paraphrase"]
"""What a set is to the model: what is to be forgotten, what the retain loss saw, what no model was
trained on, what it knows and no unlearning batch contains, general knowledge, or the rows to forget
in other words."""

Measure = Literal[
    "probability",
    "rouge",
    "truth_ratio",
    "memorization",
    "membership",
    "key_recall",
    "multiple_choice",
    "perplexity",
    "divergence",
]
"""What can be measured on a set."""

RougeConvention = Literal["tofu", "muse", "rwku", "words"]
"""Whose ROUGE: each of three benchmarks has its own; `"words"` is that of any script."""

ROLES: tuple[Role, ...] = get_args(Role)
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Generation:
    """How answers are generated, always greedily, and compared.

    Attributes:
        max_new_tokens: of an answer; None for a little more than the longest completion has.
        stop: texts that end an answer.
        few_shot: text before each prompt, which the prompts of the rows do not hold.
        rouge: the convention of ROUGE.
    """

    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    few_shot: str = ""
    rouge: RougeConvention = "words"


@dataclass(frozen=True)
class EvaluationSet:
    """Rows that belong together in an evaluation.

    Attributes:
        name: within the benchmark, such as `"forget"` or `"real_authors"`.
        rows: at least one, each with an `id` that no other row of the set has.
        role: what the rows are to the model.
        measures: what is measured on them.
        generation: how answers to them are made.
    """

    name: str
    rows: tuple[Row, ...]
    role: Role
    measures: frozenset[Measure]
    generation: Generation = field(default_factory=Generation)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, read from local files.

    Attributes:
        name: as it was asked for, such as `"tofu:forget10"`.
        sets: in the order of the report.
        training: the rows that models are trained on: `"forget"` and `"retain"`; and `"known"`,
            which a model is taught with the retain rows, and no unlearning batch contains.
        missing: files that are not there, by their path within the data directory, and what cannot
            be computed without each.
    """

    name: str
    sets: tuple[EvaluationSet, ...]
    training: Mapping[str, tuple[Row, ...]]
    missing: Mapping[str, str]
