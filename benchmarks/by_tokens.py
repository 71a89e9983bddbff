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
from unilogit_kernels.bench.measure import Measurement, Options, measure
from unilogit_kernels.bench.problems import Shape

HIDDEN_SIZE, VOCAB_SIZE = 640, 131_072
TOKENS = (256, 512, 1024, 2048, 4096)

# For a reader who does not know the harness's names, in Okabe and Ito's colours, which the
# colour-blind can tell apart.
LINES = {
    "eager Unilogit": ("Unilogit, plain torch", "#D55E00", "o"),
    "compiled Unilogit": ("the same under torch.compile", "#E69F00", "s"),
    "F.cross_entropy": ("F.cross_entropy (does not unlearn)", "#009E73", "^"),
    "F.linear_cross_entropy, auto, through nll": (
        "F.linear_cross_entropy, composed",
        "#56B4E9",
        "D",
    ),
    "unilogit_kernels": ("unilogit_kernels", "#000000", "P"),
}
OURS = "unilogit_kernels"
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
            if m.provider in LINES
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
            start = f"| {each['tokens']:,} | {LINES[name][0]} | "
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


def draw(rows: Sequence[dict[str, Any]], limit_gib: float, path: Path) -> None:
    """Two panels with linear axes: memory, with the machine's limit, and time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(11, 4.6), layout="constrained", facecolor="white")
    memory, time = figure.subplots(1, 2)
    for name, (label, colour, marker) in LINES.items():
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": label}
        style |= {"linewidth": 3, "zorder": 5} if name == OURS else {"linewidth": 1.8}
        points = [(r["tokens"], r["providers"][name]) for r in rows if name in r["providers"]]
        peaks = [(n, m["peak_mib"] / 1024) for n, m in points if m["peak_mib"] is not None]
        times = [(n, median(m["milliseconds"]) / 1e3) for n, m in points if m["milliseconds"]]
        memory.plot(*zip(*peaks, strict=True), **style)
        time.plot(*zip(*times, strict=True), **style)
        failed = [n for n, m in points if "does not fit" in (m["missing"] or "")]
        if failed and peaks:
            # From the last that ran to the limit, where the next one ended.
            memory.plot([peaks[-1][0], failed[0]], [peaks[-1][1], limit_gib], ":", color=colour)
            memory.plot(failed[0], limit_gib, "x", color=colour, markersize=10, markeredgewidth=2.5)
    memory.axhline(limit_gib, color="#777777", linestyle="--", linewidth=1.2)
    memory.annotate(
        f"memory of the machine: {limit_gib:.0f} GiB  (x: does not run)",
        (max(TOKENS), limit_gib),
        textcoords="offset points",
        xytext=(0, 5),
        ha="right",
        color="#555555",
    )
    memory.set_ylim(-0.4, limit_gib * 1.12)
    memory.set_title("Peak memory, GiB beyond inputs and gradients", loc="left")
    time.set_title("Time of forward and backward, seconds", loc="left")
    for panel in (memory, time):
        panel.set_xlabel("tokens")
        panel.set_xlim(0, max(TOKENS) * 1.03)
        panel.set_xticks([n for n in TOKENS if n >= 512])
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{int(x):,}"))
        panel.grid(visible=True, alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    time.set_ylim(bottom=0)
    figure.legend(
        *time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Measure or read, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("runs/by-tokens.json"))
    parser.add_argument("--redraw", action="store_true", help="draw what --json holds")
    given = parser.parse_args(arguments)
    if given.redraw:
        figures = json.loads(given.json.read_text())
        limit_gib = figures["machine"]["free_gib"]
        draw(figures["results"], limit_gib, given.json.with_suffix(".png"))
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
        options = Options(given.rounds, "both", "all", 30, tuple(LINES), (*others, *slow))
        shape = Shape(n, VOCAB_SIZE, "float32", HIDDEN_SIZE)
        rows.append(row(n, measure(shape, device, options, print)))
        lines = [
            f"Tokens x {HIDDEN_SIZE} x {VOCAB_SIZE:,}, float32, trained head, forward and backward",
            'in turns. Peaks are of fresh processes, beyond inputs and gradients. "Composed" is',
            "Unilogit computed from the fused negative log-likelihood, which loses its digits for",
            "memorised tokens.",
            "",
            *table(rows),
        ]
        title = "Time and memory by the number of tokens"
        write(given.json, facts, command_of("by_tokens", arguments), title, lines, rows)
    draw(rows, facts["free_gib"], given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
