"""`python -m unilogit_kernels.unlearning.demo --output DIR`: learn, unlearn, report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import LlamaForCausalLM, set_seed
from transformers.utils import logging as transformers_logging

from unilogit_kernels.unlearning.data import Encoding, Row, padding_id, read_rows
from unilogit_kernels.unlearning.demo.dataset import make_demo_data
from unilogit_kernels.unlearning.demo.loss_cost import compare_losses
from unilogit_kernels.unlearning.demo.model import (
    MissingModelError,
    load_base,
    run_trunk,
    top_of,
)
from unilogit_kernels.unlearning.demo.recipe import Recipe, learn, unlearn
from unilogit_kernels.unlearning.evaluation import SetReport, evaluate_rows, report_table

_EVALUATION_BATCH = 64
_SAMPLES = 3


class Demo:
    """One run: the model, the data, and what has been measured so far."""

    def __init__(self, output: Path, recipe: Recipe) -> None:
        self.output, self.recipe = output, recipe
        self.console = Console()
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.reports: dict[str, dict[str, SetReport]] = {}
        set_seed(recipe.seed)
        self.files = make_demo_data(recipe.seed).write(output / "data")
        self.rows = {name: read_rows(path) for name, path in self.files.items()}
        self.model, self.tokenizer = load_base(output / "cache" / "smollm2-135m-instruct")
        self.pad_id = padding_id(self.tokenizer)
        self.encoding = Encoding(self.tokenizer, max_length=64)
        self._mark("load model")

    def _mark(self, stage: str) -> None:
        """Note and print how long the stage took that has just ended."""
        elapsed = time.perf_counter() - self.started - sum(self.seconds.values())
        self.seconds[stage] = elapsed
        self.console.print(f"{stage}: {elapsed:.0f} s", highlight=False)

    def teach(self, model: LlamaForCausalLM, names: Sequence[str]) -> None:
        """Fine-tune a model until it knows the sets."""
        examples = self.encoding.encode([row for name in names for row in self.rows[name]])
        features = run_trunk(model, self.recipe.top_layers, examples, self.pad_id)

        def progress(step: int, loss: float) -> None:
            if step % 15 == 0:
                self.console.print(f"  step {step:3d}  loss {loss:.3f}", highlight=False)

        learn(top_of(model, self.recipe.top_layers), features, self.recipe, self.pad_id, progress)

    def forget(self) -> list[dict[str, float]]:
        """Unlearn the forget set."""
        layers = self.recipe.top_layers
        # That an answer ends is no knowledge to forget, as in `unilogit unlearn`.
        without_end = dataclasses.replace(self.encoding, append_eos=False)
        forget = run_trunk(self.model, layers, without_end.encode(self.rows["forget"]), self.pad_id)
        retain = run_trunk(
            self.model, layers, self.encoding.encode(self.rows["retain"]), self.pad_id
        )
        log = unlearn(
            top_of(self.model, layers),
            forget,
            retain,
            self.recipe,
            self.pad_id,
            self.output / "cache" / "trainer",
        )
        self.model.requires_grad_(False)
        for entry in log:
            if "forget_probability" in entry:
                step, probability = entry["step"], entry["forget_probability"]
                line = f"  step {step:3.0f}  forget probability {probability:.3f}"
                self.console.print(line, highlight=False)
        return log

    def evaluate(self, model: LlamaForCausalLM) -> dict[str, SetReport]:
        """Measure every set."""
        return {
            name: evaluate_rows(model, rows, self.encoding, batch_size=_EVALUATION_BATCH)
            for name, rows in self.rows.items()
        }

    def golden(self) -> dict[str, SetReport]:
        """A model that never saw the forget sellers: what unlearning should come close to."""
        model, _ = load_base(self.output / "cache" / "smollm2-135m-instruct")
        self.teach(model, ("retain", "neighbours"))
        return self.evaluate(model)

    def loss_cost(self) -> dict[str, dict[str, float]]:
        """Fused against literal loss, on this model's states."""
        rows: list[Row] = [row for rows in self.rows.values() for row in rows]
        layers = self.recipe.top_layers
        features = run_trunk(self.model, layers, self.encoding.encode(rows[:64]), self.pad_id)
        return compare_losses(top_of(self.model, layers), features, self.pad_id)

    def save(self, name: str) -> Path:
        """Write model and tokenizer to a folder of the output."""
        self.model.save_pretrained(self.output / name)
        self.tokenizer.save_pretrained(self.output / name)
        return self.output / name

    def run(self, with_golden: bool) -> dict[str, Any]:
        """Everything, in order; returns every figure."""
        self.teach(self.model, ("forget", "retain", "neighbours"))
        self._mark("learn the facts")
        self.reports["before"] = self.evaluate(self.model)
        memorised = self.save("memorised")
        self._mark("evaluate")
        log = self.forget()
        self._mark("unlearn")
        self.reports["after"] = self.evaluate(self.model)
        unlearned = self.save("unlearned")
        self._mark("evaluate again")
        if with_golden:
            self.reports["golden"] = self.golden()
            self._mark("golden model")
        cost = self.loss_cost()
        self._mark("compare losses")
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "reports": {
                model: {name: report.as_dict() for name, report in sets.items()}
                for model, sets in self.reports.items()
            },
            "unlearning_log": log,
            "loss_cost": cost,
            "seconds": self.seconds,
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "threads": torch.get_num_threads(),
            "paths": {
                "memorised": str(memorised),
                "unlearned": str(unlearned),
                **{name: str(path) for name, path in self.files.items()},
            },
        }

    def show(self, figures: dict[str, Any]) -> None:
        """Print the tables, and where everything lies."""
        self.console.print(report_table("What the model knows", self.reports))
        self.console.print(self._sample_answers())
        self.console.print(_loss_table(figures["loss_cost"]))
        paths, recipe = figures["paths"], self.recipe
        total, memory = sum(self.seconds.values()), figures["peak_memory_gib"]
        print(f"{total:.0f} s in total, {memory:.1f} GiB of memory at most")
        print(
            "the same without the cached trunk, by the command line:\n"
            f"  unilogit unlearn --model {paths['memorised']} --forget {paths['forget']} "
            f"--retain {paths['retain']} --output {self.output / 'by-hand'} "
            f"--train-layers {recipe.top_layers} --lr {recipe.forget_rate} "
            f"--batch-size {recipe.forget_batch} --epochs {recipe.most_epochs} "
            f"--forget-weight {recipe.forget_weight} "
            f"--stop-at probability={recipe.stop_at_probability} --seed {recipe.seed}"
        )

    def _sample_answers(self) -> Table:
        table = Table("question", "expected", *self.reports, title="Answers about forget sellers")
        before = self.reports["before"]["forget"].answers
        for index in range(0, len(before), -(-len(before) // _SAMPLES)):
            question = before[index].prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
            said = [sets["forget"].answers[index].generated for sets in self.reports.values()]
            cells = [question, before[index].expected, *said]
            table.add_row(*(escape(cell.strip()) for cell in cells))
        return table


def _loss_table(cost: dict[str, dict[str, float]]) -> Table:
    sizes = cost["shape"]
    title = (
        f"Loss and gradients: {sizes['tokens']} tokens, hidden {sizes['hidden']}, "
        f"vocabulary {sizes['vocabulary']}, float32"
    )
    table = Table("loss", "peak MiB", "seconds", "value", title=title)
    for name in ("literal", "fused"):
        found = cost[name]
        table.add_row(
            name, f"{found['peak_mib']:.0f}", f"{found['seconds']:.3f}", f"{found['loss']:.6f}"
        )
    return table


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(prog="python -m unilogit_kernels.unlearning.demo")
    parser.add_argument("--output", type=Path, required=True, help="directory for everything")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of data and training")
    parser.add_argument(
        "--golden", action="store_true", help="also train a model without the forget sellers"
    )
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        demo = Demo(options.output, dataclasses.replace(Recipe(), seed=options.seed))
    except MissingModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = demo.run(options.golden)
    demo.show(figures)
    path = options.output / "results.json"
    path.write_text(json.dumps(figures, indent=2))
    print(f"model: {figures['paths']['unlearned']}")
    print(f"every figure and answer: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
