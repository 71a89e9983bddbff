"""What is taken of a test with many parameters: every value, and every two or three that meet."""

from __future__ import annotations

import itertools

import pytest

from tests.support.selection import covering, meetings_of


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(2,), (3, 4), (6, 3, 5, 4), (2, 2, 2, 2, 2)])
def test_whatever_meets_is_chosen(sizes: tuple[int, ...], strength: int) -> None:
    names = "abcde"[: len(sizes)]
    every = [
        dict(zip(names, values, strict=True)) for values in itertools.product(*map(range, sizes))
    ]
    indices = covering(every, strength)
    chosen = [meetings_of(every[index], strength) for index in indices]
    assert set().union(*chosen) == set().union(*(meetings_of(each, strength) for each in every))
    assert indices == covering(every, strength), "not the same each time"
    if len(sizes) > strength:
        assert len(chosen) <= len(every) / 2


def test_what_is_chosen_anyway_counts() -> None:
    every = [
        dict(zip("abcd", values, strict=True)) for values in itertools.product(range(3), repeat=4)
    ]
    pairs = covering(every, 2)
    both = covering(every, 3, pairs)
    assert pairs < both
    triples = set().union(*(meetings_of(every[index], 3) for index in both))
    assert triples == set().union(*(meetings_of(each, 3) for each in every))
    assert len(both) - len(pairs) < len(covering(every, 3))


def test_values_that_go_together_are_all_chosen() -> None:
    """Of parameters that are given in tuples, pairs that no tuple has are not looked for."""
    together = [{"n": index, "v": index % 2} for index in range(5)]
    assert covering(together, 2) == set(range(5))
