"""The metrics of one set, from what a model said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unilogit_kernels.unlearning import metrics
from unilogit_kernels.unlearning.benchmarks.sets import EvaluationSet
from unilogit_kernels.unlearning.evaluation import Answer
from unilogit_kernels.unlearning.measuring.variants import (
    ANSWER,
    CHOICE,
    PARAPHRASE,
    WRONG,
    Key,
    offered,
    row_id,
)
from unilogit_kernels.unlearning.metrics import Estimate, TokenRecord
from unilogit_kernels.unlearning.metrics.tokens import Floats

OURS, OPENUNLEARNING = "unilogit", "openunlearning"
CONVENTIONS = (OURS, OPENUNLEARNING)
"""Whose rules decide where the field has several: see docs/unlearning.md."""

Values = dict[str, dict[str, Any]]
"""By the position of a row: its values, by the names that OpenUnlearning has for them."""

DIVERGENCES = ("kl_golden_to_model", "kl_model_to_golden")
"""Ends of the names of the divergences from the golden model, as `passes.divergences` has them."""

_PREFIXES = {"real_authors": "ra", "world_facts": "wf"}
"""OpenUnlearning's short names of TOFU's sets."""


@dataclass(frozen=True)
class Metric:
    """An aggregate over rows, and what it was made of.

    Attributes:
        estimate: the aggregate with its interval.
        values: by row; empty where there is nothing of single rows.
        others: what else OpenUnlearning's files hold of such a metric.
    """

    estimate: Estimate
    values: Values = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """A set, and what a model said of it.

    Attributes:
        set: the set.
        records: of each variant of each row.
        answers: of each row that was asked, by its id.
        divergences: `[rows, 2]`, see `passes.divergences`; None where there is no golden model.
        convention: one of `CONVENTIONS`.
        plain: whether its memorisation goes by OpenUnlearning's plain names, not by the set's.
    """

    set: EvaluationSet
    records: Mapping[Key, TokenRecord]
    answers: Mapping[str, Answer]
    divergences: Floats | None
    convention: str = OURS
    plain: bool = False

    @property
    def ids(self) -> list[str]:
        """Of the rows, in their order."""
        return [row_id(row, position) for position, row in enumerate(self.set.rows)]

    @property
    def prefix(self) -> str:
        """What the names of the set's metrics begin with."""
        return _PREFIXES.get(self.set.name, self.set.name)

    @property
    def stem(self) -> str:
        """The same for metrics of answers, which OpenUnlearning names after TOFU's fields."""
        asked = self.set.generation.rouge != "muse" and any(row.prompt for row in self.set.rows)
        return f"{self.prefix}_Q_A" if asked else self.prefix

    def of_answers(self, variant: str = ANSWER) -> dict[str, TokenRecord]:
        """The records of one variant, by the position of the row; of those rows that have it."""
        found = ((str(n), self.records.get((name, variant))) for n, name in enumerate(self.ids))
        return {position: record for position, record in found if record is not None}

    def numbered(self, kind: str) -> dict[str, list[TokenRecord]]:
        """The records of all variants of a kind, by the position of the row."""
        found: dict[str, list[TokenRecord]] = {}
        positions = {name: str(position) for position, name in enumerate(self.ids)}
        for (name, variant), record in self.records.items():
            if variant.startswith(f"{kind}/"):
                found.setdefault(positions[name], []).append(record)
        return found

    def attacked(self) -> dict[str, TokenRecord]:
        """The answers as far as attacks and memorisation look at them: see `CONVENTIONS`."""
        found = self.of_answers()
        if self.convention == OPENUNLEARNING:
            return {position: record.without_last() for position, record in found.items()}
        return found


def metrics_of(measured: Measured) -> dict[str, Metric]:
    """Everything that can be said of one set alone, by name."""
    found: dict[str, Metric] = {}
    for measure, compute in _MEASURES.items():
        if measure in measured.set.measures:
            found.update(compute(measured))
    return found


def mean_of(values: Values, name: str) -> Metric:
    """The mean of one of the rows' values, over the rows that have it."""
    known = [value[name] for value in values.values() if value[name] is not None]
    return Metric(metrics.mean_estimate(known), values)


def truth_ratios(measured: Measured) -> Values:
    """Of each row with wrong answers, the truth ratio."""
    right = measured.of_answers() | measured.of_answers(PARAPHRASE)
    return {
        position: {
            "score": metrics.truth_ratio(
                metrics.mean_loss(right[position].log_prob),
                [metrics.mean_loss(record.log_prob) for record in wrong],
            )
        }
        for position, wrong in measured.numbered(WRONG).items()
    }


def _likelihood(record: TokenRecord) -> dict[str, float]:
    loss = metrics.mean_loss(record.log_prob)
    return {"prob": metrics.probability(record.log_prob), "avg_loss": loss}


def _probability(measured: Measured) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for variant, name in ((ANSWER, "Prob"), (PARAPHRASE, "PARA_Prob")):
        records = measured.of_answers(variant)
        if records:
            values: Values = {n: _likelihood(record) for n, record in records.items()}
            found[f"{measured.stem}_{name}"] = mean_of(values, "prob")
    wrong = measured.numbered(WRONG)
    if not wrong:
        return found
    each = {n: [_likelihood(record) for record in records] for n, records in wrong.items()}
    lists: Values = {
        n: {key: [values[key] for values in many] for key in ("prob", "avg_loss")}
        for n, many in each.items()
    }
    means = metrics.mean_estimate([float(np.mean(many["prob"])) for many in lists.values()])
    found[f"{measured.stem}_PERT_Prob"] = Metric(means, lists)
    right = found[f"{measured.stem}_Prob"].values
    shares: Values = {
        n: {"prob": metrics.normalised_probability(right[n]["prob"], many["prob"])}
        for n, many in lists.items()
    }
    found[f"{measured.stem}_Prob_normalised"] = mean_of(shares, "prob")
    return found


