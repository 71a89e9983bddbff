"""What an evaluation is asked for, and what watches over it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unilogit_kernels.unlearning.benchmarks.sets import EvaluationSet
from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.limits import check_choice, check_numbers
from unilogit_kernels.unlearning.measuring.set_metrics import CONVENTIONS, OURS
from unilogit_kernels.unlearning.measuring.variants import row_id


@dataclass(frozen=True)
class Request:
    """Which models are measured on what, and how.

    Attributes:
        model: directory or Hub id of the causal LM that is judged.
        sets: what it is measured on, each with another name.
        output: folder for results and for what they are computed from.
        benchmark: the name of the benchmark that the sets are of; empty for a user's own.
        lacking: files that the benchmark lacks, and what cannot be computed without each.
        golden: directory or Hub id of a model that never saw the rows to forget, or the file or
            folder of its results; None without.
        starting: the same of the model before unlearning, which is measured beside.
        convention: one of `CONVENTIONS`.
        batch_size: rows in one forward.
        max_length: rows are cut after so many tokens.
        chat_template: see `Encoding`.
        template_arguments: see `Encoding`.
        dtype: of the weights, a key of `loading.DTYPES`.
        generate: also answer the prompts.
        allow_missing_weights: see `load_model`.
    """

    model: str
    sets: tuple[EvaluationSet, ...]
    output: Path
    benchmark: str = ""
    lacking: Mapping[str, str] = dataclasses.field(default_factory=dict)
    golden: str | None = None
    starting: str | None = None
    convention: str = OURS
    batch_size: int = 16
    max_length: int = 512
    chat_template: bool | None = None
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    generate: bool = True
    allow_missing_weights: bool = False

    def recorded(self) -> dict[str, Any]:
        """What must be the same for an evaluation to be gone on with, for JSON."""
        left_out = ("sets", "output", "lacking", "batch_size", "model", "golden", "starting")
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        of_sets = {f"set {each.name}": _described(each) for each in self.sets}
        return {**values, "template_arguments": dict(self.template_arguments), **of_sets}

    def check(self) -> None:
        """See that it can be done.

        Raises:
            RunError: there are no sets, two of one name, two rows of one id in a set, or an option
                has no such value.
        """
        names = [each.name for each in self.sets]
        if not names:
            raise RunError("there is nothing to measure: no set of rows was given")
        for name in names:
            if names.count(name) > 1:
                raise RunError(f"there are two sets of rows named {name!r}")
        for each in self.sets:
            ids = Counter(row_id(row, position) for position, row in enumerate(each.rows))
            name, times = ids.most_common(1)[0]
            if times > 1:
                raise RunError(f"{times} rows of {each.name!r} have the id {name!r}: give each one")
        try:
            check_numbers(vars(self))
            check_choice("convention", self.convention, CONVENTIONS)
        except ValueError as error:
            raise RunError(str(error)) from error


def _described(each: EvaluationSet) -> str:
    """What is done with a set, in a line."""
    how = each.generation
    asked = f"answers of {how.max_new_tokens} tokens to {list(how.stop)}, ROUGE {how.rouge}"
    return f"{each.role}: {', '.join(sorted(each.measures))}; {asked}"


class Watcher(Protocol):
    """Is told how an evaluation goes on."""

    def begin(self, what: str, total: int) -> None:
        """A stage begins.

        Args:
            what: of which model and set.
            total: examples in it.
        """

    def advance(self, done: int) -> None:
        """So many more examples of it are done."""

    def note(self, message: str) -> None:
        """Something that a user should know."""
