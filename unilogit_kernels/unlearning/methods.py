"""The methods by name, as the Trainer runs them: the loss of the forget rows, and what it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.objectives import Objective, SequenceObjective

_REFERENCE = "reference"


class MethodError(ValueError):
    """A method cannot run as it was asked for."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered objective with its parameters.

    Attributes:
        name: a key of `objectives.REGISTRY`.
        parameters: its float parameters, where they differ from the defaults.
    """

    name: str
    parameters: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check name and parameters."""
        if self.name not in objectives.REGISTRY:
            known = ", ".join(sorted(objectives.REGISTRY))
            raise MethodError(f"method must be one of {known}, got {self.name!r}")
        known_parameters = objectives.parameter_names(self.name)
        for parameter in self.parameters:
            if parameter not in known_parameters:
                raise MethodError(
                    f"method {self.name!r} has no parameter {parameter!r}; "
                    f"it has {', '.join(known_parameters) or 'none'}"
                )

    @property
    def _class(self) -> type[Objective]:
        return objectives.REGISTRY[self.name]

    @property
    def of_sequences(self) -> bool:
        """Whether the mean runs over sequences and not over tokens."""
        return issubclass(self._class, SequenceObjective)

    @property
    def needs_reference(self) -> bool:
        """Whether it takes log-probabilities under the starting model."""
        return any(field.name == _REFERENCE for field in dataclasses.fields(self._class))

    @property
    def needs_refusals(self) -> bool:
        """Whether it compares each answer with one that the model should give instead."""
        return getattr(self._class, "members", 1) == 2

    def objective(self, reference: Tensor | None) -> Objective:
        """The objective of a batch.

        Args:
            reference: `[B, T]`, `log p` of each label under the starting model, 0 where there is
                none; None if it is not needed.
        """
        tensors: dict[str, Tensor] = {}
        if reference is not None and self.needs_reference:
            tensors[_REFERENCE] = reference.sum(-1) if self.of_sequences else reference
        return self._class(**self.parameters, **tensors)

    def items(self, counted: Tensor) -> Tensor:
        """How many losses the mean is over, 0-d, where `counted` `[B, T]` are its labels."""
        if not self.of_sequences:
            return counted.sum()
        members = 2 if self.needs_refusals else 1
        return torch.stack(counted.any(-1).chunk(members)).any(0).sum()
