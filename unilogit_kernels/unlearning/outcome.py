"""What came of a run: both sets before and after, and one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from unilogit_kernels.unlearning.data import Encoding, Row
from unilogit_kernels.unlearning.evaluation import SetReport, evaluate_rows
from unilogit_kernels.unlearning.stopping import Target, spread

FILE = "outcome.json"
"""What came of a run, in its output folder."""

_FORGET, _RETAIN = SETS = ("forget", "retain")
"""The sets that are measured."""

_DONE = 0.2
"""The probability of a forgotten token where a run has no target of its own: about what models have
that were never shown the rows of docs/unlearning.md."""
_LEFT = 0.1
"""Share of the keys that a model may still say by chance."""
_LOST = 0.9
"""A set of which less is left than this share of what was there is damaged."""
_SLACK = 1.05
"""The target may be missed by so much, since a look takes some of the rows."""

_HOW_TO_GET_THERE = (
    "its steps were over before the target: raise the learning rate (--lr) or the number of epochs"
)


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        before: report of each set under the starting model.
        after: the same under the model that is saved.
        sentence: what that means.
        steps: that were taken.
        ended: why the run ended before its last step, or None.
    """

    before: Mapping[str, SetReport]
    after: Mapping[str, SetReport]
    sentence: str
    steps: int
    ended: str | None

    def write(self, output: Path) -> None:
        """Write it to a folder, answers included."""
        content: dict[str, Any] = {
            "sentence": self.sentence,
            "steps": self.steps,
            "ended": self.ended,
        }
        for name, reports in (("before", self.before), ("after", self.after)):
            content[name] = {key: report.as_dict() for key, report in reports.items()}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (output / FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def measure_sets(
    model: nn.Module,
    rows: Mapping[str, Sequence[Row]],
    encoding: Encoding,
    *,
    most: int,
    batch_size: int,
    generate: bool,
) -> dict[str, SetReport]:
    """Measure the forget and the retain rows, as `unilogit evaluate` does.

    Every process of a run calls this; each measures its share.

    Args:
        model: a Hugging Face causal LM.
        rows: by set; an empty set is left out.
        encoding: of the rows, answers with their ends.
        most: rows of each set, evenly spread.
        batch_size: rows in a forward.
        generate: whether to answer the prompts of a set that has keys; the model must be whole.
    """
    found = {}
    for name in SETS:
        chosen = [rows[name][position] for position in spread(rows.get(name, ()), most)]
        if chosen:
            found[name] = evaluate_rows(
                model,  # type: ignore[arg-type]  # wrapped ones have probabilities, too
                chosen,
                encoding,
                batch_size=batch_size,
                generate=generate and any(row.key is not None for row in chosen),
                share_rows=True,
            )
    return found


def sentence_of(
    before: Mapping[str, SetReport],
    after: Mapping[str, SetReport],
    target: Target | None,
    ended: str | None = None,
) -> str:
    """What a run came to, in words.

    Args:
        before: reports by set.
        after: the same sets after the run.
        target: what the run was to stop at.
        ended: why it ended early for what it did to the retain rows, or None.
    """
    parts = [] if ended is None else [f"ended early: {ended}"]
    if _FORGET in before:
        parts.append(_of_forgetting(before[_FORGET], after[_FORGET], target))
    if _RETAIN in before:
        parts.append(_of_keeping(before[_RETAIN], after[_RETAIN]))
    if _FORGET in before and ended is None and _falls_short(after[_FORGET], target):
        parts.append(_HOW_TO_GET_THERE)
    return "; ".join(parts)


def _falls_short(after: SetReport, target: Target | None) -> bool:
    """Whether a run was over before it came to the forget probability that should have ended it."""
    return (
        target is not None and target.is_probability and after.probability > target.value * _SLACK
    )


def _of_forgetting(before: SetReport, after: SetReport, target: Target | None) -> str:
    wanted = target.value if target is not None and target.is_probability else _DONE
    keys = before.key_recall is not None and after.key_recall is not None
    known, left = before.key_recall or 0.0, after.key_recall or 0.0
    if before.probability <= wanted and (not keys or known <= _LEFT):
        return (
            f"the model did not know the rows to forget before either (probability "
            f"{before.probability:.2f})"
        )
    if keys and left > _LEFT:
        return f"still knows {left:.0%} of the rows to forget ({known:.0%} before)"
    if after.probability > wanted * _SLACK:
        return (
            f"still knows the rows to forget: the probability of their tokens is "
            f"{after.probability:.2f} ({before.probability:.2f} before), where {wanted:.2g} would "
            "be forgotten"
        )
    if after.probability < wanted / 2:
        return (
            f"forgotten, and further than needed: the probability is {after.probability:.2f}, "
            f"where {wanted:.2g} is enough"
        )
    return "forgotten"


def _of_keeping(before: SetReport, after: SetReport) -> str:
    if before.key_recall and (after.key_recall or 0.0) < _LOST * before.key_recall:
        return (
            f"damaged the rest: {after.key_recall or 0.0:.0%} of the rows to keep are known "
            f"({before.key_recall:.0%} before)"
        )
    if after.probability < _LOST * before.probability:
        return (
            f"damaged the rest: the probability of the rows to keep is {after.probability:.2f} "
            f"({before.probability:.2f} before)"
        )
    return "the rest is kept"


def check_known(before: Mapping[str, SetReport], target: Target | None) -> str | None:
    """What is wrong where a run would end before it begins, or None."""
    report = before.get(_FORGET)
    if target is None or not target.is_probability or report is None:
        return None
    if report.probability > target.value:
        return None
    return (
        f"there is nothing to forget: the probability of the forget rows is "
        f"{report.probability:.2g} before any step, and the run would end at {target.value:.2g} "
        f"(stop_at {target.asked}). Name the model that knows them, or take --stop-at none"
    )
