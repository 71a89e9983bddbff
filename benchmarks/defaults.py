"""What `unilogit unlearn` comes to from several starting points, with its defaults and beside them.

    python -m benchmarks.defaults POINTS.yaml --lr 1e-5 2e-5 --forget-weight 0.03 0.1

The file names starting points, each a model that knows the rows and the rows themselves, as the
`data` of a plan of `unilogit compare` does:

    demo:
      model: runs/demo/memorised
      data: {files: {forget: ..., retain: ..., neighbours: ...}}
      settings: {train_layers: 6}

Every choice runs to its end, by the stop rule or by the number of epochs. Neighbours are rows that
the model knows and no batch contains. Prints what is logged, then Markdown, and writes it beside
the JSON; what a JSON holds already is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from benchmarks.figures import command_of, write
from unilogit_kernels.bench.devices import Cpu
from unilogit_kernels.unlearning.comparison.parts import AnswersPlan, DataPlan
from unilogit_kernels.unlearning.comparison.rows import NEIGHBOURS, Data, read_data
from unilogit_kernels.unlearning.config import make_settings
from unilogit_kernels.unlearning.data import Row
from unilogit_kernels.unlearning.evaluation import evaluate_rows
from unilogit_kernels.unlearning.run import Prepared, execute, prepare

ROOT = Path(__file__).resolve().parent.parent
SPLIT_SEED = 1000
"""Of what is set aside, as in `benchmarks/paper.yaml`."""

Found = dict[str, Any]


class Follow(TrainerCallback):
    """Prints what is logged."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Print it."""
        shown = {k: round(v, 4) for k, v in (logs or {}).items() if isinstance(v, float)}
        print(f"{self.seconds():5.0f} s  step {state.global_step}  {json.dumps(shown)}", flush=True)

    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self.start


def run(point: Mapping[str, Any], choice: Mapping[str, Any], folder: Path) -> Found:
    """Unlearn from a starting point to the end, and measure before and after.

    Args:
        point: Of the file of points.
        choice: Settings beside the defaults and those of the point.
        folder: For rows and the model.
    """
    plan = DataPlan(**point["data"])
    data = read_data(plan, AnswersPlan(), folder, validation=0, seed=SPLIT_SEED, checked=64)
    line = {
        "model": point["model"],
        "output": folder / "model",
        "forget": _written(data.forget, folder / "forget.jsonl"),
        "retain": _written(data.retain, folder / "retain.jsonl"),
        "report_rows": 0,  # Measured here, with the neighbours.
        "max_retain_loss_rise": 100.0,  # To see it in the log; no run comes to it.
        "checkpoint_steps": 10**6,
    }
    settings = make_settings("unlearn", {**line, **point.get("settings", {}), **choice}, None)
    prepared, follow = prepare(settings), Follow()
    before = _measured(prepared, data)
    done = execute(prepared, [follow])
    return {
        "learning_rate": settings.learning_rate,
        "forget_weight": settings.forget_weight,
        "rows": [len(data.forget), len(data.retain)],
        "steps": done.steps,
        "ended": done.ended,
        "before": before,
        "after": _measured(prepared, data),
        "seconds": follow.seconds(),
    }


def _written(rows: Iterable[Row], path: Path) -> Path:
    texts = [row.unframed() for row in rows]
    lines = [{"prompt": r.prompt, "completion": r.completion, "key": r.key} for r in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _measured(prepared: Prepared, data: Data) -> dict[str, tuple[float, float | None]]:
    """Probability and key recall of each set."""
    neighbours = next(each.rows for each in data.sets if each.name == NEIGHBOURS)
    found = {}
    for name, rows in (
        ("forget", data.forget), (NEIGHBOURS, neighbours), ("retain", data.retain)
    ):  # fmt: skip
        texts = [row.unframed() for row in rows]
        report = evaluate_rows(prepared.model, texts, prepared.encoding)  # type: ignore[arg-type]  # adapted ones answer, too
        found[name] = report.probability, report.key_recall
    return found


def report(results: Iterable[Found]) -> list[str]:
    """A table of all runs."""
    lines = [
        "Probability / key recall of a set's answers; in the first line of a starting point before "
        "anything is unlearned.",
        "",
        "| starting point | `--lr` | `--forget-weight` | steps | forget | neighbours | retain |",
        "|---" * 7 + "|",
    ]
    for name, group in itertools.groupby(results, key=lambda each: each["point"]):
        runs = list(group)
        rows = "{} to forget, {} to retain".format(*runs[0]["rows"])
        lines.append(f"| {name} ({rows}) | | | | {_cells(runs[0]['before'])} |")
        for each in runs:
            rate, weight = f"{each['learning_rate']:g}", each["forget_weight"]
            steps = f"{each['steps']}" if each["ended"] else f"{each['steps']}, all epochs"
            lines.append(f"| | {rate} | {weight} | {steps} | {_cells(each['after'])} |")
    return lines


def _cells(measured: Mapping[str, tuple[float, float | None]]) -> str:
    return " | ".join(
        f"{p:.2f}" + ("" if recall is None else f" / {recall:.2f}")
        for p, recall in measured.values()
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("points", type=Path, help="YAML file of starting points")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-5])
    parser.add_argument("--forget-weight", nargs="+", type=float, default=[0.03])
    parser.add_argument("--only", nargs="+", help="of the starting points")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/defaults.json")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    points = yaml.safe_load(options.points.read_text(encoding="utf-8"))
    results: list[Found] = []
    if options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))["results"]
    known = {(r["point"], r["learning_rate"], r["forget_weight"]) for r in results}
    for name, rate, weight in itertools.product(
        options.only or points, options.lr, options.forget_weight
    ):
        if (name, rate, weight) in known:
            continue
        print(f"{name}, learning rate {rate:g}, forget weight {weight:g}", flush=True)
        choice = {"learning_rate": rate, "forget_weight": weight}
        with tempfile.TemporaryDirectory() as folder:
            results.append({"point": name, **run(points[name], choice, Path(folder))})
        order = list(points)
        results.sort(
            key=lambda r: (order.index(r["point"]), r["learning_rate"], r["forget_weight"])
        )
        command = command_of("defaults", arguments)
        title = "What the defaults of unlearning come to"
        write(options.json, Cpu().facts(), command, title, report(results), results)


if __name__ == "__main__":
    main()
