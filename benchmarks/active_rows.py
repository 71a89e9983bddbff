"""Which rows matter while a model forgets: `python -m benchmarks.active_rows --json FILE`.

Runs the demo's own learning and unlearning, and after each unlearning step looks at the whole
forget set: the share of positions that have a label, the share whose slope `|f'(d)|` is not
negligible beside the largest, and how long the loss and the gradient of the hidden states take
(the demo's lm_head is frozen). The retain set's cross-entropy is looked at beside it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging

from unilogit_kernels import (
    linear_objective_loss,
    linear_target_log_odds,
    objectives,
    reference,
    shift_labels,
)
from unilogit_kernels.bench.devices import Cpu
from unilogit_kernels.bench.look import look, number, save
from unilogit_kernels.huggingface.head import HeadCall, evaluating, run_head
from unilogit_kernels.unlearning.data import IGNORED, Features, collate
from unilogit_kernels.unlearning.demo.__main__ import Demo
from unilogit_kernels.unlearning.demo.model import run_trunk, top_of
from unilogit_kernels.unlearning.demo.recipe import Recipe, unlearn

THRESHOLDS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
"""A row is active at s if its slope exceeds s times the largest; at 0 if it is not exactly 0."""
QUICK = {"learn_steps": 2, "learn_batch": 4, "most_epochs": 2, "forget_batch": 4}
QUICK_ROWS = 4


@dataclasses.dataclass
class Rows:
    """One set's inputs of the lm_head.

    Attributes:
        hidden: `[n, H]`, all positions, padding included.
        labels: `[n]`, shifted.
        weight: `[V, H]`.
        objective: Name of the set's loss.
    """

    hidden: Tensor
    labels: Tensor
    weight: Tensor
    objective: str

    def shares(self) -> dict[str, float]:
        """Shares of all positions: with a label, and active at each threshold."""
        d = linear_target_log_odds(self.hidden, self.weight, self.labels)
        labelled = self.labels != IGNORED
        objective = objectives.REGISTRY[self.objective]()
        slope = objective.slope(d.double(), self.weight.shape[0]).abs() * labelled
        probability = torch.sigmoid(d[labelled].double()).mean().item()
        result = {"labelled": labelled.double().mean().item(), "probability": probability}
        for threshold in THRESHOLDS:
            active = slope > threshold * slope.max()
            result[f"active at {threshold:g}"] = active.double().mean().item()
        return result

    def times(self, rounds: int) -> dict[str, float]:
        """Median milliseconds of loss and gradient, the variants taking turns."""
        everywhere = self.labels.clamp(min=0)
        variants: dict[str, Callable[[Tensor], Tensor]] = {
            "fused, every position": lambda hidden: self._fused(hidden, everywhere),
            "fused, ignored dropped": lambda hidden: self._fused(hidden, self.labels),
            "eager, every position": lambda hidden: self._eager(hidden, everywhere),
        }
        device, found = Cpu(), {name: list[float]() for name in variants}
        for repeat in range(rounds + 1):
            for name, loss in variants.items():
                hidden = self.hidden.clone().requires_grad_()
                milliseconds, _ = device.time(lambda: loss(hidden).backward())  # noqa: B023
                if repeat > 0:
                    found[name].append(milliseconds)
        return {name: statistics.median(times) for name, times in found.items()}

    def _fused(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_objective_loss(hidden, self.weight, labels, self.objective)

    def _eager(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight)
        if self.objective == "unilogit":
            return reference.unilogit_loss(logits, labels)
        return F.cross_entropy(logits, labels)


class Watch(TrainerCallback):
    """Notes shares and times before the first step and after each."""

    def __init__(
        self,
        top: LlamaForCausalLM,
        sets: Mapping[str, tuple[Sequence[Features], str]],
        pad_id: int,
        rounds: int,
    ) -> None:
        self.top, self.sets, self.pad_id, self.rounds = top, sets, pad_id, rounds
        self.log: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        self._note(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each step."""
        self._note(state.global_step)

    def _note(self, step: int) -> None:
        entry: dict[str, Any] = {"step": step}
        for name, (examples, objective) in self.sets.items():
            rows = self._rows(examples, objective)
            with torch.no_grad():
                entry[name] = rows.shares()
            entry[name]["positions"] = len(rows.labels)
            with torch.enable_grad():
                entry[name]["milliseconds"] = rows.times(self.rounds)
        self.log.append(entry)
        forget = entry["forget"]
        print(
            f"step {step}: p {forget['probability']:.3f}, labelled {forget['labelled']:.0%}, "
            + ", ".join(f"{k} {v:.0%}" for k, v in forget.items() if k.startswith("active"))
            + "; "
            + ", ".join(f"{k} {v:.0f} ms" for k, v in forget["milliseconds"].items()),
            flush=True,
        )

    def _rows(self, examples: Sequence[Features], objective: str) -> Rows:
        batch: dict[str, Any] = dict(collate(examples, self.pad_id))
        labels = shift_labels(batch.pop("labels"))

        def states(head: HeadCall) -> Tensor:
            return head.hidden

        with torch.no_grad(), evaluating(self.top):
            hidden = run_head(self.top, states, **batch)
        weight = self.top.lm_head.weight.detach()
        return Rows(hidden.flatten(0, -2), labels.flatten(), weight, objective)


