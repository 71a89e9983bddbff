"""Which tests a plain run takes of a function with many parameters; `make prove` takes the rest.

A fault shows with one value of a parameter, or with two values that meet; hardly ever do three have
to. So a plain run has every pair of values of a test's parameters, in the fewest combinations that
a greedy search finds.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import pytest

Combination = Mapping[str, Hashable]
"""Of one test: what tells a value from others, by the name of its parameter."""


def pairs_of(combination: Combination) -> set[tuple[Hashable, ...]]:
    """Every two values that meet in a combination."""
    values = [(name, combination[name]) for name in sorted(combination)]
    return set(itertools.combinations(values, 2)) or {(value, value) for value in values}


def covering(combinations: Sequence[Combination]) -> set[int]:
    """Indices of combinations in which all pairs meet that meet in any of them."""
    pairs = [pairs_of(each) for each in combinations]
    missing = set().union(*pairs)
    chosen: set[int] = set()
    queue = [(-len(each), index) for index, each in enumerate(pairs)]
    heapq.heapify(queue)
    while missing:
        claimed, index = heapq.heappop(queue)
        gain = len(pairs[index] & missing)
        if gain == -claimed:
            chosen.add(index)
            missing -= pairs[index]
        elif gain:  # others may by now be better
            heapq.heappush(queue, (-gain, index))
    return chosen


def _combination(test: pytest.Function) -> Combination:
    # All tests of a function share the values themselves, of which not all can be compared.
    return {name: id(value) for name, value in test.callspec.params.items()}


def beyond_pairs(items: Iterable[pytest.Item]) -> Iterable[pytest.Item]:
    """Tests of which a plain run has every pair of values without them."""
    functions: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            functions[item.nodeid.partition("[")[0]].append(item)
    for tests in functions.values():
        chosen = covering([_combination(test) for test in tests])
        yield from (test for index, test in enumerate(tests) if index not in chosen)
