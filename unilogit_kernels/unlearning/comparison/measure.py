"""What is measured of a model in memory: a quick look during a run, and everything at its end.

Both come from one pass over the tokens without logits, as in `measuring`; numbers are given apart
for the rows that settings are chosen on and for those that are reported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from unilogit_kernels.unlearning import metrics
from unilogit_kernels.unlearning.benchmarks.sets import EvaluationSet, Role
from unilogit_kernels.unlearning.comparison.parts import AnswersPlan
from unilogit_kernels.unlearning.comparison.subject import Bench, Subject
from unilogit_kernels.unlearning.data import Example, Features
from unilogit_kernels.unlearning.evaluation import Answer, answer_rows
from unilogit_kernels.unlearning.measuring.audit import estimates
from unilogit_kernels.unlearning.measuring.joint_metrics import Logs, joint_metrics
from unilogit_kernels.unlearning.measuring.openunlearning import as_logs
from unilogit_kernels.unlearning.measuring.passes import token_records
from unilogit_kernels.unlearning.measuring.set_metrics import Measured, metrics_of, truth_ratios
from unilogit_kernels.unlearning.measuring.variants import ANSWER, Key, asked_rows, row_id
from unilogit_kernels.unlearning.metrics import TokenRecord

VALIDATION, TEST, ALL = "validation", "test", "all"
PARTS = (VALIDATION, TEST, ALL)
"""Of a set's rows: those that settings are chosen on, the others, and both."""

Look = dict[str, dict[str, dict[str, float]]]
"""By set and part: `probability` of the answers, and `exact`, the share that greedy decoding gives
word for word."""


def by_part(
    values: Mapping[int, float], validation: Iterable[int], positions: Iterable[int] | None = None
) -> dict[str, float]:
    """The mean of rows' values over each part; a part without rows is left out.

    Args:
        values: by the position of the row.
        validation: positions of the rows that settings are chosen on.
        positions: of the rows that count; all of them if None.

    Example:
        >>> by_part({0: 1.0, 1: 0.0, 2: 0.5}, {0})
        {'validation': 1.0, 'test': 0.25, 'all': 0.5}
    """
    chosen, counted = set(validation), set(values if positions is None else positions)
    groups = {
        VALIDATION: [v for n, v in values.items() if n in counted and n in chosen],
        TEST: [v for n, v in values.items() if n in counted and n not in chosen],
        ALL: [v for n, v in values.items() if n in counted],
    }
    return {part: float(np.mean(group)) for part, group in groups.items() if group}


def recall_of(records: Mapping[int, TokenRecord]) -> dict[str, dict[int, float]]:
    """By measure and position of the row, what a look is made of."""
    return {
        "probability": {n: metrics.probability(record.log_prob) for n, record in records.items()},
        "exact": {n: float(record.is_argmax.all()) for n, record in records.items()},
    }


class Looker:
    """Looks at a model again and again, on the same rows.

    Args:
        bench: the rows.
        batch_size: rows in one forward.
    """

    def __init__(self, bench: Bench, batch_size: int) -> None:
        self.bench, self.batch_size = bench, batch_size
        self._fed: dict[str, list[Features]] = {}

    def feed(self, subject: Subject) -> None:
        """Make what the model is fed, once for all looks."""
        data = self.bench.data
        for each in data.sets:
            examples = _answers(self.bench, each)
            shown = [part for n in data.looked_at[each.name] for part in examples.get(n, ())]
            self._fed[each.name] = self.bench.fed(subject, f"look-{each.name}", shown)

    def look(self, model: nn.Module, fed: Mapping[str, Sequence[Features]] | None = None) -> Look:
        """What a model knows now.

        Args:
            model: whole, or its top layers: what `fed` is for.
            fed: in place of what `feed` made, of some sets or all.
        """
        found: Look = {}
        data, fed = self.bench.data, self._fed if fed is None else fed
        for each in data.sets:
            if each.name not in fed:
                continue
            records = token_records(
                model,
                fed[each.name],
                pad_id=self.bench.pad_id,
                batch_size=self.batch_size,
            )
            rows = self._joined(each, records)
            found[each.name] = {part: {} for part in PARTS}
            for measure, values in recall_of(rows).items():
                for part, mean in by_part(values, data.validation[each.name]).items():
                    found[each.name][part][measure] = mean
        return found

    def plainly_fed(self, roles: Collection[Role]) -> dict[str, list[Features]]:
        """The rows of a look as token ids, for a whole model; of sets of some roles."""
        data = self.bench.data
        found = {}
        for each in data.sets:
            if each.role not in roles:
                continue
            examples = _answers(self.bench, each)
            shown = [part for n in data.looked_at[each.name] for part in examples.get(n, ())]
            found[each.name] = [example.features() for example in shown]
        return found

    def _joined(
        self, each: EvaluationSet, records: Sequence[TokenRecord]
    ) -> dict[int, TokenRecord]:
        examples = _answers(self.bench, each)
        found, rest = {}, iter(records)
        for n in self.bench.data.looked_at[each.name]:
            if n in examples:
                found[n] = TokenRecord.joined([next(rest) for _ in examples[n]])
        return found


