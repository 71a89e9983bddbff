"""When a run has forgotten enough, or damaged too much: what it is asked for, and when to look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.measuring.openunlearning import logs_in, read_logs

PROBABILITY = "probability"
"""The metric of the forget rows that the Trainer measures itself."""
_GOLDEN, _NONE = "golden", "none"
_OF_GOLDEN = "forget_Q_A_Prob"
"""That metric in a `*_EVAL.json`."""
_SAFETY = 2
"""How many looks there are to be before the target, as far as a fall can be foretold."""


@dataclass(frozen=True)
class Target:
    """What a run is to reach.

    Attributes:
        metric: `"probability"`, or a metric of the Trainer's evaluations, such as `eval_loss`.
        value: where the run ends: from whichever side the metric comes.
        asked: the setting.
        file: the golden model's results that the value was read from, or None.
    """

    metric: str
    value: float
    asked: str
    file: Path | None = None

    @property
    def is_probability(self) -> bool:
        """Whether it is the probability of the forget rows, which the Trainer measures itself."""
        return self.metric == PROBABILITY

    def reached(self, first: float, value: float) -> bool:
        """Whether a metric that began on one side of the target has come to it.

        Args:
            first: what it was when it was first measured.
            value: what it is.
        """
        return value >= self.value if first < self.value else value <= self.value


def read_target(stop_at: str | None) -> Target | None:
    """What `stop_at` asks for.

    Args:
        stop_at: `"probability=0.2"`, `"golden=G_EVAL.json"` for the forget probability in the
            results of a golden model (a file, or the folder of one), `"METRIC=VALUE"`, or None or
            `"none"` for nothing.

    Raises:
        RunError: it is none of these, or the results cannot be read.
    """
    if stop_at is None or stop_at == _NONE:
        return None
    name, separator, text = stop_at.partition("=")
    if not separator or not name or not text:
        raise RunError(
            "stop_at takes NAME=VALUE (probability=0.2, golden=G_EVAL.json, or a metric of an "
            f"evaluation such as eval_loss=2), or none, got {stop_at!r}"
        )
    if name == _GOLDEN:
        value, file = _of_golden(Path(text))
        return Target(PROBABILITY, value, stop_at, file)
    try:
        value = float(text)
    except ValueError:
        raise RunError(f"stop_at {name} takes a number, got {stop_at!r}") from None
    if name == PROBABILITY:
        if not 0 < value < 1:
            raise RunError(f"stop_at probability must be between 0 and 1, got {stop_at!r}")
        return Target(name, value, stop_at)
    if not math.isfinite(value):
        raise RunError(f"stop_at {name} must be a finite number, got {stop_at!r}")
    return Target(name if name.startswith("eval_") else f"eval_{name}", value, stop_at)


def _of_golden(path: Path) -> tuple[float, Path]:
    """The forget probability of a golden model, and the file that holds it."""
    found = logs_in(path)
    if found is None:
        raise RunError(f"stop_at golden={path}: no such file, and no folder with a *_EVAL.json")
    logs = read_logs(found)
    if _OF_GOLDEN not in logs:
        raise RunError(
            f"stop_at golden={path}: {found} has no {_OF_GOLDEN}; it has {', '.join(sorted(logs))}"
        )
    value = float(logs[_OF_GOLDEN]["agg_value"])
    if not 0 < value < 1:
        raise RunError(f"stop_at golden={path}: {_OF_GOLDEN} must be between 0 and 1, got {value}")
    return value, found


def steps_to_next_look(seen: Sequence[tuple[int, float]], target: float, most: int) -> int:
    """How many steps may pass before a falling figure is measured again.

    Far from the target it is `most`, near it 1, so that a run does not overshoot by all the steps
    between two looks: half of the steps are taken in which the figure would come to the target if
    its fall grew steeper as it did between the last looks. They double from look to look at most,
    since a fall begins slowly.

    Args:
        seen: step and figure of each look so far, in order.
        target: where the run is to end.
        most: steps between two looks at most.

    Example:
        >>> steps_to_next_look([(0, 1.0)], 0.2, 5), steps_to_next_look([(0, 1.0), (4, 0.3)], 0.2, 5)
        (1, 1)
        >>> steps_to_next_look([(0, 1.0), (4, 0.99)], 0.2, 5)
        5
    """
    if len(seen) < 2:
        return 1
    (first, start), (before, higher), (last, now) = seen[0], seen[-2], seen[-1]
    allowed, slope, growth = min(most, 2 * (last - before)), (higher - now) / (last - before), 0.0
    if len(seen) > 2:
        earlier, highest = seen[-3]
        growth = slope - (highest - higher) / (before - earlier)
        growth = max(0.0, growth / ((last - earlier) / 2))
    slope = max(slope + growth * (last - before) / 2, (start - now) / (last - first))
    if slope <= 0:
        return allowed
    left = max(0.0, now - target)
    steps = 2 * left / (slope + math.sqrt(slope * slope + 2 * growth * left))
    return max(1, min(allowed, int(steps / _SAFETY)))


def spread(rows: Sequence[object], most: int) -> list[int]:
    """Positions of so many rows at most, evenly from the first to the last.

    Example:
        >>> spread("abcdef", 3), spread("ab", 3)
        ([0, 2, 4], [0, 1])
    """
    count = min(len(rows), most)
    return [position * len(rows) // count for position in range(count)]
