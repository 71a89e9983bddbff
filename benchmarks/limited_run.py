"""One run of unlearning in a process of its own, under a limit of memory: what it took, as JSON.

`benchmarks.large_vocabulary` starts it. The limit is RLIMIT_DATA, of the whole process from its
start: private writable memory, so every tensor, but no code and no files that are mapped. An
allocation beyond it fails at once, and what failed is told; nothing is killed, swapped or left to
chance. The resident set may lie a little below it, by what was asked for and never written.
"""

from __future__ import annotations

import argparse
import errno
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from unilogit_kernels import reference
from unilogit_kernels.backends.memory import (
    peak_resident_bytes,
    start_resident_peak,
    told_bytes,
)
from unilogit_kernels.unlearning.data import IGNORED, Encoding, Features, padding_id, read_rows
from unilogit_kernels.unlearning.evaluation import evaluate_rows
from unilogit_kernels.unlearning.loading import load_encoding
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer

LossOfRows = Callable[[Tensor, Tensor], Tensor]


def _ascent(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the cross-entropy, of the labelled positions."""
    return -_cross_entropy(logits, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    counted = labels != IGNORED
    return F.cross_entropy(logits[counted], labels[counted])


FUSED = "fused"
FROM_LOGITS: dict[str, LossOfRows] = {
    "literal": reference.unilogit_loss,
    "ascent": _ascent,
}
"""Losses of forget rows that take logits: Unilogit as in the paper, and plain gradient ascent."""

SETS = {"forget": "forget{}", "retain": "retain{}", "untouched": "general"}
"""The sets that are measured, by the tables of `unilogit dataset`; the last is in no batch."""


class FromLogits(UnlearningTrainer):
    """The same batches, weights and steps, with losses from the logits that the model returns.

    Only rows that have a label go into a softmax, so it is as lean as plain torch easily gets.

    Args:
        forget_loss: of logits `[B, T, V]` and labels `[B, T]`.
        given: for `UnlearningTrainer`.
    """

    def __init__(self, *given: Any, forget_loss: LossOfRows, **named: Any) -> None:
        super().__init__(*given, **named)
        self._forget_loss = forget_loss

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Features,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """See `UnlearningTrainer`; a step is one batch here."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        half = len(labels) // 2  # A retain row goes with each forget row.
        dropped = self._forget_loss(logits[:half, :-1], labels[:half, 1:])
        kept = _cross_entropy(logits[half:, :-1], labels[half:, 1:])
        return self.args.forget_weight * dropped + self.args.retain_weight * kept


def measured(
    model: LlamaForCausalLM, encoding: Encoding, data: Path, share: int
) -> dict[str, dict[str, float | None]]:
    """Probability and key recall of each set."""
    found = {}
    for name, table in SETS.items():
        of_set = 100 - share if name == "retain" else share
        rows = read_rows(data / f"{table.format(f'{of_set:02d}')}.jsonl")
        report = evaluate_rows(model, rows, encoding)
        found[name] = {"probability": report.probability, "key_recall": report.key_recall}
    return found


def run(given: argparse.Namespace, record: dict[str, Any]) -> None:
    """Load, unlearn, measure; what is known is in `record` even where memory runs out."""
    folder: Path = given.folder
    encoding = load_encoding(str(folder / "memorised"), 512, None, {})
    model = LlamaForCausalLM.from_pretrained(folder / "memorised", dtype=torch.float32)
    tables = {"forget": f"forget{given.share:02d}", "retain": f"retain{100 - given.share:02d}"}
    features = {
        name: [e.features() for e in encoding.encode(read_rows(folder / f"data/{table}.jsonl"))]
        for name, table in tables.items()
    }
    if given.outcome:
        record["before"] = measured(model, encoding, folder / "data", given.share)
    arguments = UnlearningArguments(
        str(folder / "output"),
        per_device_train_batch_size=given.rows // 2,
        learning_rate=given.lr,
        max_steps=-1 if given.outcome else given.steps,
        num_train_epochs=20,
        stop_at="probability=0.2" if given.outcome else None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )
    named: dict[str, Any] = {**features, "pad_id": padding_id(encoding.tokenizer)}
    if given.loss == FUSED:
        trainer = UnlearningTrainer(model, arguments, **named)
    else:
        trainer = FromLogits(model, arguments, forget_loss=FROM_LOGITS[given.loss], **named)
    collate = trainer.data_collator

    def watched(items: Any) -> Any:
        batch = collate(items)
        record["tokens"] = max(record.get("tokens", 0), batch["input_ids"].numel())
        record["labelled"] = max(record.get("labelled", 0), int((batch["labels"] != IGNORED).sum()))
        return batch

    trainer.data_collator = watched
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # Gradients, and AdamW's two moments.
    record["model_mib"] = 3 * weights / 2**20
    record["before_mib"] = start_resident_peak() / 2**20
    try:
        trainer.train()
    finally:
        record["steps"] = trainer.state.global_step
        record["peak_mib"] = peak_resident_bytes() / 2**20
        record["beyond_mib"] = record["peak_mib"] - record["before_mib"] - record["model_mib"]
        record["data_mib"] = told_bytes("/proc/self/status", "VmData") / 2**20
    if given.outcome:
        record["after"] = measured(model, encoding, folder / "data", given.share)


RECORDED = ("loss", "rows", "limit_mib", "outcome")
"""What a record says of how the run was asked for."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, by Python, the system or torch."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def main() -> None:
    """Set the limit, run, print the record as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--share", type=int, required=True, help="of the sellers to forget, in %%")
    parser.add_argument("--loss", choices=[FUSED, *FROM_LOGITS], required=True)
    parser.add_argument("--rows", type=int, required=True, help="in a batch, half of them to keep")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--outcome", action="store_true", help="run to the end and measure sets")
    parser.add_argument("--limit-mib", type=int, default=None)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    record: dict[str, Any] = {name: getattr(given, name) for name in RECORDED}
    record["died"] = None
    record["died"] = None
    if given.limit_mib is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (given.limit_mib << 20,) * 2)
    try:
        run(given, record)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        record["died"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    record["max_resident_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps(record))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
