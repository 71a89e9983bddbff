"""Several objectives in one call, and any registered one as plain data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from unilogit_kernels.maths.row_state import PLAIN, RowNeeds
from unilogit_kernels.maths.statistics import Statistics
from unilogit_kernels.objectives.base import JOIN, MIXTURE, REGISTRY, Objective, declared, per_token


def is_registered(objective: object) -> TypeGuard[Objective]:
    """Whether the fused losses know this objective by name, so that they can rebuild it."""
    if isinstance(objective, Mixture):
        return all(is_registered(each) for each in objective.objectives)
    return isinstance(objective, Objective) and REGISTRY.get(objective.name) is type(objective)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture(Objective):
    """Several objectives in one call, each for its own tokens.

    Attributes:
        objectives: What tokens may take.
        segments: int64, in the labels' shape: the index of each token's objective. A token of
            another index has value and slope 0.
    """

    objectives: tuple[Objective, ...]
    segments: Tensor = per_token()

    @property
    def name(self) -> str:  # type: ignore[override]  # of an instance: it depends on the parts
        """`mixture`, and the names of the objectives, joined by `+`."""
        return JOIN.join([MIXTURE, *(each.name for each in self.objectives)])

    @property
    def coupled(self) -> bool:  # type: ignore[override]
        """Whether one of the objectives is."""
        return any(each.coupled for each in self.objectives)

    @property
    def needs(self) -> RowNeeds:
        """What any of the objectives does."""
        return functools.reduce(RowNeeds.union, (each.needs for each in self.objectives), PLAIN)

    def evaluate(self, seen: Statistics, vocab_size: int) -> Tensor:
        """Each token's loss."""
        return self._select([each.evaluate(seen, vocab_size) for each in self.objectives])

    def differentiate(self, seen: Statistics, vocab_size: int) -> Statistics:
        """Each token's derivatives."""
        found = [each.differentiate(seen, vocab_size) for each in self.objectives]
        none = torch.zeros_like(seen.log_odds)

        def of(derivatives: tuple[Tensor | None, ...]) -> Tensor | None:
            if all(each is None for each in derivatives):
                return None
            return self._select([none if each is None else each for each in derivatives])

        log_odds = self._select([each.log_odds for each in found])
        return Statistics(log_odds, *(of(each) for each in list(zip(*found, strict=True))[1:]))

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """Each token's `f(d)`."""
        return self.evaluate(Statistics(log_odds), vocab_size)

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """Each token's `f'(d)`."""
        return self.differentiate(Statistics(log_odds), vocab_size).log_odds

    def _select(self, candidates: list[Tensor]) -> Tensor:
        result = torch.zeros_like(candidates[0])
        for index, candidate in enumerate(candidates):
            result = torch.where(self.segments == index, candidate, result)
        return result

    def parameters(self) -> list[float]:
        """Those of the objectives, one after the other."""
        return [value for each in self.objectives for value in each.parameters()]

    def tensors(self) -> list[Tensor]:
        """The segments, and what the objectives hold."""
        return [self.segments, *(tensor for each in self.objectives for tensor in each.tensors())]

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> Mixture:
        """The same with `function` applied to each per-token tensor, the segments included."""
        parts = tuple(each.map_tokens(function) for each in self.objectives)
        return Mixture(parts, function(self.segments))


class Packed(NamedTuple):
    """A registered objective as what an operator takes.

    Attributes:
        name: Of the objective; a mixture's holds the names of its objectives.
        parameters: Floats.
        tensors: Per token and per sequence.
    """

    name: str
    parameters: list[float]
    tensors: list[Tensor]


def pack(objective: Objective) -> Packed:
    """Take a registered objective apart; `unpack` is the inverse."""
    return Packed(objective.name, objective.parameters(), objective.tensors())


def unpack(name: str, parameters: Sequence[float], tensors: Sequence[Tensor]) -> Objective:
    """Rebuild an objective from what `pack` made of it."""
    floats, given = iter(parameters), iter(tensors)

    def build(cls: type[Objective]) -> Objective:
        return cls(
            **{name: next(floats) for name in declared(cls).floats},
            **{name: next(given) for name in declared(cls).tensors},
        )

    kind, *names = name.split(JOIN)
    if kind != MIXTURE:
        return build(REGISTRY[name])
    segments = next(given)
    return Mixture(tuple(build(REGISTRY[each]) for each in names), segments)
