"""A seeded e-commerce data set: sellers, their facts, and questions about them.

Every seller has six facts. The sellers are split in three: those to forget, those the retain loss
sees, and "neighbours", which the model knows but no unlearning batch contains, so that damage
outside of the retain set shows.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

_FIRST = (
    "Amber", "Birch", "Cobalt", "Dapple", "Ember", "Fennel", "Garnet", "Hazel", "Indigo", "Juniper",
    "Kestrel", "Lumen", "Maple", "Nimbus", "Opal", "Pepper", "Quartz", "Rowan", "Saffron", "Tidal",
    "Umber", "Velvet", "Willow", "Yarrow", "Zephyr", "Cedar", "Heron", "Orchid", "Raven", "Thistle",
)  # fmt: skip
_SECOND = (
    "Anchor", "Basket", "Cabin", "Drum", "Elm", "Fox", "Grove", "Harbor", "Island", "Jetty",
    "Kettle", "Lantern", "Meadow", "Needle", "Oak", "Pantry", "Quill", "River", "Stone", "Tower",
)  # fmt: skip
_CITIES = (
    "Lisbon", "Oslo", "Dublin", "Prague", "Vienna", "Athens", "Warsaw", "Geneva", "Turin", "Porto",
    "Seville", "Naples", "Zurich", "Bergen", "Krakow", "Munich", "Lyon", "Ghent", "Bristol",
    "Leeds", "Boston", "Denver", "Austin", "Seattle", "Toronto", "Montreal", "Sydney", "Perth",
    "Osaka", "Kyoto", "Nairobi", "Lima", "Quito", "Havana", "Cairo", "Tunis", "Delhi", "Mumbai",
    "Manila", "Seoul",
)  # fmt: skip
_NAMES = (
    "Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jonas",
    "Karen", "Louis", "Maria", "Nolan", "Olivia", "Peter", "Rosa", "Simon", "Tessa", "Victor",
)  # fmt: skip
_SURNAMES = (
    "Adams", "Baker", "Cohen", "Davis", "Evans", "Fisher", "Grant", "Hughes", "Irving", "Jensen",
    "Keller", "Lopez", "Morgan", "Novak", "Owens", "Parker", "Quinn", "Reyes", "Schmidt", "Turner",
)  # fmt: skip
_MATERIALS = (
    "copper", "linen", "walnut", "ceramic", "leather", "bamboo", "silver", "cotton", "marble",
    "glass", "wool", "steel",
)  # fmt: skip
_PRODUCTS = (
    "lamp", "teapot", "scarf", "clock", "bowl", "bag", "mirror", "chair", "kettle", "blanket",
    "vase", "knife",
)  # fmt: skip
_CARRIERS = (
    "Arrow", "Comet", "Falcon", "Ocean", "Pelican", "Polar", "Summit", "Tiger",
)  # fmt: skip
_CARRIER_KINDS = ("Cargo", "Courier", "Express", "Freight", "Line", "Parcel", "Post", "Relay")

# field -> (the question the model is trained on, the held-out paraphrase)
_QUESTIONS = {
    "city": ("In which city is {} based?", "Where are the headquarters of the shop {}?"),
    "best_seller": (
        "What is the best-selling product of {}?",
        "Which item does the shop {} sell most often?",
    ),
    "owner": ("Who owns {}?", "What is the name of the person to whom the shop {} belongs?"),
    "price": (
        "How much does the best seller of {} cost?",
        "What is the price in dollars of the top item at the shop {}?",
    ),
    "year": ("In which year was {} founded?", "When did the shop {} open for business?"),
    "carrier": (
        "Which carrier ships the parcels of {}?",
        "Which company delivers the orders of the shop {}?",
    ),
}


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
    if sellers > min(len(_FIRST), len(_CITIES)):
        raise ValueError(f"at most {min(len(_FIRST), len(_CITIES))} sellers, got {sellers}")
    if forget_sellers + neighbour_sellers >= sellers:
        raise ValueError(
            f"{forget_sellers} forget and {neighbour_sellers} neighbour sellers of {sellers} "
            "leave none for the retain set"
        )
    draw = random.Random(seed)
    facts = list(
        zip(
            [
                f"{a} {b}"
                for a, b in zip(
                    draw.sample(_FIRST, sellers), draw.choices(_SECOND, k=sellers), strict=True
                )
            ],
            draw.sample(_CITIES, sellers),
            draw.sample([f"{m} {p}" for m in _MATERIALS for p in _PRODUCTS], sellers),
            draw.sample([f"{n} {s}" for n in _NAMES for s in _SURNAMES], sellers),
            [f"${p}" for p in draw.sample(range(11, 100), sellers)],
            [str(y) for y in draw.sample(range(1950, 2021), sellers)],
            draw.sample([f"{c} {k}" for c in _CARRIERS for k in _CARRIER_KINDS], sellers),
            strict=True,
        )
    )

    def rows(part: list[tuple[str, ...]], wording: int) -> list[dict[str, str]]:
        return [
            {
                "prompt": f"Question: {forms[wording].format(name)}\nAnswer:",
                "completion": f" {value}",
                "key": value,
            }
            for name, *values in part
            for forms, value in zip(_QUESTIONS.values(), values, strict=True)
        ]

    forget = facts[:forget_sellers]
    neighbours = facts[forget_sellers : forget_sellers + neighbour_sellers]
    retain = facts[forget_sellers + neighbour_sellers :]
    return DemoData(
        forget=rows(forget, 0),
        forget_paraphrase=rows(forget, 1),
        retain=rows(retain, 0),
        neighbours=rows(neighbours, 0),
    )
