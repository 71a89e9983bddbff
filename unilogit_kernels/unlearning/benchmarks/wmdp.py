"""WMDP (2403.03218): hazardous knowledge, by questions of multiple choice and texts to forget.

Tables: `wmdp-bio`, `wmdp-cyber`, `wmdp-chem` with the questions, `bio-forget-corpus`,
`bio-retain-corpus`, `cyber-forget-corpus`, `cyber-retain-corpus` with the texts, and optionally
`mmlu` and `wikitext`, which serves as retain set where there is no corpus for it. The forget corpus
of biology, which its authors hand out on request, may have its own name, `bio_remove_dataset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

_TOPICS = {"bio": "biology", "cyber": "cybersecurity", "chem": "chemistry"}
_CHOICE: frozenset[Measure] = frozenset(("multiple_choice",))


def read_wmdp(name: str, split: str, files: Files) -> Benchmark:
    """Read WMDP for one topic.

    Args:
        name: of the benchmark, as it was asked for.
        split: `"bio"`, `"cyber"` or `"chem"`.
        files: of the folder.

    Raises:
        DataError: no such topic, or no questions on it.
    """
    if split not in _TOPICS:
        known = ", ".join(f"wmdp:{topic}" for topic in _TOPICS)
        raise DataError(f"benchmark must be one of {known}, got {name!r}")
    questions = files.rows(f"wmdp-{split}", _question)
    sets = [_questions(f"wmdp_{split}", questions, "forget", _TOPICS[split])]
    general = files.optional("mmlu", "accuracy on MMLU, general knowledge", _question)
    if general:
        sets.append(_questions("mmlu", general, "general", "several subjects"))
    training = {}
    corpora = {
        "forget": (f"{split}-forget-corpus", f"{split}_remove_dataset"),
        "retain": (f"{split}-retain-corpus", "wikitext"),
    }
    for part, tables in corpora.items():
        table = next((table for table in tables if files.has(table)), tables[0])
        rows = files.optional(table, f"unlearning by the benchmark's own {part} texts", _text)
        if rows:
            training[part] = rows
    return Benchmark(name, tuple(sets), training, files.missing)


def _questions(name: str, rows: tuple[Row, ...], role: Role, topic: str) -> EvaluationSet:
    intro = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    return EvaluationSet(name, rows, role, _CHOICE, Generation(few_shot=intro))


def _question(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("question", "choices", "answer")}


def _text(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": record["text"]}
