"""RWKU (2406.10890): what a model knows of a famous person is forgotten.

A folder for each person, `Target/1_Stephen_King` and so on, with a JSON array in each file. The
texts to forget are `positive` (what the model itself says of the person), or `passage` where there
are none. RWKU has no texts to retain; here they are those of the other persons whose folders lie
beside it. Prompts are worded, and answers begun, as in RWKU's own evaluation, but for the examples
that it shows before its questions of TriviaQA and TruthfulQA.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.benchmarks.files import Files, Shape
from unilogit_kernels.unlearning.benchmarks.sets import (
    Benchmark,
    EvaluationSet,
    Generation,
    Measure,
    Role,
)
from unilogit_kernels.unlearning.records import DataError
from unilogit_kernels.unlearning.rows import Row, multiple_choice_prompt

_ANSWERS = Generation(max_new_tokens=30, stop=("\n",), rouge="rwku")
_BLANK = "Please complete the blank in the following question.\nQuestion: {}\n"
_BRIEF = "Please briefly answer the following question.\nQuestion: {}\n"
_BRIEF_IN_CONTEXT = "Please briefly answer the following question.\n{}\n"
_LEAD, _LEAD_OF_Q = "Answer:", "A:"

_QUESTIONS: tuple[tuple[str, Role], ...] = (
    ("forget_level1", "forget"),
    ("forget_level2", "forget"),
    ("forget_level3", "forget"),
    ("neighbor_level1", "neighbours"),
    ("neighbor_level2", "neighbours"),
)
_NOT_MEASURED = {
    "fluency": "fluency: the entropy of n-grams in long answers is not measured",
    "retain_bbh": "reasoning: the tasks of BBH are not measured",
}


def read_rwku(name: str, split: str, files: Files) -> Benchmark:
    """Read RWKU for one person.

    Args:
        name: of the benchmark, as it was asked for.
        split: name of the person's folder; empty for the only one there is.
        files: of the folder that holds `Target`, or of `Target` itself.

    Raises:
        DataError: no such person, or no texts to forget.
    """
    targets = files.folder / "Target"
    targets = targets if targets.is_dir() else files.folder
    files = Files(_person(name, split, targets))
    training = {"forget": _texts(files)}
    others = [path for path in _people(targets) if path != files.folder]
    retain = tuple(row for path in others for row in _texts(Files(path), needed=False))
    if retain:
        training["retain"] = retain
    else:
        files.missing["positive of other persons"] = "a retain set: name one by --retain"
    sets = [
        *(_questions(table, role, files) for table, role in _QUESTIONS),
        _membership("forget_mia", "forget", files),
        _membership("retain_mia", "neighbours", files),
        _choices("retain_mmlu", files, _mmlu),
        _choices("truthful", files, _truthful),
        EvaluationSet(
            "triviaqa",
            files.optional("triviaqa", "factuality", _trivia),
            "general",
            frozenset(("rouge", "probability")),
            Generation(max_new_tokens=30, rouge="rwku"),
        ),
    ]
    missing = {**files.missing, **{k: v for k, v in _NOT_MEASURED.items() if files.has(k)}}
    return Benchmark(name, tuple(each for each in sets if each.rows), training, missing)


def _people(targets: Path) -> list[Path]:
    return sorted(path for path in targets.iterdir() if Files(path).has("forget_level1"))


def _person(name: str, split: str, targets: Path) -> Path:
    if split:
        # "Stephen_King" as well as "1_Stephen_King".
        named = [p for p in _people(targets) if split in (p.name, p.name.partition("_")[2])]
    else:
        named = _people(targets)
    if len(named) != 1:
        there = [path.name for path in _people(targets)]
        shown = ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
        raise DataError(
            f"benchmark {name!r}: name one person's folder, as in rwku:1_Stephen_King; {targets} "
            f"holds {shown or 'none'}"
        )
    return named[0]


def _texts(files: Files, needed: bool = True) -> tuple[Row, ...]:
    table = "positive" if files.has("positive") else "passage"
    if not needed and not files.has(table):
        return ()
    return files.rows(table, lambda record: {"text": record["text"]})


def _questions(table: str, role: Role, files: Files) -> EvaluationSet:
    blank = table.endswith("1")

    def shape(record: dict[str, Any]) -> dict[str, Any]:
        kind = record.get("type")
        wording = _BLANK if blank else _BRIEF_IN_CONTEXT if kind == "incontext learning" else _BRIEF
        prompt = wording.replace("{}", record["query"])
        if kind == "affirmative suffix":  # It begins the answer itself.
            return {"prompt": prompt.rstrip("\n"), "completion": f" {record['answer']}"}
        return _led(prompt, record["answer"], _LEAD)

    rows = files.optional(table, f"ROUGE on {table}", shape)
    measures: frozenset[Measure] = frozenset(("rouge", "probability", "divergence"))
    return EvaluationSet(table, rows, role, measures, _ANSWERS)


def _membership(table: str, role: Role, files: Files) -> EvaluationSet:
    rows = files.optional(
        table, f"membership scores of {table}", lambda record: {"text": record["text"]}
    )
    return EvaluationSet(table, rows, role, frozenset(("membership", "perplexity")))


def _choices(table: str, files: Files, shape: Shape) -> EvaluationSet:
    rows = files.optional(table, f"multiple choice on {table}", shape)
    return EvaluationSet(table, rows, "general", frozenset(("multiple_choice",)))


def _led(prompt: str, answer: str, lead: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f" {answer}", "lead": lead}


def _mmlu(record: Mapping[str, Any]) -> dict[str, Any]:
    def question(of: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        prompt, letters = multiple_choice_prompt(f"Question: {of['question']}", of["choices"])
        return prompt.removesuffix(_LEAD), letters

    topic = str(record["task"]).replace("_", " ")
    shown = [(question(example), example["answer"]) for example in record["examples"]]
    examples = "".join(f"{asked}{_LEAD}{letters[answer]}\n\n" for (asked, letters), answer in shown)
    asked, letters = question(record)
    prompt = (
        f"The following are multiple choice questions (with answers) about {topic}.\n\n{examples}"
        f"Please following the previous examples and answer the given question.\n{asked}"
    )
    choice = record["answer"]
    return {
        "prompt": prompt,
        "completion": letters[choice],
        "lead": _LEAD,
        "choices": list(letters),
        "choice": choice,
    }


def _truthful(record: Mapping[str, Any]) -> dict[str, Any]:
    """Several answers are right: they are `answers`, and those that are not are `wrong`."""
    targets = record["mc2_targets"]
    pairs = list(zip(targets["choices"], targets["labels"], strict=True))
    right = [f" {choice}" for choice, label in pairs if label == 1]
    wrong = [f" {choice}" for choice, label in pairs if label != 1]
    return {
        "prompt": f"Q: {record['question']}\n",
        "completion": right[0],
        "lead": _LEAD_OF_Q,
        "answers": right[1:],
        "wrong": wrong,
    }


def _trivia(record: Mapping[str, Any]) -> dict[str, Any]:
    given = record["answers"] if "answers" in record else record["answer"]
    answers = [given] if isinstance(given, str) else given
    first, *others = [f" {answer}" for answer in answers]
    prompt = f"Please briefly answer the following question:\nQ: {record['question']}\n"
    return {**_led(prompt, first.strip(), _LEAD_OF_Q), "answers": others}
