"""What may be said of two measurements: a speed-up only where the errors are comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from unilogit_kernels.bench.measure import Measurement
from unilogit_kernels.bench.provider import OURS

COMPARABLE = 2.0
"""Errors are comparable if ours is at most this many times the other's..."""
ROUNDINGS = 8 * torch.finfo(torch.float32).eps
"""... or a few roundings of float32, as a sum over tokens and columns makes."""
WRONG = 0.5
"""An error of so much is not the same job done less well, it is not done."""


def why_incomparable(ours: Measurement, other: Measurement) -> str | None:
    """Why a ratio of the two times would be no speed-up, or None.

    Args:
        ours: The one that is said to be faster.
        other: The one it is compared with; not a bound.
    """
    errors = [("loss", ours.loss_error, other.loss_error)]
    if ours.mode != "forward":
        errors.append(("gradient", ours.gradient_error, other.gradient_error))
    for what, mine, theirs in errors:
        if mine is None or theirs is None:
            return f"no {what} error is known"
        if not theirs <= WRONG:
            return f"its {what} is wrong: error {theirs:.1e}"
        if not mine <= max(COMPARABLE * theirs, ROUNDINGS):
            return f"{what} error {mine:.1e} here, {theirs:.1e} there"
    return None


def speed_up(ours: Measurement, other: Measurement) -> float | None:
    """How many times faster ours is, or None where that must not be said."""
    if is_ours(other) or other.loss == "floor" or other.relative_to_ours is None:
        return None
    return None if why_incomparable(ours, other) else other.relative_to_ours


def verdict(ours: Measurement, other: Measurement) -> str:
    """A cell: `"3.1x faster"`, `"1.2x slower"`, `"1.31x this bound"`, or why there is no ratio."""
    ratio = other.relative_to_ours
    if is_ours(other) or ratio is None:
        return ""
    if other.loss == "floor":
        return f"{1 / ratio:.2f}x this bound"
    reason = why_incomparable(ours, other)
    if reason is not None:
        return f"not compared: {reason}"
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def is_ours(m: Measurement) -> bool:
    """Whether a measurement is of this package."""
    return m.provider in OURS.values()


def find_ours(measurements: Sequence[Measurement], loss: str = "unilogit") -> Measurement | None:
    """Ours for the same job as `loss`, if it ran; Unilogit for a bound."""
    name = OURS.get(loss, OURS["unilogit"])
    return next((m for m in measurements if m.provider == name and m.milliseconds), None)


def fastest_peer(measurements: Sequence[Measurement]) -> Measurement | None:
    """The peer with the shortest median whose result is not wrong."""
    peers = [
        m
        for m in measurements
        if not is_ours(m) and m.loss != "floor" and m.milliseconds and not _is_wrong(m)
    ]
    return min(peers, key=lambda m: m.median, default=None)


def _is_wrong(m: Measurement) -> bool:
    errors = [m.loss_error] if m.mode == "forward" else [m.loss_error, m.gradient_error]
    return any(error is None or math.isnan(error) or error > WRONG for error in errors)