def _rouge(measured: Measured) -> dict[str, Metric]:
    values: Values = {}
    for position, row in enumerate(measured.set.rows):
        answer = measured.answers.get(measured.ids[position])
        if answer is None or answer.said is None:
            continue  # Not asked, or still thinking: neither forgotten nor wrong.
        scores = metrics.rouge_scores(
            [text.strip() for text in (row.completion, *row.answers)],
            answer.said.strip(),
            measured.set.generation.rouge,
            literal=measured.convention == OPENUNLEARNING,
        )
        values[str(position)] = {
            "rouge1_recall": scores.rouge1_recall,
            "rougeL_recall": scores.rouge_l_recall,
            "rougeL_f1": scores.rouge_l_f1,
            "score": scores.value,
            "input": answer.prompt,
            "ground_truth": row.completion.strip(),
            "generation": answer.said.strip(),
        }
    return {f"{measured.stem}_ROUGE": mean_of(values, "score")} if values else {}


def _truth_ratio(measured: Measured) -> dict[str, Metric]:
    values = truth_ratios(measured)
    if not values:
        return {}
    ratios = [value["score"] for value in values.values()]
    if measured.set.role in ("forget", "paraphrase"):
        aggregated, name = metrics.truth_balance(ratios), "truth_ratio"
    else:
        aggregated, name = metrics.truth_preference(ratios), "Truth_Ratio"
    return {f"{measured.prefix}_{name}": Metric(metrics.mean_estimate(aggregated), values)}


def _memorization(measured: Measured) -> dict[str, Metric]:
    exact: Values = {}
    strength: Values = {}
    least = measured.convention == OPENUNLEARNING
    for position, record in measured.attacked().items():
        hits = record.is_argmax
        if len(record):
            exact[position] = {"score": metrics.exact_memorization(hits)}
            strength[position] = {"score": metrics.extraction_strength(hits, least=least)}
        else:  # One token, and that is left out: as OpenUnlearning has it.
            exact[position], strength[position] = {"score": None}, {"score": 0.0}
    start = "" if measured.plain else f"{measured.prefix}_"
    found = {f"{start}extraction_strength": mean_of(strength, "score")}
    if any(value["score"] is not None for value in exact.values()):
        found[f"{start}exact_memorization"] = mean_of(exact, "score")
    return found


def _key_recall(measured: Measured) -> dict[str, Metric]:
    values: Values = {}
    for position, name in enumerate(measured.ids):
        answer = measured.answers.get(name)
        if answer is not None and answer.recalled is not None:
            values[str(position)] = {"recalled": answer.recalled}
    if not values:
        return {}
    hits = [value["recalled"] for value in values.values()]
    return {f"{measured.prefix}_key_recall": Metric(metrics.share_estimate(hits), values)}


def _multiple_choice(measured: Measured) -> dict[str, Metric]:
    values: Values = {}
    shares: Values = {}
    for position, records in measured.numbered(CHOICE).items():
        row = measured.set.rows[int(position)]
        right = offered(row)[1]
        log_probs = [float(np.sum(record.log_prob, dtype=np.float64)) for record in records]
        if not right:
            continue
        picked = metrics.chosen(log_probs)
        values[position] = {"right": picked in right, "chosen": picked, "log_p": log_probs}
        if not row.choices:
            shares[position] = {"score": metrics.right_share(log_probs, right)}
    if not values:
        return {}
    hits = [value["right"] for value in values.values()]
    found = {f"{measured.prefix}_accuracy": Metric(metrics.share_estimate(hits), values)}
    if shares:
        found[f"{measured.prefix}_mc2"] = mean_of(shares, "score")
    return found


def _perplexity(measured: Measured) -> dict[str, Metric]:
    values: Values = {
        position: {
            "loss": -float(np.sum(record.log_prob, dtype=np.float64)),
            "tokens": len(record),
        }
        for position, record in measured.of_answers().items()
    }
    rows = list(values.values())
    columns = [np.array([row[name] for row in rows]) for name in ("loss", "tokens")]
    estimate = metrics.bootstrap(metrics.perplexity, columns)
    return {f"{measured.prefix}_perplexity": Metric(estimate, values)}


def _divergence(measured: Measured) -> dict[str, Metric]:
    if measured.divergences is None:
        return {}
    found = {}
    for name, column in zip(DIVERGENCES, measured.divergences.T, strict=True):
        values: Values = {str(n): {"score": float(kl)} for n, kl in enumerate(column)}
        found[f"{measured.prefix}_{name}"] = mean_of(values, "score")
    return found


_MEASURES: dict[str, Callable[[Measured], dict[str, Metric]]] = {
    "probability": _probability,
    "rouge": _rouge,
    "truth_ratio": _truth_ratio,
    "memorization": _memorization,
    "key_recall": _key_recall,
    "multiple_choice": _multiple_choice,
    "perplexity": _perplexity,
    "divergence": _divergence,
}
