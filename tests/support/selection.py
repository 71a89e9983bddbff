"""Which tests are taken of a function with many parameters.

A fault shows with one value of a parameter, or with two values that meet; now and then three have
to, hardly ever four (Kuhn, Wallace and Gallo, IEEE TSE 30, 2004). So a plain run has every pair of
values of a test's parameters and `make prove` adds every three, in the fewest combinations that a
greedy search finds. Where another processor is imitated, every value is there once. `pytest -m ""`
runs all combinations.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

import pytest

Combination = Mapping[str, Hashable]
"""Of one test: what tells a value from others, by the name of its parameter."""


def meetings_of(combination: Combination, strength: int) -> set[tuple[Hashable, ...]]:
    """Every so many values that meet in a combination; all of them, where there are fewer."""
    values = [(name, combination[name]) for name in sorted(combination)]
    return set(itertools.combinations(values, min(strength, len(values))))


def covering(
    combinations: Sequence[Combination], strength: int, chosen: Collection[int] = ()
) -> set[int]:
    """Indices of combinations in which all that meet do so that meet in any of them.

    Args:
        combinations: To choose from.
        strength: How many values must meet.
        chosen: Indices of what is taken anyway.
    """
    meetings = [meetings_of(each, strength) for each in combinations]
    taken = set(chosen)
    missing = set().union(*meetings).difference(*(meetings[index] for index in taken))
    queue = [(-len(each & missing), index) for index, each in enumerate(meetings)]
    heapq.heapify(queue)
    while missing:
        claimed, index = heapq.heappop(queue)
        gain = len(meetings[index] & missing)
        if gain == -claimed:
            taken.add(index)
            missing -= meetings[index]
        elif gain:  # others may by now be better
            heapq.heappush(queue, (-gain, index))
    return taken


def _combination(test: pytest.Function) -> Combination:
    # All tests of a function share the values themselves, of which not all can be compared.
    return {name: id(value) for name, value in test.callspec.params.items()}


def mark_selection(items: Iterable[pytest.Item]) -> None:
    """Mark tests `pairs` whose values others have, `prove` whose pairs, `every` whose triples."""
    functions: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            functions[item.nodeid.partition("[")[0]].append(item)
    for tests in functions.values():
        combinations = [_combination(test) for test in tests]
        with_pairs = sorted(covering(combinations, 2))
        with_triples = covering(combinations, 3, with_pairs)
        found = covering([combinations[index] for index in with_pairs], 1)
        with_values = {with_pairs[each] for each in found}
        for index, test in enumerate(tests):
            if index not in with_values:
                test.add_marker(pytest.mark.pairs)
            if index not in with_pairs:
                test.add_marker(pytest.mark.prove)
            if index not in with_triples:
                test.add_marker(pytest.mark.every)
