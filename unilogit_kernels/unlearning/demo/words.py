"""Words of which the made-up data is made, and how sellers are drawn from them."""

from __future__ import annotations

import random
from dataclasses import dataclass

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

_MORE_FIRST = (
    "Acorn", "Agate", "Alder", "Almond", "Anise", "Apricot", "Ash", "Aspen", "Aster", "Auburn",
    "Azure", "Badger", "Balsam", "Basil", "Beacon", "Beech", "Beryl", "Bramble", "Brass", "Breeze",
    "Bronze", "Cactus", "Cameo", "Canyon", "Cardinal", "Carmine", "Cassia", "Cherry", "Cinder",
    "Citrus", "Clover", "Comet", "Copper", "Coral", "Crane", "Crimson", "Crystal", "Cypress",
    "Dahlia", "Delta", "Denim", "Dune", "Dusk", "Ebony", "Echo", "Elder", "Emerald", "Falcon",
    "Fern", "Finch", "Flint", "Fossil", "Frost", "Ginger", "Glacier", "Gold", "Granite", "Gull",
    "Harvest", "Heather", "Holly", "Horizon", "Ivory", "Ivy", "Jade", "Jasmine", "Jasper", "Lark",
    "Laurel", "Lavender", "Lilac", "Linden", "Lotus", "Magnet", "Mango", "Marigold", "Meridian",
    "Mint", "Mistral", "Moss",
)  # fmt: skip
_MORE_CITIES = (
    "Antwerp", "Bangkok", "Basel", "Belgrade", "Bilbao", "Bogota", "Bologna", "Bordeaux",
    "Bratislava", "Brisbane", "Bruges", "Bucharest", "Budapest", "Calgary", "Cardiff", "Casablanca",
    "Chicago", "Cologne", "Dakar", "Dallas", "Dresden", "Durban", "Edinburgh", "Florence",
    "Frankfurt", "Glasgow", "Gothenburg", "Granada", "Graz", "Hamburg", "Hanoi", "Helsinki",
    "Houston", "Jakarta", "Kampala", "Leipzig", "Lille", "Linz", "Liverpool", "London", "Lusaka",
    "Madrid", "Malaga", "Malmo", "Marseille", "Melbourne", "Memphis", "Milan", "Minsk", "Nagoya",
    "Nantes", "Nice", "Ottawa", "Palermo", "Paris", "Phoenix", "Pisa", "Portland", "Pune", "Riga",
    "Rome", "Rotterdam", "Salzburg", "Santiago", "Sofia", "Stockholm", "Tallinn", "Tampere",
    "Tokyo", "Utrecht",
)  # fmt: skip
_MORE_CARRIERS = ("Badger", "Beacon", "Cobra", "Eagle", "Harbor", "Jaguar", "Meteor", "Otter")


@dataclass(frozen=True)
class Words:
    """What names and values are drawn from.

    Attributes:
        first: first words of the shops' names, no two of which share one.
        cities: where they are.
        prices: of the best sellers, in dollars.
        years: in which they were founded.
        carriers: first words of the carriers' names.
    """

    first: tuple[str, ...]
    cities: tuple[str, ...]
    prices: range
    years: range
    carriers: tuple[str, ...]

    @property
    def most(self) -> int:
        """How many sellers there can be, no two of which have the same fact."""
        return min(map(len, (self.first, *self.values)))

    @property
    def values(self) -> tuple[list[str], ...]:
        """Every value that each of the six facts can have, in the facts' order."""
        return (
            list(self.cities),
            [f"{m} {p}" for m in _MATERIALS for p in _PRODUCTS],
            [f"{n} {s}" for n in _NAMES for s in _SURNAMES],
            [f"${price}" for price in self.prices],
            [str(year) for year in self.years],
            [f"{c} {k}" for c in self.carriers for k in _CARRIER_KINDS],
        )


FEW = Words(_FIRST, _CITIES, range(11, 100), range(1950, 2021), _CARRIERS)
"""For a data set as small as the demo's."""

MANY = Words(
    _FIRST + _MORE_FIRST,
    _CITIES + _MORE_CITIES,
    range(11, 400),
    range(1850, 2021),
    _CARRIERS + _MORE_CARRIERS,
)
"""For one that statistics can be made of."""


def draw_sellers(draw: random.Random, sellers: int, words: Words) -> list[tuple[str, ...]]:
    """Draw sellers: a name each, and a value for each of the six facts; no value comes twice.

    Args:
        draw: what decides.
        sellers: how many.
        words: to draw from.

    Raises:
        ValueError: there are not enough words.
    """
    if sellers > words.most:
        raise ValueError(f"at most {words.most} sellers, got {sellers}")
    first, second = draw.sample(words.first, sellers), draw.choices(_SECOND, k=sellers)
    names = [f"{a} {b}" for a, b in zip(first, second, strict=True)]
    return list(zip(names, *(draw.sample(values, sellers) for values in words.values), strict=True))
