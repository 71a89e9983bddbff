"""The metrics of several sets together, or against a golden model; and why one is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unilogit_kernels.unlearning import metrics
from unilogit_kernels.unlearning.measuring.set_metrics import (
    DIVERGENCES,
    Measured,
    Metric,
    Values,
)
from unilogit_kernels.unlearning.metrics import TokenRecord

Logs = Mapping[str, Any]
"""A model's results in OpenUnlearning's shape: see `openunlearning.read_logs`."""

Missing = dict[str, str]
"""Names of metrics, and what they lack."""

_Sides = Mapping[str, Mapping[str, float]]
"""Scores of the rows to forget and of those held out, by their positions."""

_SIDES = ("forget", "holdout")
_ATTACKS = ("mia_loss", "mia_zlib", "mia_reference", "mia_min_k", "mia_min_k_plus_plus")
_LEAK = "mia_min_k"
"""The attack that PrivLeak is made of."""
_NO_GOLDEN = "a golden model, or its results (--golden)"


def joint_metrics(
    sets: Sequence[Measured], found: Mapping[str, Metric], golden: Logs | None
) -> tuple[dict[str, Metric], Missing]:
    """What no set can tell alone.

    Args:
        sets: all of them, as one model answered them.
        found: the metrics of each.
        golden: the golden model's results, or None.

    Returns:
        Metrics by name; and of those that the sets did not allow, what they lack.
    """
    joint: dict[str, Metric] = {}
    missing: Missing = {}
    forget = [each for each in sets if each.set.role == "forget"]
    _add_attacks(sets, golden, joint, missing)
    _add_forget_quality(forget, found, golden, joint, missing)
    _add_utility(sets, found, joint, missing)
    if all(each.divergences is None for each in sets):
        lacking = "a golden model (--golden)" if golden is None else "the golden model's weights"
        missing.update(dict.fromkeys(DIVERGENCES, lacking))
    return joint, missing


def _add_forget_quality(
    forget: Sequence[Measured],
    found: Mapping[str, Metric],
    golden: Logs | None,
    joint: dict[str, Metric],
    missing: Missing,
) -> None:
    name = next((n for n in (f"{each.prefix}_truth_ratio" for each in forget) if n in found), None)
    if name is None:
        missing["forget_quality"] = "wrong answers to the rows to forget"
        return
    if golden is None:
        missing["forget_quality"] = _NO_GOLDEN
        return
    of_golden = _scores(golden.get(name))
    if of_golden is None:
        missing["forget_quality"] = f"the golden model's {name} of each row"
        return
    own = _scores({"value_by_index": found[name].values}) or {}
    groups = _paired(own, of_golden)
    joint["forget_quality"] = Metric(metrics.bootstrap(_forget_quality, *groups))


def _forget_quality(*samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of two samples, or of two rows of drawn ones."""
    found = metrics.forget_qualities(*(np.atleast_2d(sample) for sample in samples))
    return found if samples[0].ndim > 1 else found[0]


def _add_utility(
    sets: Sequence[Measured],
    found: Mapping[str, Metric],
    joint: dict[str, Metric],
    missing: Missing,
) -> None:
    groups: list[list[NDArray[np.float64]]] = []
    for each in sets:
        if each.set.role not in ("retain", "general"):
            continue
        kind = "Prob" if each.set.role == "retain" else "Prob_normalised"
        names = f"{each.stem}_{kind}", f"{each.stem}_ROUGE", f"{each.prefix}_Truth_Ratio"
        parts = [found[name].values for name in names if name in found]
        if len(parts) < len(names):
            continue
        rows = [n for n in parts[0] if n in parts[1] and n in parts[2]]
        if rows:
            truth = metrics.truth_preference([parts[2][n]["score"] for n in rows])
            columns = [np.array([parts[0][n]["prob"] for n in rows])]
            groups.append([*columns, np.array([parts[1][n]["score"] for n in rows]), truth])
    if groups:
        joint["model_utility"] = Metric(metrics.bootstrap(_utility, *groups))
    else:
        missing["model_utility"] = (
            "rows to keep, or of general knowledge, with wrong answers and a question"
        )


def _utility(*columns: NDArray[np.float64]) -> NDArray[np.float64]:
    means = np.stack([column.mean(axis=-1) for column in columns], axis=-1)
    return metrics.model_utility(means)


