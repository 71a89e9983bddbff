"""MUSE (2407.06460): news or books to forget, as texts.

Tables in folders, as on the Hub: `raw/{forget, retain1, retain2, holdout}`,
`verbmem/forget`, `knowmem/{forget_qa, retain_qa}` and their `_icl`, `privleak/{forget, retain,
holdout}`, and for the splits `scal_N` and `sust_N` (N from 1 to 4) `scal/forget_N` and
`sust/forget_N`.

A model is unlearned with retain1 as retain set; retain2 is what else it knows.
"""

from __future__ import annotations

import re
from pathlib import Path
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
from unilogit_kernels.unlearning.rows import QUESTION

_VERBATIM = Generation(max_new_tokens=128, rouge="muse")
_ANSWER_TOKENS, _STOP = 32, ("\n\n", "\nQuestion", "Question:")

_TEXTS: tuple[tuple[str, Role, str], ...] = (
    ("forget", "forget", "membership inference and PrivLeak"),
    ("retain", "neighbours", "membership inference on the retain set"),
    ("holdout", "holdout", "membership inference and PrivLeak"),
)
_QUESTIONS: tuple[tuple[str, Role], ...] = (("forget", "forget"), ("retain", "neighbours"))


def read_muse(name: str, split: str, files: Files) -> Benchmark:
    """Read MUSE.

    Args:
        name: of the benchmark, as it was asked for: `"muse-news"` or `"muse-books"`.
        split: empty, or a fold such as `"scal_2"` or `"sust_3"`.
        files: of the folder, or of one above a folder `news` or `books`.

    Raises:
        DataError: no such split, or no forget and retain texts.
    """
    files = Files(_root(files.folder, name.partition(":")[0].removeprefix("muse-")))
    table = "raw/forget"
    if split:
        fold = re.fullmatch(r"(scal|sust)_([1-4])", split)
        if fold is None:
            raise DataError(
                f"benchmark {name!r}: a split of MUSE is scal_1 to scal_4 or sust_1 to sust_4, "
                f"not {split!r}"
            )
        table = f"{fold[1]}/forget_{fold[2]}"
    training = {"forget": files.rows(table), "retain": files.rows("raw/retain1")}
    known = files.optional("raw/retain2", "perplexity of what else the model knows")
    if known:
        training["known"] = known
    unseen = files.optional("raw/holdout", "perplexity of texts that no model saw")
    perplexity: frozenset[Measure] = frozenset(("perplexity",))
    sets = [
        *_verbatim(files),
        *_knowledge(files),
        *_membership(files),
        EvaluationSet("retain2", known, "neighbours", perplexity),
        EvaluationSet("holdout", unseen, "holdout", perplexity),
    ]
    return Benchmark(name, tuple(each for each in sets if each.rows), training, files.missing)


def _root(folder: Path, corpus: str) -> Path:
    """The folder itself, or the one in it that is named for the corpus."""
    inner = (folder / corpus, folder / f"MUSE-{corpus.title()}")
    return next((path for path in inner if path.is_dir()), folder)


def _verbatim(files: Files) -> list[EvaluationSet]:
    def shape(record: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": record["prompt"], "completion": record["gt"]}

    rows = files.optional("verbmem/forget", "verbatim memorisation", shape)
    measures: frozenset[Measure] = frozenset(("rouge", "probability", "memorization", "divergence"))
    return [EvaluationSet("forget_verbmem", rows, "forget", measures, _VERBATIM)]


def _knowledge(files: Files) -> list[EvaluationSet]:
    """Questions, after a few that are answered; they go through no chat template."""

    def shape(record: dict[str, Any]) -> dict[str, Any]:
        prompt = QUESTION.replace("{}", record["question"])
        return {"prompt": prompt, "completion": f" {record['answer']}"}

    sets = []
    for part, role in _QUESTIONS:
        rows = files.optional(f"knowmem/{part}_qa", f"knowledge of the {part} set", shape)
        shown = files.optional(
            f"knowmem/{part}_qa_icl", f"the examples before each question on the {part} set", shape
        )
        few_shot = "".join(f"{row.prompt}{row.completion}\n\n" for row in shown)
        generation = Generation(_ANSWER_TOKENS, _STOP, few_shot, "muse")
        measures: frozenset[Measure] = frozenset(("rouge", "probability", "divergence"))
        sets.append(EvaluationSet(f"{part}_knowmem", rows, role, measures, generation))
    return sets


def _membership(files: Files) -> list[EvaluationSet]:
    measures: frozenset[Measure] = frozenset(("membership", "perplexity"))
    return [
        EvaluationSet(
            f"{part}_privleak", files.optional(f"privleak/{part}", without), role, measures
        )
        for part, role, without in _TEXTS
    ]
