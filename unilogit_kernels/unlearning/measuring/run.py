"""An evaluation from models and sets to files: what `unilogit evaluate --output` does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from unilogit_kernels.unlearning.benchmarks.sets import EvaluationSet
from unilogit_kernels.unlearning.data import Features, count_labels
from unilogit_kernels.unlearning.errors import RunError, check_writable, reading
from unilogit_kernels.unlearning.evaluation import Answer, answer_rows
from unilogit_kernels.unlearning.measuring.audit import audit_record, estimates
from unilogit_kernels.unlearning.measuring.joint_metrics import Logs, joint_metrics
from unilogit_kernels.unlearning.measuring.openunlearning import (
    as_logs,
    logs_in,
    read_logs,
    write_logs,
)
from unilogit_kernels.unlearning.measuring.passes import divergences, token_records
from unilogit_kernels.unlearning.measuring.request import Request, Watcher
from unilogit_kernels.unlearning.measuring.set_metrics import Measured, Metric, metrics_of
from unilogit_kernels.unlearning.measuring.store import (
    load_answers,
    load_divergences,
    load_records,
    save_answers,
    save_divergences,
    save_records,
    write_json,
)
from unilogit_kernels.unlearning.measuring.subject import Subject, file_digests
from unilogit_kernels.unlearning.measuring.variants import ANSWER, Key, asked_rows, row_id
from unilogit_kernels.unlearning.metrics import TokenRecord
from unilogit_kernels.unlearning.metrics.tokens import Floats
from unilogit_kernels.unlearning.processes import from_first, over_rows, size, together
from unilogit_kernels.unlearning.record import Record, digests, printing_date

_T = TypeVar("_T")

_RECORD = "evaluation.json"
_RESULTS, _AUDIT = "results.json", "audit.json"
_UNUSUAL = re.compile(r"[^\w.-]")
"""What the names of sets may hold and those of files had better not."""
_DIGITS = 12
"""Of the digest of the golden model's weights, in the names of files about both models."""


@dataclass(frozen=True)
class Report:
    """What came out.

    Attributes:
        columns: `"starting"`, `"model"` and `"golden"`, as far as they were asked for: their
            aggregates by the name of the metric, with an interval where it is known.
        missing: metrics of the model that could not be computed, and what each lacks.
    """

    columns: dict[str, dict[str, dict[str, Any]]]
    missing: dict[str, str]


def measure(request: Request, watcher: Watcher, device: torch.device | None = None) -> Report:
    """Measure a model, and those it is compared with, and write what came out.

    The model's results lie in the output folder, those of the golden and of the starting model in
    its folders `golden` and `starting`. What is computed of a set is written when it is done, and
    not computed again by the same request.

    Where several processes were launched, each calls this with the same request. They share the
    rows of each set, each with the models whole; the first reads and writes the files, and all
    return the same.

    Args:
        request: what is asked for.
        watcher: is told how it goes on.
        device: of this process, see `load_model`.

    Raises:
        RunError: a model, its results or the output folder do not fit, or another process failed.
        LostProcessError: another process is gone.
        DataError: a row does not.
        UnsupportedHeadError: a model's lm_head does not.
    """
    request.check()
    from_first(lambda: check_writable(request.output, folder=True, option="--output"))
    columns: dict[str, dict[str, dict[str, Any]]] = {}
    golden: _Evaluation | None = None
    logs: Logs | None = None
    roles = ("golden", "starting")
    read = from_first(lambda: {role: _results_of(role, request) for role in roles})
    model = _begin("model", request, watcher, device)
    if read["golden"] is not None:
        logs = read["golden"]
        columns["golden"] = _aggregates(logs)
    elif request.golden is not None:
        golden = _begin("golden", request, watcher, device)
        done = golden.run(None)
        logs = as_logs(done.found)
        columns["golden"] = estimates(done.found)
    if read["starting"] is not None:
        columns["starting"] = _aggregates(read["starting"])
    elif request.starting is not None:
        found = _begin("starting", request, watcher, device).run(logs, golden).found
        columns["starting"] = estimates(found)
    done = model.run(logs, golden)
    columns["model"] = estimates(done.found)
    order = ("starting", "model", "golden")
    return Report({name: columns[name] for name in order if name in columns}, done.missing)


