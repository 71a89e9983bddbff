"""What `unilogit unlearn` comes to with some settings: a line of the table in docs/unlearning.md.

    python -m benchmarks.defaults runs/demo --output OUT --lr 2e-5 --forget-weight 0.03

`runs/demo` is what `make demo` left: a model that has memorised made-up sellers, and their rows.
What is printed while it runs is a look or a step; the last line is that of the table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from unilogit_kernels.unlearning.config import make_settings
from unilogit_kernels.unlearning.data import read_rows
from unilogit_kernels.unlearning.evaluation import evaluate_rows
from unilogit_kernels.unlearning.run import execute, prepare

SETS = ("forget", "neighbours", "retain")


class Follow(TrainerCallback):
    """Prints what is logged, and ends the run when its time is over.

    Args:
        seconds: that it may take.
    """

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds
        self.late = False

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Print it."""
        shown = {k: round(v, 4) for k, v in (logs or {}).items() if isinstance(v, float)}
        seconds = time.monotonic() - self.start
        print(f"{seconds:5.0f} s  step {state.global_step}  {json.dumps(shown)}", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """See whether there is time for another."""
        if time.monotonic() - self.start > self.seconds:
            self.late = control.should_training_stop = True


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults")
    parser.add_argument("demo", type=Path, help="the output of `make demo`")
    parser.add_argument("--output", required=True, help="folder for the model")
    parser.add_argument("--lr", default=None)
    parser.add_argument("--forget-weight", default=None)
    parser.add_argument("--train-layers", default=None)
    parser.add_argument("--epochs", default=None)
    parser.add_argument("--seconds", type=float, default=1e9, help="of training, at most")
    parser.add_argument("--generate", action="store_true", help="also answer the prompts")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    data = {name: options.demo / "data" / f"{name}.jsonl" for name in SETS}
    line = {
        "model": str(options.demo / "memorised"),
        "output": options.output,
        "forget": data["forget"],
        "retain": data["retain"],
        "learning_rate": options.lr,
        "forget_weight": options.forget_weight,
        "train_layers": options.train_layers,
        "epochs": options.epochs,
        "report_rows": 0,  # Below, with the neighbours.
        "max_retain_loss_rise": 10.0,  # To see it in the log; no run comes to it.
        "checkpoint_steps": 10**6,
    }
    settings = make_settings("unlearn", {k: v for k, v in line.items() if v is not None}, None)
    prepared, follow = prepare(settings), Follow(options.seconds)
    done = execute(prepared, [follow])
    print(done.ended or ("out of time" if follow.late else "all epochs"), flush=True)
    cells = []
    for path in data.values():
        found = evaluate_rows(
            prepared.model,  # type: ignore[arg-type]  # adapted ones answer, too
            read_rows(path),
            prepared.encoding,
            generate=options.generate,
        )
        recall = "" if found.key_recall is None else f" / {found.key_recall:.2f}"
        cells.append(f"{found.probability:.2f}{recall}")
    of_run = settings.train_layers or "all", f"{settings.learning_rate:g}", settings.forget_weight
    print("| " + " | ".join(map(str, (*of_run, done.steps, *cells))) + " |", flush=True)


if __name__ == "__main__":
    main()
