"""A comparison of two methods by a tiny model, for tests: seconds, and all parts of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.tiny_models import save_model, write_rows

NAMES = ["ada", "bo", "cyd", "dot"]
OTHERS = ["eve", "fay"]


def _rows(question: str, names: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{question}{n}",
            "question": f"{question} {n}?",
            "answer": name,
            "key": name,
            "paraphrased_answer": f"it is {name}",
            "perturbed_answer": [f"it is {other}" for other in OTHERS],
        }
        for n, name in enumerate(names)
    ]


def write_inputs(folder: Path) -> dict[str, str]:
    """A base model and files of rows in a folder; returns the files by set."""
    save_model(folder / "base")
    rows = {
        "forget": _rows("who", NAMES),
        "forget_paraphrase": _rows("which", NAMES),
        "retain": _rows("is", ["yes", "no", "so", "well", "ok", "sure"]),
        "neighbours": _rows("at", ["sea", "home", "work", "rest"]),
        "holdout": _rows("was", ["gus", "hal", "ivo", "jan"]),
    }
    for name, each in rows.items():
        write_rows(folder / f"{name}.jsonl", each)
    return {name: f"{name}.jsonl" for name in rows}


def plan_content(files: dict[str, str], **other: Any) -> dict[str, Any]:
    """A plan that takes all of its parts, as a file of it has it."""
    plan: dict[str, Any] = {
        "title": "Two methods & <a tiny model>",
        "note": "Nobody <else> was there.",
        "data": {"files": files},
        "model": {"base": "base", "max_length": 64},
        "learn": {"steps": 60, "batch_size": 8, "learning_rate": 1e-2},
        "methods": [
            "unilogit",
            {"name": "npo", "label": "NPO", "parameters": {"beta": 0.1}, "forget_weights": [1.0]},
        ],
        "learning_rates": [3e-3],
        "forget_weights": [0.3, 1.0],
        "seeds": [0, 1],
        "unlearn": {"steps": 8, "batch_size": 2, "warmup_steps": 0},
        "checks": {"every": 2, "past": 0.5},
        "choose": {"by": ["neighbours.probability"], "training_seeds": 1},
        "answers": {"max_new_tokens": 4, "samples": 2},
        "robustness": {"relearn_steps": 2, "relearn_rate": 3e-3, "bits": 4},
    }
    return {**plan, **other}
