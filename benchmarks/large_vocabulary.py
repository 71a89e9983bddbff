"""Unlearning with Mistral's vocabulary of 131,072 tokens in little memory, beside literal losses.

A small Llama learns made-up rows from nothing, with the tokenizer of `benchmarks.tekken`, and then
forgets those of some sellers. Each run is a process of its own (`benchmarks.limited_run`), once
without a limit of memory, for its peak, and once under one. What the folder holds already is not
made again.

    pip install --no-deps mistral-common==1.8.8
    python -m benchmarks.large_vocabulary --json benchmarks/results/large-vocabulary.json
    python -m benchmarks.large_vocabulary --json benchmarks/results/large-vocabulary.json --redraw
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import command_of, write
from benchmarks.limited_run import FUSED, SETS
from benchmarks.measuring import run, save_llama
from benchmarks.tekken import save_tekken
from unilogit_kernels.bench.devices import find_device

SELLERS, FORGET_SELLERS = 40, 8
SHARE = 100 * FORGET_SELLERS // SELLERS
BENCHMARK = f"tofu:forget{SHARE}"

ROWS = (16, 32, 64, 96)
"""In a batch, half of them to forget; there are 48 of these."""
OF_RUN = 32
"""Rows in a batch of the runs that go on until the rows are forgotten."""
LIMIT_MIB = 2048
"""Of a process: what fused runs need, and some to spare."""

# In Okabe and Ito's colours, which the colour-blind can tell apart.
LINES = {
    "literal": ("Unilogit in plain torch", "#D55E00", "o"),
    "ascent": ("F.cross_entropy", "#009E73", "^"),
    FUSED: ("Unilogit, unilogit_kernels", "#000000", "P"),
}
BARS = {"before": "#BBBBBB", "after": "#0072B2"}
NAMES = {"forget": "to forget", "retain": "to keep", "untouched": "in no batch"}


def prepare(folder: Path) -> None:
    """Data, and the model that has memorised them."""
    data, new, memorised = folder / "data", folder / "new", folder / "memorised"
    if not data.exists():
        sellers: list[str | Path] = ["--sellers", str(SELLERS)]
        sellers += ["--forget-sellers", str(FORGET_SELLERS), "--holdout-sellers", "8"]
        run("dataset", "--output", data, *sellers)
    if not (new / "config.json").exists():
        # 38 million parameters
        save_llama(new, save_tekken(new), intermediate_size=1024, max_length=512)
    if not (memorised / "config.json").exists():
        shutil.rmtree(memorised, ignore_errors=True)
        learn: list[str | Path] = ["finetune", "--model", new, "--benchmark", BENCHMARK]
        learn += ["--data-dir", data, "--with-forget", "--epochs", "20", "--lr", "1e-3"]
        learn += ["--batch-size", "16", "--checkpoint-steps", "100000", "--output", memorised]
        run(*learn)


def measure(
    folder: Path, loss: str, rows: int, limit_mib: int | None, *, outcome: bool = False
) -> dict[str, Any]:
    """The record of one run.

    Raises:
        RuntimeError: the process failed, and not for want of memory.
    """
    command = [sys.executable, "-m", "benchmarks.limited_run", "--folder", str(folder)]
    command += ["--share", str(SHARE), "--loss", loss, "--rows", str(rows)]
    command += ["--outcome"] if outcome else []
    command += [] if limit_mib is None else ["--limit-mib", str(limit_mib)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(record), flush=True)
    return record


def plan() -> list[tuple[str, int, int | None, bool]]:
    """What is measured: loss, rows, limit, and whether to the end."""
    to_the_end = [(FUSED, OF_RUN, LIMIT_MIB, True), ("literal", OF_RUN, LIMIT_MIB, True)]
    steps = [
        (loss, rows, limit, False) for limit in (None, LIMIT_MIB) for rows in ROWS for loss in LINES
    ]
    return [*to_the_end, ("literal", OF_RUN, None, True), *steps]


def same(record: dict[str, Any], loss: str, rows: int, limit: int | None, outcome: bool) -> bool:
    """Whether a record is of a run of the plan."""
    known = record["loss"], record["rows"], record["limit_mib"], record["outcome"]
    return known == (loss, rows, limit, outcome)


def points(records: Sequence[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """The runs of two steps under a limit, or without one."""
    return [r for r in records if not r["outcome"] and r["limit_mib"] == limit]


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: what each batch takes."""
    lines = [
        "| rows | tokens | with a label | loss | peak, MiB | beyond the model's own, MiB | "
        f"under {LIMIT_MIB:,} MiB |",
        "|---:|---:|---:|---|---:|---:|---|",
    ]
    under = {(r["loss"], r["rows"]): r for r in points(records, LIMIT_MIB)}
    for each in points(records, None):
        limited = under[each["loss"], each["rows"]]
        ended = f"out of memory in step {limited['steps'] + 1}" if limited["died"] else "runs"
        lines.append(
            f"| {each['rows']} | {each['tokens']:,} | {each['labelled']:,} | "
            f"{LINES[each['loss']][0]} | {each['max_resident_mib']:,.0f} | "
            f"{each['beyond_mib']:,.0f} | {ended} |"
        )
    return lines


