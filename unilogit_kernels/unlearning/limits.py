"""The values that each numeric setting may have, whoever takes it: one definition of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_LARGEST_COUNT = 2**31 - 1
_LARGEST_FACTOR = 1e6
"""A loss times more than this leaves float32 soon; no method has use for a tenth of it."""


class Range(NamedTuple):
    """An interval of finite numbers.

    Attributes:
        low: the smallest number in it.
        high: the largest one.
        open_low: whether `low` itself is left out.
        open_high: whether `high` itself is.
        whole: whether only integers belong to it.
        optional: whether None is a value, too.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    whole: bool = False
    optional: bool = False

    def problem(self, value: Any) -> str | None:
        """What a value must be and is not, or None where it lies in the interval.

        NaN, infinities, booleans and text do not.
        """
        if value is None and self.optional:
            return None
        if self.whole and (isinstance(value, bool) or not isinstance(value, int)):
            return "an integer"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return "a number"
        if not math.isfinite(value):
            return "a finite number"
        too_low = value < self.low or (self.open_low and value == self.low)
        too_high = value > self.high or (self.open_high and value == self.high)
        if not too_low and not too_high:
            return None
        if self.open_low and self.open_high:
            return f"between {self.low:g} and {self.high:g}"
        if too_low:
            least = "positive" if self.low == 0 else f"more than {self.low:g}"
            return least if self.open_low else f"at least {self.low:.10g}"
        return f"less than {self.high:g}" if self.open_high else f"at most {self.high:.10g}"


def _count(low: int = 1, high: int = _LARGEST_COUNT, *, optional: bool = False) -> Range:
    return Range(low, high, whole=True, optional=optional)


_FACTOR = Range(0.0, _LARGEST_FACTOR)
_OF_EITHER_SIGN = Range(-_LARGEST_FACTOR, _LARGEST_FACTOR)
_SHARE = Range(0.0, 1.0)

RANGES: Mapping[str, Range] = {
    "forget_weight": _FACTOR,
    "retain_weight": _FACTOR,
    "retain_per_forget": _count(),
    "label_smoothing": _SHARE,
    "label_smoothing_factor": _SHARE,
    "z_loss": _FACTOR,
    "dual_step_size": _FACTOR,
    "retain_loss_target": _FACTOR,
    "dual_warmup_epochs": _count(0),
    "check_steps": _count(),
    "max_retain_loss_rise": Range(0.0, _LARGEST_FACTOR, open_low=True, optional=True),
    "report_rows": _count(0),
    # numpy's generator takes no other seed.
    "seed": _count(0, 2**32 - 1),
    "epochs": _count(),
    "learning_rate": Range(0.0, _LARGEST_FACTOR, open_low=True),
    "warmup_steps": _count(0),
    "batch_size": _count(),
    "gradient_accumulation": _count(),
    "checkpoint_steps": _count(),
    "train_layers": _count(optional=True),
    "max_length": _count(),
    "block_stride": _count(optional=True),
    "vocab_size": _count(optional=True),
    "memory_budget": _count(2**20, 2**50, optional=True),
    "memory_budget_mib": _count(optional=True),
    "skip_below": Range(0.0, 1.0, open_high=True),
}
"""Of the settings of a run, and of what an evaluation takes."""

PARAMETER_RANGES: Mapping[str, Range] = {
    "alpha": _FACTOR,
    "beta": Range(1e-6, _LARGEST_FACTOR),
    "beta1": _FACTOR,
    "beta2": _FACTOR,
    "gamma": _FACTOR,
    "delta": _OF_EITHER_SIGN,
    "label_smoothing": _SHARE,
    "z_loss": _FACTOR,
    "entropy": _OF_EITHER_SIGN,
    "weight": _OF_EITHER_SIGN,
    "layer": Range(0.0, _LARGEST_COUNT),
    "steering": _FACTOR,
    "scale": _FACTOR,
}
"""Of the methods' parameters; one without a range here may be any number of either sign."""


def check_numbers(values: Mapping[str, Any], names: Iterable[str] = RANGES) -> None:
    """See that settings lie in their ranges.

    Args:
        values: settings by name; those without a range are passed over.
        names: the settings to check.

    Raises:
        ValueError: one does not; the message names it, its value and its range.
    """
    for name in names:
        problem = RANGES[name].problem(values[name]) if name in values else None
        if problem is not None:
            raise ValueError(f"{name} must be {problem}, got {values[name]}")


def check_parameters(method: str, values: Mapping[str, Any]) -> None:
    """See that a method's parameters lie in their ranges.

    Args:
        method: the method's name, for the message.
        values: its parameters by name.

    Raises:
        ValueError: one does not.
    """
    for name, value in values.items():
        problem = PARAMETER_RANGES.get(name, _OF_EITHER_SIGN).problem(value)
        if problem is not None:
            raise ValueError(f"{name} of method {method!r} must be {problem}, got {value}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """See that a setting is one of those that there are.

    Raises:
        ValueError: it is not; the message names it, its value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