def watch_demo(
    output: Path, recipe: Recipe, rounds: int, most_rows: int | None = None
) -> dict[str, Any]:
    """Learn, unlearn, and note every step.

    Args:
        output: Directory for the demo's files.
        recipe: Its hyper-parameters.
        rounds: Repeats behind each time.
        most_rows: Take so many rows of each set, or None for all.
    """
    demo = Demo(output, recipe)
    demo.rows = {name: rows[:most_rows] for name, rows in demo.rows.items()}
    demo.teach(demo.model, ("forget", "retain", "neighbours"))
    without_end = dataclasses.replace(demo.encoding, append_eos=False)
    layers = recipe.top_layers
    forget, retain = (
        run_trunk(demo.model, layers, encoding.encode(demo.rows[name]), demo.pad_id)
        for name, encoding in (("forget", without_end), ("retain", demo.encoding))
    )
    top = top_of(demo.model, layers)
    sets = {"forget": (forget, "unilogit"), "retain": (retain[: len(forget)], "cross_entropy")}
    watch = Watch(top, sets, demo.pad_id, rounds)
    unlearn(top, forget, retain, recipe, demo.pad_id, output / "cache" / "trainer", [watch])
    return {
        "machine": Cpu().facts(),
        "recipe": dataclasses.asdict(recipe),
        "hidden": top.lm_head.weight.shape[1],
        "vocabulary": top.lm_head.weight.shape[0],
        "rounds": rounds,
        "steps": watch.log,
    }


def table(figures: dict[str, Any], name: str) -> list[list[str]]:
    """Header and rows for one set."""
    first = figures["steps"][0][name]
    shares = [key for key in first if key.startswith(("labelled", "probability", "active"))]
    times = list(first["milliseconds"])
    rows = [["step", *shares, *(f"{key}, ms" for key in times)]]
    for entry in figures["steps"]:
        found = entry[name]
        cells = [f"{found[key]:.3f}" for key in shares]
        cells += [f"{found['milliseconds'][key]:.1f}" for key in times]
        rows.append([str(entry["step"]), *cells])
    return rows


def write(figures: dict[str, Any], path: Path) -> None:
    """JSON, and a CSV, Markdown and plot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in figures["machine"].items())
    lines = ["# Rows that matter during unlearning", "", f"{facts}.", ""]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        for name in ("forget", "retain"):
            header, *rows = table(figures, name)
            writer.writerows([["set", *header], *([name, *row] for row in rows)])
            positions = figures["steps"][0][name]["positions"]
            lines += [
                f"## The {name} set, {positions} positions x {figures['hidden']} x "
                f"{figures['vocabulary']:,}, float32, frozen head",
                "",
                f"| {' | '.join(header)} |",
                "|" + "---:|" * len(header),
                *(f"| {' | '.join(row)} |" for row in rows),
                "",
            ]
    path.with_suffix(".md").write_text("\n".join(lines))
    _draw(figures, path.with_suffix(".png"))


_SHARES = {
    "probability": ("probability of the answer's tokens", "#D55E00", "o", "--"),
    "labelled": ("positions with a label", "#000000", "P", "-"),
    "active at 0.001": ("with a slope over 0.1 % of the largest", "#009E73", "^", "-"),
    "active at 0.1": ("with a slope over 10 % of the largest", "#56B4E9", "D", "-"),
}
_TIMES = {
    "eager, every position": ("plain torch, every position", "#D55E00", "o", "-"),
    "fused, every position": ("fused, every position", "#0072B2", "s", "-"),
    "fused, ignored dropped": ("fused, positions with a label", "#000000", "P", "-"),
}


def _draw(figures: dict[str, Any], path: Path) -> None:
    """The forget set; the tables hold the retain set and the other thresholds."""
    from matplotlib.figure import Figure

    steps = [entry["step"] for entry in figures["steps"]]
    found = [entry["forget"] for entry in figures["steps"]]
    with look():
        figure = Figure(figsize=(7.0, 5.6))
        panels = figure.subplots(1, 2)
        for panel, title, drawn, rows in (
            (panels[0], "Share", _SHARES, found),
            (panels[1], "Time, milliseconds", _TIMES, [f["milliseconds"] for f in found]),
        ):
            for key, (label, colour, marker, line) in drawn.items():
                style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line}
                panel.plot(steps, [row[key] for row in rows], label=label, **style)
            panel.set_title(title)
            panel.set_ylim(bottom=0)
            panel.set_xlabel("step of unlearning")
            panel.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.16))
            panel.yaxis.set_major_formatter(lambda y, _: number(y))
        figure.suptitle("Loss and gradient of the demo's forget set", x=0.01, ha="left")
        save(figure, path)


def main() -> None:
    """Run the demo under watch and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/active-rows"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/active-rows.json"))
    parser.add_argument("--rounds", type=int, default=7, help="repeats behind each time")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs")
    parser.add_argument("--redraw", action="store_true", help="draw what --json holds")
    options = parser.parse_args()
    if options.redraw:
        write(json.loads(options.json.read_text()), options.json)
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe = dataclasses.replace(Recipe(), **(QUICK if options.quick else {}))
    rows = QUICK_ROWS if options.quick else None
    write(watch_demo(options.output, recipe, options.rounds, rows), options.json)
    print(f"written: {options.json} and .csv, .md, .png beside it")


if __name__ == "__main__":
    main()
