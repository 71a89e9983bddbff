"""The methods by name, as the Trainer runs them: the loss of the forget rows, and what it needs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.maths.rewrites import Rewrite, Shift, Uniform
from unilogit_kernels.objectives import Objective, SequenceObjective
from unilogit_kernels.unlearning.limits import check_choice, check_parameters

_REFERENCE = "reference"


class _Divergence(NamedTuple):
    """A method that compares the model with the starting model, token by token of the vocabulary.

    Attributes:
        rewrite: of the teacher's label entry.
        direction: of the divergence.
        defaults: the rewrite's parameters.
        description: for lists of methods.
    """

    rewrite: type[Rewrite]
    direction: str
    defaults: Mapping[str, float]
    description: str


_DIVERGENCES = {
    # gamma as in the paper and in OpenUnlearning.
    "undial": _Divergence(
        Shift,
        "forward",
        {"gamma": 10.0},
        "UnDIAL (arXiv 2402.10052): KL from the starting model with the label's logit less gamma.",
    ),
    "unilogit_starting_model": _Divergence(
        Uniform,
        "reverse",
        {},
        "Unilogit with the target of the starting model, the paper's ablation (arXiv 2505.06027).",
    ),
}

_ALIASES = {"altpo": "idk_dpo", "task_vector": "cross_entropy"}
"""Methods whose loss is another's: they differ in the rows, or in what is done after training."""

RMU, ALTPO, TASK_VECTOR = "rmu", "altpo", "task_vector"
_OWN_PARAMETERS: Mapping[str, Mapping[str, float | None]] = {
    RMU: {"layer": None, "steering": 20.0},
    TASK_VECTOR: {"scale": 1.0},
}
"""Of methods that are not losses of the logits alone, with defaults: None for one that depends on
the model. RMU's `steering` is OpenUnlearning's; the paper's depends on the model, 6.5 for
Zephyr 7B."""

_DESCRIPTIONS = {
    RMU: "RMU (arXiv 2403.03218): hidden states of a middle layer to a random direction.",
    ALTPO: "AltPO (arXiv 2409.13474): IdkDPO to an alternate answer of each row's own.",
    TASK_VECTOR: "Negation of a task vector (arXiv 2212.04089): learn the rows, then subtract.",
}

HIDDEN_STATES, NONE = "hidden_states", "none"
RETAIN_LOSSES = ("cross_entropy", "kl", HIDDEN_STATES, NONE)
"""Losses of the retain rows: of their labels, the divergence from the starting model, the distance
of hidden states from the starting model's, or none, and then no rows."""


def default_retain_loss(method: str) -> str:
    """The loss of the retain rows that belongs to a method."""
    return {RMU: HIDDEN_STATES, TASK_VECTOR: NONE}.get(method, "cross_entropy")


def default_stop(method: str) -> str:
    """When a run by a method ends before its last epoch, unless it is asked for something else."""
    learns = _ALIASES.get(method, method) == "cross_entropy"
    return NONE if learns else "probability=0.2"


def check_retain_loss(retain_loss: str, of_labels: Mapping[str, float]) -> None:
    """See that there is such a loss of the retain rows, and that it takes what it is given.

    Args:
        retain_loss: its name.
        of_labels: parameters of the cross-entropy by their settings' names; 0 where not asked for.

    Raises:
        ValueError: there is none, or it is another than the one with these parameters.
    """
    check_choice("retain_loss", retain_loss, RETAIN_LOSSES)
    for name, value in of_labels.items():
        if value and retain_loss != "cross_entropy":
            raise ValueError(
                f"{name} would have no effect with retain_loss {retain_loss!r}, got {value}, which "
                "sees no labels. Leave it 0, or take retain_loss 'cross_entropy'"
            )


def check_goes_together(
    method: str, retain_loss: str, dual_step_size: float, stop_at: str | None
) -> None:
    """See that a method can run with the loss of the retain rows, and that nothing is idle.

    Args:
        method: its name.
        retain_loss: by name.
        dual_step_size: of a retain weight that follows the retain loss; 0 for none.
        stop_at: when the run ends before its last step; None or "none": never.

    Raises:
        ValueError: it cannot, or a setting would have no effect.
    """
    allowed = {RMU: (HIDDEN_STATES, NONE), TASK_VECTOR: (NONE,)}.get(
        method, tuple(loss for loss in RETAIN_LOSSES if loss != HIDDEN_STATES)
    )
    if retain_loss not in allowed:
        raise ValueError(
            f"retain_loss of method {method!r} must be one of {', '.join(allowed)}, got "
            f"{retain_loss!r}"
        )
    if retain_loss == NONE and dual_step_size != 0:
        raise ValueError(
            f"dual_step_size would have no effect with retain_loss 'none', got {dual_step_size}: "
            "there is no retain loss to follow"
        )
    if method == TASK_VECTOR and stop_at not in (None, NONE):
        raise ValueError(
            f"stop_at would end method {method!r} at the wrong time, got {stop_at!r}: it learns "
            "the forget rows, and what it learned is taken away after the last step"
        )


