"""What methods keep over the size of the forget set: `python -m benchmarks.forget_sizes`.

Reads the comparisons of benchmarks/paper.yaml and benchmarks/paper_forget_*.yaml, draws a picture,
and writes the table and the figures beside it: at matched forgetting, the mean of the seeds, with
half of its 95 % interval. All three ran the settings that were chosen at 20 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import command_of, write
from unilogit_kernels.bench.look import look, save
from unilogit_kernels.unlearning.comparison.cell import GOLDEN
from unilogit_kernels.unlearning.comparison.matching import Spread, spread
from unilogit_kernels.unlearning.comparison.summary import Summary, by_seed, read_summary

RESULTS = Path(__file__).resolve().parent / "results"
FOLDERS = {4: "paper-forget-4", 20: "paper", 48: "paper-forget-48"}
"""By the share of the facts that is to be forgotten, in %."""
MEASURES = ("neighbours.probability", "retain.probability")
SHOWN = {
    "Unilogit": ("#0072B2", "o"),
    "RMU": ("#56B4E9", "P"),
    "NPO": ("#009E73", "D"),
    "UnDIAL": ("#E69F00", "v"),
    "SimNPO": ("#CC79A7", "^"),
}
"""Methods of the picture."""

Kept = dict[str, dict[str, Spread]]
"""By method and measure."""


def kept(summary: Summary) -> Kept:
    """What each method keeps where all have forgotten as much."""
    found: Kept = {}
    for swept in summary.methods:
        values = {m: [run.seen(m) for run in swept.best] for m in MEASURES}
        if all(None not in each for each in values.values()):
            found[swept.title] = {m: spread([v or 0.0 for v in each]) for m, each in values.items()}
    return found


def table(sizes: Mapping[int, Kept]) -> list[str]:
    """Markdown: neighbours and retain by method and size."""
    names = [name for name in sizes[20] if all(name in each for each in sizes.values())]
    lines = [
        "| neighbours / retain kept, of | " + " | ".join(f"{share} %" for share in sizes) + " |",
        "|---" * (1 + len(sizes)) + "|",
    ]
    for name in names:
        cells = [
            " / ".join(
                f"{each[name][m].mean:.3f} ± {each[name][m].half or 0:.3f}" for m in MEASURES
            )
            for each in sizes.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def ahead(summaries: Mapping[int, Summary]) -> list[str]:
    """Markdown: how far Unilogit is ahead of each method, seed by seed."""
    lines = [
        "| Unilogit's mean of both, less that of | "
        + " | ".join(f"{share} %" for share in summaries)
        + " |",
        "|---" * (1 + len(summaries)) + "|",
    ]
    means = [
        {swept.title: by_seed(swept.best, lambda run: run.mean(MEASURES)) for swept in each.methods}
        for each in summaries.values()
    ]
    for name in means[list(summaries).index(20)]:
        cells = []
        for of_size in means:
            own, other = of_size["Unilogit"], of_size.get(name, {})
            found = spread([own[seed] - value for seed, value in other.items()]) if other else None
            cells.append("" if found is None else f"{found.mean:+.3f} ± {found.half or 0:.3f}")
        if name != "Unilogit":
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def scores(summary: Summary) -> list[str]:
    """Markdown: what settings were chosen by, for each rate and weight at the best of the other."""
    lines = ["| score on validation rows | by learning rate | by forget weight |", "|---" * 3 + "|"]
    for swept in summary.methods:
        cells = [
            ", ".join(
                f"{value:g}: {score:.3f}" for value, (score, _) in swept.best_over(part).items()
            )
            for part in range(2)
        ]
        lines.append(f"| {swept.title} | {' | '.join(cells)} |")
    return lines


def draw(sizes: Mapping[int, Kept], golden: Sequence[float | None]) -> Any:
    """Neighbours over the size of the forget set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2))
    axes = figure.subplots()
    places = range(len(sizes))
    for position, (name, (colour, marker)) in enumerate(SHOWN.items()):
        found = [each[name][MEASURES[0]] for each in sizes.values()]
        shift = 0.05 * (position - (len(SHOWN) - 1) / 2)
        axes.errorbar(
            [place + shift for place in places],
            [each.mean for each in found],
            yerr=[each.half or 0.0 for each in found],
            color=colour,
            marker=marker,
            markersize=8,
            capsize=3,
            linewidth=2.4 if name == "Unilogit" else 1.4,
            zorder=3 if name == "Unilogit" else 2,
            label=name,
        )
    known = [value for value in golden if value is not None]
    axes.plot(list(places)[: len(known)], known, "k*", markersize=12, label="golden model", ls="")
    axes.set_xticks(list(places), [f"{share} % of the facts" for share in sizes])
    axes.set_ylabel("probability of neighbours' answers")
    figure.suptitle("What is kept, by how much is to be forgotten", x=0.02, ha="left")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "forget-sizes.json")
    options = parser.parse_args(arguments)
    summaries = {share: read_summary(RESULTS / name) for share, name in FOLDERS.items()}
    sizes = {share: kept(summary) for share, summary in summaries.items()}
    golden = [each.seen_of_model(GOLDEN, MEASURES[0]) for each in summaries.values()]
    results = [
        {"share": share, "golden": whole, "method": name}
        | {measure: value._asdict() for measure, value in each.items()}
        for (share, found), whole in zip(sizes.items(), golden, strict=True)
        for name, each in found.items()
    ]
    facts = {"from": ", ".join(FOLDERS.values()), "seeds": len(summaries[20].methods[0].best)}
    title, command = (
        "What is kept over the size of the forget set",
        command_of("forget_sizes", arguments),
    )
    lines = [*table(sizes), "", *ahead(summaries), "", *scores(summaries[20])]
    write(options.json, facts, command, title, lines, results)
    with look():
        save(draw(sizes, golden), options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
