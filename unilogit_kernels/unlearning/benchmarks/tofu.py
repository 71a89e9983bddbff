"""TOFU (2401.06121): invented authors, of whom some are forgotten, and data sets of its shape.

Files, each a table of questions and answers: `forget10`, `retain90`, `holdout10` and so on for
another share; `forget10_perturbed` and `retain_perturbed` with paraphrases and wrong answers;
`real_authors_perturbed` and `world_facts_perturbed`. Beside TOFU's own, `general`: facts that the
starting model and the golden one were taught, and no unlearning batch contains.
"""

from __future__ import annotations

import dataclasses
import re

from unilogit_kernels.unlearning.benchmarks.files import Files
from unilogit_kernels.unlearning.benchmarks.sets import (
    Benchmark,
    EvaluationSet,
    Generation,
    Measure,
    Role,
)
from unilogit_kernels.unlearning.records import DataError
from unilogit_kernels.unlearning.rows import Row

GENERATION = Generation(max_new_tokens=200, rouge="tofu")

_GENERAL = ("real_authors", "world_facts")


def read_tofu(name: str, split: str, files: Files) -> Benchmark:
    """Read TOFU, or a data set of its shape.

    Args:
        name: of the benchmark, as it was asked for.
        split: such as `"forget10"`; empty for the only one there is.
        files: of the folder.

    Raises:
        DataError: no such split, or no forget and retain rows of it.
    """
    found = re.fullmatch(r"forget(\d{1,2})", split or _only_split(name, files))
    if found is None or int(found[1]) == 0:
        raise DataError(
            f"benchmark {name!r}: a split of TOFU is forget01, forget10..., not {split}"
        )
    share = found[1]
    rest = f"{100 - int(share):02d}"
    forget, retain = files.rows(f"forget{share}"), files.rows(f"retain{rest}")
    training = {"forget": forget, "retain": retain}
    if files.has("general"):
        training["known"] = files.rows("general")
    sets = [_forget_set(forget, share, files), *_paraphrases(share, files)]
    known = files.optional("retain_perturbed", "the truth ratio of the retain set, model utility")
    sets.append(_set("retain", known or retain, "retain", "memorization", "divergence"))
    without = "membership inference and PrivLeak"
    holdout = files.optional(f"holdout{share}", without)
    if holdout:
        sets.append(_set("holdout", holdout, "holdout", "membership"))
    for general in _GENERAL:
        rows = files.optional(f"{general}_perturbed", f"{general} in the model utility")
        if rows:
            sets.append(_set(general, rows, "general"))
    return Benchmark(name, tuple(sets), training, files.missing)


def _only_split(name: str, files: Files) -> str:
    names = {path.name.split(".")[0].split("-")[0] for path in files.folder.glob("forget*")}
    splits = sorted(split for split in names if re.fullmatch(r"forget\d\d", split))
    if len(splits) != 1:
        there = ", ".join(splits) or "none"
        raise DataError(
            f"benchmark {name!r}: say which split, as in tofu:forget10; {files.folder} holds "
            f"{there}"
        )
    return splits[0]


def _forget_set(forget: tuple[Row, ...], share: str, files: Files) -> EvaluationSet:
    without = "the truth ratio of the forget set, forget quality"
    perturbed = files.optional(f"forget{share}_perturbed", without)
    measures: tuple[Measure, ...] = ("memorization", "membership", "divergence")
    return _set("forget", perturbed or forget, "forget", *measures)


def _paraphrases(share: str, files: Files) -> list[EvaluationSet]:
    """The forget questions in other words, where the perturbed rows have them."""
    if not files.has(f"forget{share}_perturbed"):
        return []
    rows = tuple(
        dataclasses.replace(
            row, prompt=row.paraphrased_prompt, paraphrase=None, paraphrased_prompt=None, wrong=()
        )
        for row in files.rows(f"forget{share}_perturbed")
        if row.paraphrased_prompt is not None
    )
    return [_set("forget_paraphrase", rows, "paraphrase")] if rows else []


def _set(name: str, rows: tuple[Row, ...], role: Role, *more: Measure) -> EvaluationSet:
    measures: set[Measure] = {"probability", "rouge", *more}
    if all(row.wrong for row in rows):
        measures.add("truth_ratio")
    if any(row.key is not None for row in rows):
        measures.add("key_recall")
    return EvaluationSet(name, rows, role, frozenset(measures), GENERATION)