def method_names() -> list[str]:
    """Every method by name."""
    return sorted({*objectives.REGISTRY, *_DIVERGENCES, *_ALIASES, *_OWN_PARAMETERS})


class MethodError(ValueError):
    """A method cannot run as it was asked for."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with its parameters.

    Attributes:
        name: a key of `objectives.REGISTRY`; or `"undial"`, with the starting model as teacher,
            `"unilogit_starting_model"`, Unilogit with the starting model's target, `"rmu"`, of
            hidden states, `"altpo"`, IdkDPO with an alternate of each row's own, or
            `"task_vector"`, which learns the rows and then goes as far in the other direction.
        parameters: its float parameters, where they differ from the defaults.
    """

    name: str
    parameters: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check name and parameters."""
        if self.name not in method_names():
            known = ", ".join(method_names())
            raise MethodError(f"method must be one of {known}, got {self.name!r}")
        for parameter in self.parameters:
            if parameter not in self.defaults:
                raise MethodError(
                    f"method {self.name!r} has no parameter {parameter!r}; "
                    f"it has {', '.join(self.defaults) or 'none'}"
                )
        try:
            check_parameters(self.name, self.parameters)
        except ValueError as error:
            raise MethodError(str(error)) from error

    @property
    def _class(self) -> type[Objective]:
        return objectives.REGISTRY.get(_ALIASES.get(self.name, self.name), Objective)

    @property
    def of_hidden_states(self) -> bool:
        """Whether its losses are of hidden states, and no lm_head is needed."""
        return self.name == RMU

    @property
    def is_negated(self) -> bool:
        """Whether training learns what is to be forgotten, and arithmetic then takes it away."""
        return self.name == TASK_VECTOR

    @property
    def defaults(self) -> Mapping[str, float | None]:
        """Every parameter that the method has, with its default; None where the model decides."""
        if self.name in _DIVERGENCES:
            return _DIVERGENCES[self.name].defaults
        if self.name in _OWN_PARAMETERS:
            return _OWN_PARAMETERS[self.name]
        of_fields: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self._class)}
        known = objectives.parameter_names(_ALIASES.get(self.name, self.name))
        return {name: of_fields[name] for name in known}

    @property
    def settled(self) -> Mapping[str, float]:
        """Its parameters, with defaults where none are given and no model decides."""
        known = {name: value for name, value in self.defaults.items() if value is not None}
        return {**known, **self.parameters}

    @property
    def description(self) -> str:
        """What the method is, in plain text of one or more lines, the first of which is enough."""
        if self.name in _DIVERGENCES:
            return _DIVERGENCES[self.name].description
        return _DESCRIPTIONS.get(self.name) or inspect.getdoc(self._class) or ""

    @property
    def of_sequences(self) -> bool:
        """Whether the mean runs over sequences and not over tokens."""
        return issubclass(self._class, SequenceObjective)

    @property
    def needs_reference(self) -> bool:
        """Whether it takes log-probabilities under the starting model."""
        return any(field.name == _REFERENCE for field in dataclasses.fields(self._class))

    @property
    def needs_teacher(self) -> bool:
        """Whether it takes the starting model's whole distributions."""
        return self.name in _DIVERGENCES

    def divergence(self) -> dict[str, Any]:
        """What `heads_kl_loss` takes, of a method that needs a teacher."""
        chosen = _DIVERGENCES[self.name]
        parameters = {**chosen.defaults, **self.parameters}
        return {"rewrite": chosen.rewrite(**parameters), "direction": chosen.direction}

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
        own = {} if self.name in _OWN_PARAMETERS else self.parameters
        return self._class(**own, **tensors)

    def items(self, counted: Tensor) -> Tensor:
        """How many losses the mean is over, 0-d, where `counted` `[B, T]` are its labels."""
        if not self.of_sequences:
            return counted.sum()
        members = 2 if self.needs_refusals else 1
        return torch.stack(counted.any(-1).chunk(members)).any(0).sum()