def _answers(bench: Bench, each: EvaluationSet) -> dict[int, tuple[Example, ...]]:
    """By the position of the row, its answer as examples."""
    examples = bench.variants[each.name]
    named = ((n, (row_id(row, n), ANSWER)) for n, row in enumerate(each.rows))
    return {n: examples[key] for n, key in named if key in examples}


def measure_all(
    bench: Bench, subject: Subject, answers: AnswersPlan, golden: Logs | None
) -> dict[str, Any]:
    """Everything that the rows allow, of one model.

    Args:
        bench: the rows.
        subject: the model.
        answers: how it is asked.
        golden: the golden model's results; None for that model itself.

    Returns:
        For JSON: `sets`, by set, measure and part; `truth_ratios` of the rows of each set with
        wrong answers; `joint`, metrics of several sets; `not_computed`; `answers` of each set; and
        `logs`, in OpenUnlearning's shape, for `golden`.
    """
    measured = [_measured(bench, subject, each, answers) for each in bench.data.sets]
    found = {name: metric for each in measured for name, metric in metrics_of(each).items()}
    logs = as_logs(found | joint_metrics(measured, found, None)[0]) if golden is None else golden
    joint, missing = joint_metrics(measured, found, logs)
    sets: dict[str, Any] = {}
    ratios: dict[str, list[float]] = {}
    for each in measured:
        validation = bench.data.validation[each.set.name]
        values = _values(each)
        sets[each.set.name] = {name: by_part(rows, validation) for name, rows in values.items()}
        if "truth_ratio" in values:
            ratios[each.set.name] = [v["score"] for v in truth_ratios(each).values()]
    return {
        "sets": sets,
        "truth_ratios": ratios,
        "joint": estimates(joint),
        "not_computed": {n: why for n, why in missing.items() if "kl_" not in n},
        "answers": {
            each.set.name: {
                name: {
                    "prompt": answer.prompt,
                    "expected": answer.expected.strip(),
                    "said": (answer.said if answer.said is not None else answer.generated).strip(),
                    "recalled": answer.recalled,
                }
                for name, answer in each.answers.items()
            }
            for each in measured
        },
        "logs": logs if golden is None else None,
    }


def _measured(
    bench: Bench, subject: Subject, each: EvaluationSet, answers: AnswersPlan
) -> Measured:
    blocks = bench.variants[each.name]
    examples = [part for parts in blocks.values() for part in parts]
    records: dict[Key, TokenRecord] = {}
    if examples:
        found = iter(
            token_records(
                subject.trained,
                bench.fed(subject, f"all-{each.name}", examples),
                pad_id=bench.pad_id,
                batch_size=answers.batch_size,
            )
        )
        records = {
            key: TokenRecord.joined([next(found) for _ in parts]) for key, parts in blocks.items()
        }
    said: dict[str, Answer] = {}
    rows = {row_id(row, n): row for n, row in enumerate(asked_rows(each)) if row.prompt}
    wanted = answers.generate and (not answers.sets or each.name in answers.sets)
    if wanted and rows and each.measures & {"rouge", "key_recall"}:
        given = answer_rows(
            subject.whole,
            list(rows.values()),
            bench.encoding,
            batch_size=answers.batch_size,
            stop=each.generation.stop,
            max_new_tokens=each.generation.max_new_tokens,
        )
        said = dict(zip(rows, given, strict=True))
    return Measured(each, records, said, None, plain=each is bench.data.sets[0])


def _values(measured: Measured) -> dict[str, dict[int, float]]:
    """By measure and position of the row."""
    values = recall_of({int(n): record for n, record in measured.of_answers().items()})
    if "truth_ratio" in measured.set.measures:
        fold = metrics.truth_preference
        if measured.set.role in ("forget", "paraphrase"):
            fold = metrics.truth_balance
        ratios = {int(n): v["score"] for n, v in truth_ratios(measured).items()}
        values["truth_ratio"] = {n: float(fold(ratio)) for n, ratio in ratios.items()}
    for n, name in enumerate(measured.ids):
        answer = measured.answers.get(name)
        if answer is None:
            continue
        if answer.recalled is not None:
            values.setdefault("key_recall", {})[n] = float(answer.recalled)
        if answer.rouge_l is not None:
            values.setdefault("rouge_l", {})[n] = answer.rouge_l
    return {name: rows for name, rows in values.items() if rows}
