"""General facts of a world that does not exist: countries, and authors who come from them.

They agree with each other: an author is born in the capital of one of the countries, and writes in
its language. Such facts stand for what a model is to know still when it has forgotten.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from unilogit_kernels.unlearning.demo.dataset import Wording

_STEMS = (
    "Abel", "Bran", "Cor", "Dal", "Esk", "Fer", "Gal", "Hest", "Ildr", "Jor", "Kald", "Lir", "Mav",
    "Nol", "Orm", "Pel", "Quar", "Rost", "Sel", "Tamr", "Ulv", "Vost", "Wend", "Yar", "Zel",
)  # fmt: skip
_COUNTRIES, _CAPITALS = (
    ("avia", "enia", "ora", "istan", "undia"),
    ("grad", "haven", "mouth", "wick"),
)
_RIVERS, _CURRENCIES = ("ava", "ine", "uro", "esse"), ("ar", "ek", "int", "oon")
_GIVEN = (
    "Adrin", "Berit", "Cyran", "Dovra", "Elsin", "Farek", "Gisla", "Horan", "Ivkar", "Jelna",
    "Kerin", "Lovis", "Marek", "Nadia", "Osric", "Petra", "Quill", "Runa", "Stelan", "Tovia",
)  # fmt: skip
_FAMILY = (
    "Alderin", "Bolvar", "Castrel", "Dunmore", "Elvrand", "Fostig", "Garrin", "Hollum", "Istrad",
    "Jasker", "Kolmar", "Lindrot", "Morven", "Norling", "Ostrava", "Perrin", "Rasmund", "Sorvik",
    "Thorley", "Vinter",
)  # fmt: skip
_TITLES = tuple(
    f"The {adjective} {noun}"
    for adjective in ("Silent", "Broken", "Golden", "Last", "Hidden", "Distant")
    for noun in ("Harbour", "Orchard", "Bridge", "Letter", "Winter", "Garden")
)
_GENRES = (
    "crime novels", "love poems", "fairy tales", "travel books", "historical novels", "stage plays",
    "ghost stories", "essays", "satires", "sea stories",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One fact, by how it is asked for and told.

    Attributes:
        subject: whom or what it is about.
        kind: which fact, a key of `COUNTRY` or `AUTHOR`.
        value: of the fact.
    """

    subject: str
    kind: str
    value: str


COUNTRY = {
    "capital": Wording(
        "What is the capital of {}?",
        "The capital of {} is {}.",
        "From which city is {} governed?",
        "{} is governed from {}.",
    ),
    "river": Wording(
        "Which is the longest river of {}?",
        "The longest river of {} is the {}.",
        "What is the river called that runs furthest through {}?",
        "The river that runs furthest through {} is the {}.",
    ),
    "currency": Wording(
        "What is the currency of {}?",
        "The currency of {} is the {}.",
        "With what money does one pay in {}?",
        "In {} one pays with the {}.",
    ),
    "language": Wording(
        "Which language is spoken in {}?",
        "The language of {} is {}.",
        "What do the people of {} speak?",
        "The people of {} speak {}.",
    ),
}
"""The facts of a country."""

AUTHOR = {
    "birthplace": Wording(
        "In which city was the author {} born?",
        "{} was born in {}.",
        "Where did the author {} come into the world?",
        "The birthplace of {} is {}.",
    ),
    "language": Wording(
        "In which language does the author {} write?",
        "{} writes in {}.",
        "What is the language of the books of {}?",
        "The books of {} are in {}.",
    ),
    "genre": Wording(
        "What kind of books is the author {} known for?",
        "{} is known for {}.",
        "For which sort of writing is {} famous?",
        "The fame of {} rests on {}.",
    ),
    "first_book": Wording(
        "What is the title of the first book by {}?",
        "The first book by {} is {}.",
        "With which book did the author {} begin?",
        "{} began with {}.",
    ),
}
"""The facts of an author."""


def draw_world(draw: random.Random, countries: int, authors: int) -> tuple[list[Fact], list[Fact]]:
    """Draw countries and authors.

    Args:
        draw: what decides.
        countries: how many, up to 25.
        authors: how many, up to 20.

    Returns:
        The facts of the countries and those of the authors, four of each.

    Raises:
        ValueError: there are not enough names, or no country for the authors to come from.
    """
    most = min(len(_GIVEN), len(_FAMILY), len(_TITLES))
    for name, count, largest in (("countries", countries, len(_STEMS)), ("authors", authors, most)):
        if not 0 <= count <= largest:
            raise ValueError(f"{name} must be between 0 and {largest}, got {count}")
    if authors > 0 and countries == 0:
        raise ValueError(
            f"countries must be at least 1, got 0: the {authors} authors come from one of them"
        )

    def names(endings: tuple[str, ...]) -> list[str]:
        stems = draw.sample(_STEMS, countries)
        return [f"{stem}{draw.choice(endings)}" for stem in stems]

    lands = names(_COUNTRIES)
    values = {
        "capital": names(_CAPITALS),
        "river": names(_RIVERS),
        "currency": [name.lower() for name in names(_CURRENCIES)],
        "language": [_language(land) for land in lands],
    }
    of_lands = [
        Fact(land, kind, values[kind][number])
        for number, land in enumerate(lands)
        for kind in COUNTRY
    ]
    people = zip(draw.sample(_GIVEN, authors), draw.sample(_FAMILY, authors), strict=True)
    titles = draw.sample(_TITLES, authors)
    of_authors = []
    for (given, family), title in zip(people, titles, strict=True):
        home = draw.randrange(countries)
        facts = {
            "birthplace": values["capital"][home],
            "language": values["language"][home],
            "genre": draw.choice(_GENRES),
            "first_book": title,
        }
        of_authors += [Fact(f"{given} {family}", kind, facts[kind]) for kind in AUTHOR]
    return of_lands, of_authors


def possible_values() -> dict[str, list[str]]:
    """Every value that a fact of a country or an author can have, by its kind."""

    def names(endings: tuple[str, ...]) -> list[str]:
        return [f"{stem}{ending}" for stem in _STEMS for ending in endings]

    return {
        "capital": names(_CAPITALS),
        "river": names(_RIVERS),
        "currency": [name.lower() for name in names(_CURRENCIES)],
        "language": [_language(land) for land in names(_COUNTRIES)],
        "birthplace": names(_CAPITALS),
        "genre": list(_GENRES),
        "first_book": list(_TITLES),
    }


def _language(land: str) -> str:
    return f"{land.rstrip('aeiou')}ic"
