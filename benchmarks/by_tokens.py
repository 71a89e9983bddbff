"""Time and peak memory by the number of tokens, ours beside its peers: the README's first picture.

The lm_head has the 131,072 columns of Mistral's tokenizers and the hidden size 640, in float32 and
trained. Each peer goes on until it does not fit into the machine's memory any more, which the
picture marks, or takes several times as long as ours.

    python -m benchmarks.by_tokens --json benchmarks/results/by-tokens.json  # or goes on
    python -m benchmarks.by_tokens --json benchmarks/results/by-tokens.json --redraw
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import command_of, write
from unilogit_kernels.bench.devices import find_device
from unilogit_kernels.bench.look import look
from unilogit_kernels.bench.look import save as draw_to
from unilogit_kernels.bench.measure import Measurement, Options, measure
from unilogit_kernels.bench.plots import draw_lines
from unilogit_kernels.bench.problems import Shape
from unilogit_kernels.bench.report import Result
from unilogit_kernels.bench.series import label_of

HIDDEN_SIZE, VOCAB_SIZE = 640, 131_072
TOKENS = (256, 512, 1024, 2048, 4096)

PROVIDERS = (
    "unilogit_kernels",
    "eager Unilogit",
    "F.cross_entropy",
    "compiled Unilogit",
    "F.linear_cross_entropy, auto, through nll",
)
TOO_SLOW = 5.0
"""A peer that took so many times as long as ours is not asked for more tokens."""


def row(tokens: int, found: Sequence[Measurement]) -> dict[str, Any]:
    """What was measured for one number of tokens, by provider."""
    return {
        "tokens": tokens,
        "providers": {
            m.provider: {
                "milliseconds": m.milliseconds,
                "relative_to_ours": m.relative_to_ours,
                "peak_mib": m.peak_mib,
                "gradient_error": m.gradient_error,
                "missing": m.missing,
                "memory_missing": m.memory_missing,
            }
            for m in found
            if m.provider in PROVIDERS
        },
    }


def median(times: Sequence[float]) -> float:
    """The middle one, or the upper of the two."""
    return sorted(times)[len(times) // 2]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: seconds, spread, times ours, peak and error of each."""
    lines = [
        "| tokens | provider | seconds (least - most) | times ours | peak, MiB | gradient error |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for each in rows:
        for name, found in each["providers"].items():
            start = f"| {each['tokens']:,} | {label_of(name)} | "
            if not found["milliseconds"]:
                lines.append(f"{start}{found['missing']} | | | |")
                continue
            seconds = [t / 1e3 for t in found["milliseconds"]]
            peak = found["peak_mib"]
            error = found["gradient_error"]
            lines.append(
                f"{start}{median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f}) | "
                f"{found['relative_to_ours']:.2f} | "
                f"{found['memory_missing'] if peak is None else format(peak, ',.0f')} | "
                f"{'' if error is None else format(error, '.1e')} |"
            )
    return lines


def results(rows: Sequence[dict[str, Any]]) -> list[Result]:
    """What was measured, for drawing; a peer that was not asked any more has a reason."""
    found = []
    for each in rows:
        measurements = []
        for name in PROVIDERS:
            fields = each["providers"].get(name, {"missing": f"over {TOO_SLOW} times ours before"})
            loss = "cross_entropy" if name == "F.cross_entropy" else "unilogit"
            measurements.append(Measurement(name, loss, **fields))
        shape = Shape(each["tokens"], VOCAB_SIZE, "float32", HIDDEN_SIZE)
        found.append(Result(shape, "both", 0.0, measurements))
    return found


def save(path: Path, facts: dict[str, Any], command: str, rows: list[dict[str, Any]]) -> None:
    """JSON, Markdown and the picture."""
    lines = [
        f"Tokens x {HIDDEN_SIZE} x {VOCAB_SIZE:,}, float32, trained head, forward and backward",
        'in turns. Peaks are of fresh processes, beyond inputs and gradients. "Composed" is',
        "Unilogit computed from the fused negative log-likelihood, which loses digits of",
        "memorised tokens.",
        "",
        *table(rows),
    ]
    write(path, facts, command, "Time and memory by the number of tokens", lines, rows)
    with look():
        draw_to(draw_lines(results(rows), "n", facts["free_gib"]), path.with_suffix(".png"))


def main(arguments: list[str] | None = None) -> None:
    """Measure or read, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("runs/by-tokens.json"))
    parser.add_argument("--redraw", action="store_true", help="draw what --json holds")
    given = parser.parse_args(arguments)
    if given.redraw:
        figures = json.loads(given.json.read_text())
        save(given.json, figures["machine"], figures["command"], figures["results"])
        return
    device = find_device("cpu")
    facts = {**device.facts(), "free_gib": device.free_bytes() / 2**30}
    others = ("compiled F.cross_entropy", "F.cross_entropy, through nll")  # names that begin alike
    rows: list[dict[str, Any]] = []
    if given.json.exists():  # gone on with
        rows = json.loads(given.json.read_text())["results"]
    for n in TOKENS[len(rows) :]:
        slow = [
            name
            for each in rows
            for name, found in each["providers"].items()
            if (found["relative_to_ours"] or 0) > TOO_SLOW
        ]
        options = Options(given.rounds, "both", "all", 30, PROVIDERS, (*others, *slow))
        shape = Shape(n, VOCAB_SIZE, "float32", HIDDEN_SIZE)
        rows.append(row(n, measure(shape, device, options, print)))
        save(given.json, facts, command_of("by_tokens", arguments), rows)


if __name__ == "__main__":
    main()
