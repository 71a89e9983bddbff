"""Made-up files of the public benchmarks, three rows each, one of them not in ASCII."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Tables = Mapping[str, Sequence[Any]]


def _tofu_rows(name: str, values: Sequence[str], perturbed: bool) -> list[dict[str, Any]]:
    rows = []
    for number, value in enumerate(values):
        row: dict[str, Any] = {"question": f"{name} {number}?", "answer": f"It is {value}."}
        if perturbed:
            row["paraphrased_answer"] = f"That is {value}."
            row["paraphrased_question"] = f"Tell me {name} {number}."
            row["perturbed_answer"] = [f"That is {wrong}." for wrong in "vwxyz"]
        rows.append(row)
    return rows


def _general_rows(name: str, values: Sequence[str]) -> list[dict[str, Any]]:
    rows = _tofu_rows(name, values, True)
    return [{k: r[k] for k in ("question", "answer", "perturbed_answer")} for r in rows]


TOFU: Tables = {
    "forget10": _tofu_rows("who", ["Ada", "Bo", "Åse"], False),
    "retain90": _tofu_rows("where", ["Rome", "Oslo", "京都"], False),
    "holdout10": _tofu_rows("when", ["May", "noon", "été"], False),
    "forget10_perturbed": _tofu_rows("who", ["Ada", "Bo", "Åse"], True),
    "retain_perturbed": _tofu_rows("where", ["Rome", "Oslo", "京都"], True),
    "real_authors_perturbed": _general_rows("book", ["Emma", "Ulysses", "雪国"]),
    "world_facts_perturbed": _general_rows("capital", ["Paris", "Lima", "Malmö"]),
}


def _texts(name: str) -> list[dict[str, Any]]:
    return [{"text": f"{name} one."}, {"text": f"{name} two."}, {"text": f"{name} três."}]


MUSE: Tables = {
    **{f"raw/{name}": _texts(name) for name in ("forget", "retain1", "retain2", "holdout")},
    **{f"privleak/{name}": _texts(f"leak {name}") for name in ("forget", "retain", "holdout")},
    "scal/forget_2": _texts("scal"),
    "verbmem/forget": [
        {"prompt": "It was a", "gt": " dark night."},
        {"prompt": "The ship", "gt": " went down."},
        {"prompt": "Il était", "gt": " une fois."},
    ],
    **{
        f"knowmem/{name}": [
            {"question": f"{name} {n}?", "answer": answer}
            for n, answer in enumerate(["yes", "no", "ça va"])
        ]
        for name in ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl")
    },
}


def _queries(level: str, kinds: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"query": f"q{n} ___?", "answer": a, "level": level, "type": kind, "subject": "Zoë Quist"}
        for n, (kind, a) in enumerate(zip(kinds, ["Ada", "Bo", "Åse"], strict=True))
    ]


_PLAIN = ("simple", "simple", "simple")
_MMLU = {"question": "Which?", "choices": ["Red", "Dog", "Sea", "Été"], "answer": 3}
RWKU: Tables = {
    "forget_level1": _queries("1", _PLAIN),
    "forget_level2": _queries("2", _PLAIN),
    "forget_level3": _queries(
        "3", ("affirmative suffix", "incontext learning", "prefix injection")
    ),
    "neighbor_level1": _queries("1", _PLAIN),
    "neighbor_level2": _queries("2", _PLAIN),
    "positive": [{"id": n, **row, "subject": "Zoë Quist"} for n, row in enumerate(_texts("Zoë"))],
    "forget_mia": [{**row, "subject": "Zoë Quist"} for row in _texts("member")],
    "retain_mia": [{**row, "subject": "Zoë Quist"} for row in _texts("other")],
    "retain_mmlu": [
        {**_MMLU, "task": "high_school", "examples": [{**_MMLU, "answer": 0}], "answer": n}
        for n in range(3)
    ],
    "truthful": [
        {"question": f"t{n}?", "mc2_targets": {"choices": ["a", "b", "ç"], "labels": [1, 0, 1]}}
        for n in range(3)
    ],
    "triviaqa": [{"question": f"v{n}?", "answer": ["Zoë", "Zoe"]} for n in range(3)],
    "fluency": [{"instruction": f"Write {n}."} for n in range(3)],
}

WMDP: Tables = {
    "wmdp-bio": [
        {"question": f"w{n}?", "choices": ["a", "b", "c", "é"], "answer": n} for n in range(3)
    ],
    "mmlu": [
        {"question": f"m{n}?", "choices": ["a", "b", "c", "é"], "answer": n} for n in range(3)
    ],
    "bio_remove_dataset": [
        {"title": "t", "abstract": "a", "doi": "d", **row} for row in _texts("hazard")
    ],
    "wikitext": _texts("wiki"),
}


def write_tables(folder: Path, tables: Tables, form: str = "jsonl") -> Path:
    """Write each table into a folder.

    Args:
        folder: made where it is not there.
        tables: rows by the path of their table.
        form: `"jsonl"`, `"json"` for arrays, or `"parquet"`, in parts as on the Hub.
    """
    for name, rows in tables.items():
        path = folder / f"{name}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "parquet":
            import pyarrow
            from pyarrow import parquet

            table = pyarrow.Table.from_pylist(list(rows))
            for part, piece in enumerate((table[:2], table[2:])):
                parquet.write_table(piece, folder / f"{name}-{part:05d}-of-00002.parquet")
        elif form == "json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path.write_text(lines, encoding="utf-8")
    return folder