def outcomes(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: what the runs to the end came to."""
    lines = [
        "| loss, limit | steps | peak, MiB | "
        + " | ".join(f"{NAMES[name]}: before | after" for name in SETS)
        + " |",
        "|---|---:|---:|" + "---:|---:|" * len(SETS),
    ]
    for each in (r for r in records if r["outcome"]):
        limit = "none" if each["limit_mib"] is None else f"{each['limit_mib']:,} MiB"
        cells = []
        for name in SETS:
            for when in ("before", "after"):
                found = each.get(when, {}).get(name)
                cell = "" if found is None else f"{found['probability']:.2f} / "
                cells.append(cell if found is None else cell + f"{found['key_recall']:.2f}")
        steps = f"{each['steps']}, then out of memory" if each["died"] else each["steps"]
        lines.append(
            f"| {LINES[each['loss']][0]}, {limit} | {steps} | {each['max_resident_mib']:,.0f} | "
            f"{' | '.join(cells)} |"
        )
    return lines


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels with linear axes: memory with the limit, and what was forgotten and kept."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 14}):  # To be read where it is 400 pixels wide.
        figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
        memory, known = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_memory(memory, records)
        _draw_known(known, next(r for r in records if r["outcome"] and r["loss"] == FUSED))
        for panel in (memory, known):
            panel.grid(visible=True, axis="y", alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        handles, labels = memory.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=150)


def _draw_memory(panel: Any, records: Sequence[dict[str, Any]]) -> None:
    """Peaks by the tokens in a batch: dotted where a process under the limit ran out of memory."""
    limit = LIMIT_MIB / 1024
    for loss, (label, colour, marker) in LINES.items():
        free = [r for r in points(records, None) if r["loss"] == loss]
        places = [(r["tokens"], r["max_resident_mib"] / 1024) for r in free]
        died = [r["tokens"] for r in points(records, LIMIT_MIB) if r["loss"] == loss and r["died"]]
        ran = sum(tokens not in died for tokens, _ in places)
        width = 3 if loss == FUSED else 1.8
        style: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": width}
        panel.plot(*zip(*places[:ran], strict=True), label=label, zorder=5, **style)
        panel.plot(*zip(*places[max(ran - 1, 0) :], strict=True), ":", **style)
        if died:
            cross = {"markersize": 13, "markeredgewidth": 3.5, "zorder": 6}
            panel.plot(died[0], limit, "x", color=LINES["literal"][1], **cross)
    panel.plot([], [], ":", color="#555555", linewidth=1.8, label="only without the limit")
    panel.axhline(limit, color="#777777", linestyle="--", linewidth=1.2)
    beside = {"textcoords": "offset points", "color": "#555555"}
    panel.annotate("limit", (0, limit), xytext=(4, 5), **beside)
    first = min(r["tokens"] for r in points(records, LIMIT_MIB) if r["died"])
    panel.annotate("out of memory", (first, limit), xytext=(14, 5), **beside)
    panel.set_title("Peak memory, GiB", loc="left")
    panel.set_xlabel("tokens in a batch")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_xticks([0, 1000, 2000, 3000], ["0", "1,000", "2,000", "3,000"])


def _draw_known(panel: Any, done: dict[str, Any]) -> None:
    """Probabilities of each set before and after the run under the limit."""
    for offset, (when, colour) in zip((-0.2, 0.2), BARS.items(), strict=True):
        heights = [done[when][name]["probability"] for name in SETS]
        places = [place + offset for place in range(len(SETS))]
        bars = panel.bar(places, heights, 0.38, color=colour, label=when)
        # In front of it, the zero is known, and leaves room.
        panel.bar_label(bars, [f"{height:.2f}".lstrip("0") for height in heights], fontsize=12)
    panel.set_xticks(range(len(SETS)), [NAMES[name].replace(" ", "\n", 1) for name in SETS])
    panel.set_ylim(0, 1.3)
    panel.set_yticks([0, 0.5, 1])
    panel.set_title("Probability", loc="left")
    panel.legend(frameon=False, loc="upper right", ncols=2, columnspacing=1, handlelength=1)


def report(path: Path, facts: dict[str, Any], command: str, found: list[dict[str, Any]]) -> None:
    """Write JSON, Markdown and the picture."""
    died = next(r for r in found if r["outcome"] and r["died"])
    lines = [
        "A Llama of 38 million parameters with 131,072 columns in float32 and a tied head, under",
        "AdamW, that has memorised made-up rows; half the rows of a batch are to be forgotten, and",
        "the others learned by cross-entropy. `F.cross_entropy` forgets by gradient ascent; it and",
        "plain torch take logits from the model, in the same Trainer, batches and steps. The",
        "peak is `ru_maxrss` of the process after two steps; beyond the model's own: less what it",
        "held before the first step, gradients and AdamW's moments. The limit is `RLIMIT_DATA` of",
        "the whole process, Python and libraries included. Other programs ran beside these: memory",
        "does not depend on them, and no time is stated.",
        "",
        *table(found),
        "",
        'Run until the forget rows have probability 0.2 (probability / share of keys said; "in no',
        'batch" are general facts that the model had memorised, too):',
        "",
        *outcomes(found),
        "",
        "What the literal loss died of:",
        "",
        f"    {died['died']}",
    ]
    write(path, facts, command, "A large vocabulary on a small machine", lines, found)
    draw(found, path.with_suffix(".png"))


def main(arguments: list[str] | None = None) -> None:
    """Make what is missing, measure or read, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/large-vocabulary"))
    parser.add_argument("--json", type=Path, default=Path("runs/large-vocabulary.json"))
    parser.add_argument("--redraw", action="store_true", help="draw what --json holds")
    given = parser.parse_args(arguments)
    if given.redraw:
        figures = json.loads(given.json.read_text())
        report(given.json, figures["machine"], figures["command"], figures["results"])
        return
    prepare(given.folder)
    facts = find_device("cpu").facts()
    seen = given.folder / "records.jsonl"
    records = [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []
    found = []
    for loss, rows, limit, outcome in plan():
        known = [r for r in records if same(r, loss, rows, limit, outcome)]
        if not known:
            known = [measure(given.folder, loss, rows, limit, outcome=outcome)]
            with seen.open("a") as file:
                file.write(json.dumps(known[0]) + "\n")
        found.append(known[0])
    report(given.json, facts, command_of("large_vocabulary", arguments), found)


if __name__ == "__main__":
    main()
