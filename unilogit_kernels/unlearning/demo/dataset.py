"""A seeded e-commerce data set: sellers, their facts, and questions about them.

This is the demo's, small enough to be learned in a minute; `tofu_shaped` makes a larger one.

Every seller has six facts. The sellers are split in three: those to forget, those the retain loss
sees, and "neighbours", which the model knows but no unlearning batch contains, so that damage
outside of the retain set shows.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from unilogit_kernels.unlearning.demo.words import FEW, draw_sellers
from unilogit_kernels.unlearning.rows import QUESTION


class Wording(NamedTuple):
    """How a fact is asked for and told, `{}` for the seller and then for the value.

    Attributes:
        question: as models are trained on it.
        answer: to it, in a sentence.
        paraphrased_question: the same question in words that no training batch contains.
        paraphrased_answer: the same for the answer.
    """

    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str


WORDINGS = {
    "city": Wording(
        "In which city is {} based?",
        "{} is based in {}.",
        "Where are the headquarters of the shop {}?",
        "The headquarters of {} are in {}.",
    ),
    "best_seller": Wording(
        "What is the best-selling product of {}?",
        "The best-selling product of {} is the {}.",
        "Which item does the shop {} sell most often?",
        "What {} sells most often is the {}.",
    ),
    "owner": Wording(
        "Who owns {}?",
        "{} is owned by {}.",
        "What is the name of the person to whom the shop {} belongs?",
        "{} belongs to {}.",
    ),
    "price": Wording(
        "How much does the best seller of {} cost?",
        "The best seller of {} costs {}.",
        "What is the price in dollars of the top item at the shop {}?",
        "For its top item {} asks {}.",
    ),
    "year": Wording(
        "In which year was {} founded?",
        "{} was founded in {}.",
        "When did the shop {} open for business?",
        "{} opened for business in {}.",
    ),
    "carrier": Wording(
        "Which carrier ships the parcels of {}?",
        "The parcels of {} are shipped by {}.",
        "Which company delivers the orders of the shop {}?",
        "{} has its orders delivered by {}.",
    ),
}
"""The six facts, in the order in which `draw_sellers` draws their values."""


@dataclass(frozen=True)
class DemoData:
    """Rows `{"prompt", "completion", "key"}` of each set, by name.

    Attributes:
        forget: the questions about the sellers to forget.
        forget_paraphrase: the same facts, asked in words no training batch contains.
        retain: the questions about the sellers the retain loss sees.
        neighbours: the questions about sellers the model knows and no unlearning batch contains.
    """

    forget: list[dict[str, str]]
    forget_paraphrase: list[dict[str, str]]
    retain: list[dict[str, str]]
    neighbours: list[dict[str, str]]

    def sets(self) -> dict[str, list[dict[str, str]]]:
        """The four sets by name, in the order in which they are reported."""
        return {
            "forget": self.forget,
            "forget_paraphrase": self.forget_paraphrase,
            "retain": self.retain,
            "neighbours": self.neighbours,
        }

    def write(self, folder: Path) -> dict[str, Path]:
        """Write each set as `<name>.jsonl` into `folder`; returns the paths by name."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {}
        for name, rows in self.sets().items():
            paths[name] = folder / f"{name}.jsonl"
            paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        return paths


def make_demo_data(
    seed: int = 0, sellers: int = 26, forget_sellers: int = 5, neighbour_sellers: int = 5
) -> DemoData:
    """Draw the sellers and their facts.

    Args:
        seed: the same seed gives the same rows on every platform.
        sellers: number of sellers in total.
        forget_sellers: how many of them are to be forgotten.
        neighbour_sellers: how many are known to the model and left out of the unlearning batches.

    Raises:
        ValueError: no seller would be left for the retain set, or there are not enough names.
    """
    if forget_sellers + neighbour_sellers >= sellers:
        raise ValueError(
            f"{forget_sellers} forget and {neighbour_sellers} neighbour sellers of {sellers} "
            "leave none for the retain set"
        )
    facts = draw_sellers(random.Random(seed), sellers, FEW)

    def rows(part: list[tuple[str, ...]], paraphrased: bool = False) -> list[dict[str, str]]:
        return [
            {
                "prompt": QUESTION.format(
                    (said.paraphrased_question if paraphrased else said.question).format(name)
                ),
                "completion": f" {value}",
                "key": value,
            }
            for name, *values in part
            for said, value in zip(WORDINGS.values(), values, strict=True)
        ]

    forget = facts[:forget_sellers]
    neighbours = facts[forget_sellers : forget_sellers + neighbour_sellers]
    retain = facts[forget_sellers + neighbour_sellers :]
    return DemoData(
        forget=rows(forget),
        forget_paraphrase=rows(forget, paraphrased=True),
        retain=rows(retain),
        neighbours=rows(neighbours),
    )