def _begin(
    role: str, request: Request, watcher: Watcher, device: torch.device | None
) -> _Evaluation:
    folder = request.output if role == "model" else request.output / role
    record = from_first(lambda: Record.read(folder / _RECORD))
    now = from_first(lambda: datetime.now().replace(microsecond=0))
    date = now if record is None else record.date
    source = getattr(request, role)
    subject = together(lambda: Subject.load(role, source, request, date, watcher.note, device))
    return _Evaluation(request, subject, folder, record, watcher)


def _results_of(role: str, request: Request) -> dict[str, Any] | None:
    """Results that stand for a model, or None where there is none or it is to be measured."""
    given: str | None = getattr(request, role)
    if given is None:
        return None
    path = Path(given)
    if (path / "config.json").exists() or not path.exists():
        return None
    with reading(f"--{role} {given}"):
        found = logs_in(path)
        if found is None:
            raise RunError(f"--{role} {given}: holds neither a model nor results (*_EVAL.json)")
        return read_logs(found)


def _aggregates(logs: Logs) -> dict[str, dict[str, Any]]:
    return {name: {"value": float(entry["agg_value"])} for name, entry in logs.items()}


def _kept(
    path: Path,
    compute: Callable[[], _T],
    save: Callable[[Path, _T], None],
    load: Callable[[Path], _T],
) -> _T:
    """What a file holds, computed first where there is none: by all, while the first keeps it."""
    if not from_first(path.exists):
        found = compute()
        from_first(lambda: save(path, found))
    return from_first(lambda: load(path))


@dataclass(frozen=True)
class _Done:
    found: dict[str, Metric]
    missing: dict[str, str]


