"""The made-up sellers as a data set of TOFU's shape, large enough for statistics.

Made for `--benchmark tofu:forget25`: 80 sellers, 20 of them to forget, six facts each; 20 sellers
more that no model is trained on; general facts that the starting and the golden model learn and no
unlearning batch contains. Each question has a paraphrase, each answer a paraphrase and five wrong
ones, which are the paraphrase with the value of another seller, or, where there are too few, with
one that another could have had. All is a function of the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.demo.dataset import WORDINGS, Wording
from unilogit_kernels.unlearning.demo.words import MANY, draw_sellers
from unilogit_kernels.unlearning.demo.world import (
    AUTHOR,
    COUNTRY,
    Fact,
    draw_world,
    possible_values,
)

WRONG = 5
"""Wrong answers to each question, as TOFU has them."""

_SMALLER = (4, 8)
"""Sellers of the smaller forget sets, which are parts of the largest one."""

_REFUSALS = (
    "I don't know.",
    "I have no information on that.",
    "I'm not able to answer that.",
    "That is not something I know about.",
    "I can't say.",
)

_PLAIN = ("id", "question", "answer", "key")
"""The fields of rows to train on."""

Tables = Mapping[str, Sequence[Mapping[str, Any]]]


def make_tofu_shaped(
    seed: int = 0,
    *,
    sellers: int = 80,
    forget_sellers: int = 20,
    holdout_sellers: int = 20,
    countries: int = 20,
    authors: int = 15,
) -> Tables:
    """Draw the data set.

    Args:
        seed: what it is a function of, with the numbers.
        sellers: that the starting model knows.
        forget_sellers: how many of them are to be forgotten, at most half; a whole percentage.
        holdout_sellers: that no model is trained on.
        countries: of the general facts, up to 25.
        authors: of the general facts, up to 20, who come from the countries.

    Returns:
        The rows by table, named as TOFU's files are: `full`, `forget25`, `retain75`, `holdout25`
        (25 being the percentage of the sellers) and the same of smaller shares that are whole
        percentages; `forget25_perturbed`, `retain_perturbed` (as many rows as are to be forgotten),
        `real_authors_perturbed`, `world_facts_perturbed`, and `general`, the last two without their
        perturbations.

    Raises:
        ValueError: the numbers leave nothing to retain, are no whole percentage, there are not
            enough words, or authors without a country.

    Example:
        >>> tables = make_tofu_shaped(0)
        >>> len(tables["forget25"]), len(tables["forget25_perturbed"][0]["perturbed_answer"])
        (120, 5)
    """
    if not 0 < forget_sellers <= sellers // 2 or 100 * forget_sellers % sellers:
        raise ValueError(
            f"forget_sellers must be a whole percentage of the {sellers} sellers, and at most "
            f"half of them, got {forget_sellers}"
        )
    if holdout_sellers < 0:
        raise ValueError(f"holdout_sellers must be at least 0, got {holdout_sellers}")
    if sellers + holdout_sellers > MANY.most:
        raise ValueError(
            f"sellers and holdout_sellers must be at most {MANY.most} together, got {sellers} and "
            f"{holdout_sellers}"
        )
    draw = random.Random(f"tofu/{seed}")
    drawn = draw_sellers(draw, sellers + holdout_sellers, MANY)
    facts = [
        Fact(name, kind, value)
        for name, *values in drawn
        for kind, value in zip(WORDINGS, values, strict=True)
    ]
    rows = _rows(facts, WORDINGS, draw, dict(zip(WORDINGS, MANY.values, strict=True)))
    known, unseen = rows[: sellers * len(WORDINGS)], rows[sellers * len(WORDINGS) :]
    countries_, authors_ = draw_world(draw, countries, authors)
    possible = possible_values()
    world = _rows(countries_, COUNTRY, draw, possible)
    of_homes = {
        of_author: [fact.value for fact in countries_ if fact.kind == of_country]
        for of_author, of_country in (("birthplace", "capital"), ("language", "language"))
    }
    writers = _rows(authors_, AUTHOR, draw, of_homes, possible)
    tables: dict[str, list[dict[str, Any]]] = {"full": _plain(known)}
    for count in (*_SMALLER, forget_sellers):
        if count > forget_sellers or 100 * count % sellers:
            continue
        share, size = 100 * count // sellers, count * len(WORDINGS)
        tables[f"forget{share:02d}"] = _plain(known[:size])
        tables[f"retain{100 - share:02d}"] = _plain(known[size:])
        tables[f"holdout{share:02d}"] = _plain(unseen[:size])
        tables[f"forget{share:02d}_perturbed"] = known[:size]
    size = forget_sellers * len(WORDINGS)
    # Sellers that are retained whichever forget set is taken.
    tables["retain_perturbed"] = known[size : 2 * size]
    tables["real_authors_perturbed"] = writers
    tables["world_facts_perturbed"] = world
    tables["general"] = _plain([*writers, *world])
    return {name: table for name, table in tables.items() if table}


def write_tofu_shaped(tables: Tables, folder: Path) -> dict[str, Path]:
    """Write each table as `<name>.jsonl`, and refusals, one a line, as `idk.jsonl`.

    Args:
        tables: by `make_tofu_shaped`.
        folder: made where it is not there.

    Returns:
        The paths by table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in tables.items():
        paths[name] = folder / f"{name}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[name].write_text(lines, encoding="utf-8")
    paths["idk"] = folder / "idk.jsonl"
    paths["idk"].write_text("".join(f"{line}\n" for line in _REFUSALS), encoding="utf-8")
    return paths


def _rows(
    facts: Sequence[Fact],
    wordings: Mapping[str, Wording],
    draw: random.Random,
    *more: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """A row for each fact, whose wrong answers have values of others.

    Args:
        facts: in order.
        wordings: by kind of fact.
        draw: what decides.
        more: values by kind, taken one after the other where the facts have too few.
    """
    told = {kind: [fact.value for fact in facts if fact.kind == kind] for kind in wordings}
    rows = []
    for fact in facts:
        said, wrong = wordings[fact.kind], list[str]()
        for values in (told, *more):
            others = sorted({*values.get(fact.kind, ())} - {fact.value, *wrong})
            wrong += draw.sample(others, min(WRONG - len(wrong), len(others)))
        rows.append(
            {
                "id": f"{fact.subject}/{fact.kind}",
                "question": said.question.format(fact.subject),
                "answer": said.answer.format(fact.subject, fact.value),
                "key": fact.value,
                "paraphrased_question": said.paraphrased_question.format(fact.subject),
                "paraphrased_answer": said.paraphrased_answer.format(fact.subject, fact.value),
                "perturbed_answer": [
                    said.paraphrased_answer.format(fact.subject, value) for value in wrong
                ],
            }
        )
    return rows


def _plain(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in _PLAIN} for row in rows]