def _add_attacks(
    sets: Sequence[Measured], golden: Logs | None, joint: dict[str, Metric], missing: Missing
) -> None:
    sides = {
        role: [each for each in sets if each.set.role == role and _attacked(each)]
        for role in _SIDES
    }
    if not all(sides.values()):
        kind, name = "to forget", "forget"
        if sides["forget"]:
            kind, name = "like those to forget that no model has seen", "holdout"
        lacking = f"rows {kind}, in a set {name!r}"
        missing.update(dict.fromkeys((*_ATTACKS, "privleak"), lacking))
        return
    reference = _like(_sides_of(golden, "mia_loss"), sides)
    for name in _ATTACKS:
        if name == "mia_reference" and reference is None:
            missing[name] = f"{_NO_GOLDEN}, with mia_loss of each row"
            continue
        scores = {role: _attack(name, each, reference, role) for role, each in sides.items()}
        columns = [_column(values) for values in scores.values()]
        area = metrics.bootstrap(metrics.auc, *([column] for column in columns))
        parts = {
            role: {"agg_value": float(column.mean()), "value_by_index": scores[role]}
            for role, column in zip(scores, columns, strict=True)
        }
        joint[name] = Metric(area, others={**parts, "auc": area.value})
    _add_leak(_like(_sides_of(golden, _LEAK), sides), golden, joint, missing)


def _attacked(each: Measured) -> bool:
    return "membership" in each.set.measures and bool(each.of_answers())


def _column(values: Values) -> NDArray[np.float64]:
    return np.array([value["score"] for value in values.values()])


def _attack(
    name: str,
    sets: Sequence[Measured],
    reference: _Sides | None,
    role: str,
) -> Values:
    """The scores of the rows of all sets, numbered through."""
    found: Values = {}
    for each in sets:
        whole, cut = each.of_answers(), each.attacked()
        for position, record in whole.items():
            number = str(len(found))
            loss = metrics.loss_score(record.log_prob)
            if name == "mia_loss":
                score = loss
            elif name == "mia_zlib":
                score = metrics.zlib_score(loss, each.set.rows[int(position)].completion.strip())
            elif name == "mia_reference":
                score = metrics.reference_score(loss, (reference or {})[role][number])
            else:
                score = _min_k(name, cut[position])
            found[number] = {"score": score}
    return found


def _min_k(name: str, record: TokenRecord) -> float:
    if not len(record):
        return 0.0  # As OpenUnlearning, which alone leaves out the only token of an answer.
    if name == "mia_min_k":
        return metrics.min_k_score(record.log_prob)
    return metrics.min_k_plus_plus_score(record.log_prob, record.mean, record.variance)


def _add_leak(
    sides: _Sides | None, golden: Logs | None, joint: dict[str, Metric], missing: Missing
) -> None:
    entry = (golden or {}).get(_LEAK)
    if not isinstance(entry, Mapping):
        missing["privleak"] = _NO_GOLDEN if golden is None else f"the golden model's {_LEAK}"
        return
    own = {role: joint[_LEAK].others[role]["value_by_index"] for role in _SIDES}
    forget, holdout = (_column(own[role]) for role in _SIDES)
    if sides is None:  # Its rows are not known, so its area does not vary with them.
        area = float(entry["agg_value"])

        def against_area(*columns: NDArray[np.float64]) -> NDArray[np.float64]:
            return metrics.privacy_leak(metrics.auc(*columns), area)

        joint["privleak"] = Metric(metrics.bootstrap(against_area, [forget], [holdout]))
        return

    def against_rows(*columns: NDArray[np.float64]) -> NDArray[np.float64]:
        forget, golden_forget, holdout, golden_holdout = columns
        return metrics.privacy_leak(
            metrics.auc(forget, holdout), metrics.auc(golden_forget, golden_holdout)
        )

    others = [np.array([sides[role][n] for n in own[role]]) for role in _SIDES]
    joint["privleak"] = Metric(
        metrics.bootstrap(against_rows, [forget, others[0]], [holdout, others[1]])
    )


def _scores(entry: Any) -> dict[str, float] | None:
    """The scores of rows in results, by the positions of the rows."""
    values = entry.get("value_by_index") if isinstance(entry, Mapping) else None
    if not values:
        return None
    known = {n: value.get("score") for n, value in values.items()}
    return {n: float(score) for n, score in known.items() if score is not None} or None


def _sides_of(golden: Logs | None, attack: str) -> _Sides | None:
    """The scores of an attack on the golden model, of both sides; None where they are not known."""
    entry = (golden or {}).get(attack)
    if not isinstance(entry, Mapping):
        return None
    sides = {role: _scores(entry.get(role)) for role in _SIDES}
    known = {role: side for role, side in sides.items() if side is not None}
    return known if len(known) == len(sides) else None


def _like(known: _Sides | None, sets: Mapping[str, Sequence[Measured]]) -> _Sides | None:
    """The golden model's scores, if they are of as many rows as this model's."""
    sizes = {role: sum(len(each.of_answers()) for each in many) for role, many in sets.items()}
    positions = {role: {str(n) for n in range(size)} for role, size in sizes.items()}
    fits = known is not None and all(known[role].keys() == positions[role] for role in sizes)
    return known if fits else None


def _paired(
    own: Mapping[str, float], golden: Mapping[str, float]
) -> list[list[NDArray[np.float64]]]:
    """Groups for a bootstrap: the same rows of both models are drawn together."""
    if own.keys() == golden.keys():
        return [[np.array(list(own.values())), np.array([golden[n] for n in own])]]
    return [[np.array(list(own.values()))], [np.array(list(golden.values()))]]