class _Evaluation:
    """One model on all sets, in a folder.

    Args:
        request: what is asked for.
        subject: the model.
        folder: for what is computed and comes out.
        record: of what was begun there, or None.
        watcher: is told how it goes on.

    Raises:
        RunError: what was begun there was of other settings or inputs.
    """

    def __init__(
        self,
        request: Request,
        subject: Subject,
        folder: Path,
        record: Record | None,
        watcher: Watcher,
    ) -> None:
        self.request, self.subject, self.folder = request, subject, folder
        self.watcher = watcher
        self.golden: Subject | None = None
        self.files = from_first(lambda: file_digests(subject.source))
        self.inputs = digests(subject.model, subject.encoding, subject.sets(), size())
        self.record = Record(request.recorded(), self.inputs, subject.date)
        if record is not None:
            record.check(folder, "settings", self.record.settings)
            record.check(folder, "inputs", self.inputs)

    def run(self, logs: Logs | None, golden: _Evaluation | None = None) -> _Done:
        """Measure every set, then what takes several.

        Args:
            logs: the golden model's results; None where there are none, or this is that model.
            golden: that model, where it is here.
        """
        from_first(lambda: self.record.write(self.folder, _RECORD))
        self.golden = None if golden is None else golden.subject
        weights = "" if golden is None else golden.inputs["weights"][:_DIGITS]
        found: dict[str, Metric] = {}
        measured: list[Measured] = []
        for number, each in enumerate(self.request.sets):
            name = f"{number:02d}-{_UNUSUAL.sub('_', each.name)}"
            measured.append(self._measure(each, name, f"{name}-{weights}"))
            found.update(metrics_of(measured[-1]))
            self._write(found, {})
        if self.subject.role == "golden":
            # Beside itself: what needs no golden model, and then the rest against that.
            logs = as_logs(found | joint_metrics(measured, found, None)[0])
        joint, missing = joint_metrics(measured, found, logs)
        done = _Done(found | joint, {**missing, **self.request.lacking})
        self._write(done.found, done.missing)
        return done

    def _measure(self, each: EvaluationSet, name: str, with_golden: str) -> Measured:
        examples = self.subject.examples[each.name]
        records: Mapping[Key, TokenRecord] = {}
        if examples:
            path = self.folder / "tokens" / f"{name}.safetensors"
            records = _kept(path, lambda: self._records(each), save_records, load_records)
        answers: Mapping[str, Answer] = {}
        if self.request.generate and each.measures & {"rouge", "key_recall"}:
            path = self.folder / "answers" / f"{name}.json"
            answers = _kept(path, lambda: self._answers(each), save_answers, load_answers)
        apart: Floats | None = None
        if self.golden is not None and "divergence" in each.measures:
            path = self.folder / "divergences" / f"{with_golden}.safetensors"
            ids = [row_id(row, n) for n, row in enumerate(each.rows)]

            def save(path: Path, found: Floats) -> None:
                save_divergences(path, ids, found)

            apart = _kept(path, lambda: self._divergences(each), save, load_divergences)
        of_forget = (s for s in self.request.sets if s.role == "forget")
        plain = each is next((s for s in of_forget if "memorization" in s.measures), None)
        return Measured(each, records, answers, apart, self.request.convention, plain)

    def _records(self, each: EvaluationSet) -> dict[Key, TokenRecord]:
        blocks = self.subject.examples[each.name]
        examples = list(chain(*blocks.values()))
        cut = sum(example.truncated for example in examples)
        if cut:
            self.watcher.note(
                f"{cut} of {len(blocks)} texts of {each.name} are cut to "
                f"{self.request.max_length} tokens"
            )
        self._begin("tokens", each, len(examples))

        def of_examples(mine: list[Features]) -> list[TokenRecord]:
            return token_records(
                self.subject.model,
                mine,
                pad_id=self.subject.pad_id,
                batch_size=self.request.batch_size,
                progress=self.watcher.advance,
            )

        features = [example.features() for example in examples]
        found = iter(over_rows(features, of_examples, self.subject.model))
        return {
            key: TokenRecord.joined(list(islice(found, len(parts))))
            for key, parts in blocks.items()
        }

    def _answers(self, each: EvaluationSet) -> dict[str, Answer]:
        rows = asked_rows(each)
        asked = {row_id(row, n): row for n, row in enumerate(rows) if row.prompt}
        self._begin("answers", each, len(asked))
        with printing_date(self.subject.date, self.subject.encoding):
            found = answer_rows(
                self.subject.model,
                list(asked.values()),
                self.subject.encoding,
                batch_size=self.request.batch_size,
                stop=each.generation.stop,
                max_new_tokens=each.generation.max_new_tokens,
                progress=self.watcher.advance,
                share_rows=True,
            )
        return dict(zip(asked, found, strict=True))

    def _divergences(self, each: EvaluationSet) -> Floats:
        golden = self.golden
        assert golden is not None, "asked for beside a golden model only"
        shown = self.subject.examples[each.name]
        answers = [[e.features() for e in shown[key]] for key in shown if key[1] == ANSWER]
        self._begin("divergence", each, sum(map(len, answers)))

        def of_examples(mine: list[Features]) -> list[Floats]:
            with reading(f"the golden model {golden.source!r} cannot be compared"):
                return list(
                    divergences(
                        self.subject.model,
                        golden.model,
                        mine,
                        pad_id=self.subject.pad_id,
                        batch_size=self.request.batch_size,
                        progress=self.watcher.advance,
                    )
                )

        found = np.stack(over_rows(list(chain(*answers)), of_examples, self.subject.model))
        ends = np.cumsum([len(parts) for parts in answers])[:-1]
        # Of a text in blocks each token weighs the same.
        weights = ([count_labels(part) for part in parts] for parts in answers)
        parts = zip(np.split(found, ends), weights, strict=True)
        return np.stack([np.average(rows, axis=0, weights=tokens) for rows, tokens in parts])

    def _begin(self, stage: str, each: EvaluationSet, total: int) -> None:
        # Of this process: all take equally many.
        share = -(-total // size())
        self.watcher.begin(f"{self.subject.role}: {stage} of {each.name}", share)

    def _write(self, found: Mapping[str, Metric], missing: Mapping[str, str]) -> None:
        from_first(lambda: self._write_all(found, missing))

    def _write_all(self, found: Mapping[str, Metric], missing: Mapping[str, str]) -> None:
        request = self.request
        write_logs(self.folder, request.benchmark, as_logs(found))
        ids = {
            each.name: [row_id(row, n) for n, row in enumerate(each.rows)] for each in request.sets
        }
        content = {
            "model": self.subject.source,
            "benchmark": request.benchmark,
            "convention": request.convention,
            "metrics": estimates(found),
            "not_computed": dict(missing),
            "rows": ids,
        }
        write_json(self.folder / _RESULTS, content)
        record = audit_record(
            settings=request.recorded(),
            inputs=self.inputs,
            files=self.files,
            model=self.subject.source,
            found=found,
            missing=missing,
        )
        write_json(self.folder / _AUDIT, record)
