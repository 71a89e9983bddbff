"""What a plain run leaves out of a test with many parameters: no value, and no two that meet."""

from __future__ import annotations

import itertools

import pytest

from tests.support.selection import covering, pairs_of


@pytest.mark.parametrize("sizes", [(2,), (3, 4), (6, 3, 5, 4), (2, 2, 2, 2, 2)])
def test_every_pair_of_values_is_chosen(sizes: tuple[int, ...]) -> None:
    names = "abcde"[: len(sizes)]
    every = [
        dict(zip(names, values, strict=True)) for values in itertools.product(*map(range, sizes))
    ]
    chosen = [every[index] for index in covering(every)]
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, every))
    if len(sizes) > 2:
        assert len(chosen) < len(every) / 2


def test_values_that_go_together_are_all_chosen() -> None:
    """Of parameters that are given in tuples, pairs that no tuple has are not looked for."""
    together = [{"n": index, "v": index % 2} for index in range(5)]
    assert covering(together) == set(range(5))
