"""What a call with next to no work costs: `python -m benchmarks.host_cost`.

Forward and backward on 2 rows of 100 logits, so that nearly all of it is Python and torch's own
overhead: what bounds small calls, and on a GPU the host. Microseconds of the process's own CPU
time on one thread, the least of many repeats, beside `F.cross_entropy`; then the functions of the
package that take the most of it. `--before DIRECTORY` measures another checkout too, in turns.
Prints Markdown, and writes it beside the JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from unilogit_kernels import kl_loss, linear_unilogit_loss, unilogit_loss

ROOT = Path(__file__).resolve().parent.parent
N, V, H = 2, 100, 16
CALLS_A_REPEAT = 50
PROFILED_CALLS = 300
SHOWN = 8
"""Functions of a profile."""

Step = Callable[[], None]
Figures = dict[str, Any]


def steps() -> dict[str, Step]:
    """A forward and a backward of each entry."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    labels = torch.tensor([1, 2])
    return {
        "F.cross_entropy": lambda: F.cross_entropy(logits, labels).backward(),
        "unilogit_loss": lambda: unilogit_loss(logits, labels).backward(),
        "kl_loss": lambda: kl_loss(logits, teacher, labels).backward(),
        "linear_unilogit_loss, frozen": lambda: linear_unilogit_loss(
            hidden, weight, labels
        ).backward(),
    }


def measure(repeats: int) -> Figures:
    """Least microseconds of each entry, and where those of the package go."""
    torch.set_num_threads(1)
    least, profiles = {}, {}
    for name, step in steps().items():
        least[name] = min(_microseconds(step) for _ in range(repeats + 1))
        if not name.startswith("F."):
            profiles[name] = _profile(step)
    return {"microseconds": least, "profiles": profiles}


def _microseconds(step: Step) -> float:
    start = time.process_time()
    for _ in range(CALLS_A_REPEAT):
        step()
    return 1e6 * (time.process_time() - start) / CALLS_A_REPEAT


def _profile(step: Step) -> list[tuple[str, float, float]]:
    """The longest functions by their own time: name, calls a step, share of the whole."""
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    for _ in range(PROFILED_CALLS):
        step()
    profile.disable()
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, *_ in stats.values())
    longest = sorted(stats.items(), key=lambda item: -item[1][2])[:SHOWN]
    return [
        (_name_of(where), calls / PROFILED_CALLS, own / total)
        for where, (_, calls, own, *_) in longest
    ]


def _name_of(where: tuple[str, int, str]) -> str:
    path, _, function = where
    if path == "~":  # of C
        return function.split(" at 0x")[0].strip("<>{}")
    return f"{'/'.join(Path(path).parts[-2:])}: {function}"


def _in_checkout(checkout: Path, repeats: int) -> Figures:
    """`measure` in a process of its own, with the package of that checkout."""
    command = [sys.executable, __file__, "--child", "--repeats", str(repeats)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def _least_of(rounds: list[Figures]) -> Figures:
    """Of several rounds, the least of each entry; the profiles of the last one."""
    names = rounds[0]["microseconds"]
    least = {name: min(each["microseconds"][name] for each in rounds) for name in names}
    return {"microseconds": least, "profiles": rounds[-1]["profiles"]}


def report(found: dict[str, Figures]) -> list[str]:
    """Markdown: a table of microseconds, and a profile of each entry."""
    lines = [
        f"Forward and backward on {N} rows of {V} logits (hidden size {H}): microseconds of CPU "
        "time on one thread, the least of all repeats.",
        "",
        f"| call | {' | '.join(found)} |",
        "|---" * (1 + len(found)) + "|",
    ]
    first = next(iter(found.values()))
    for name in first["microseconds"]:
        cells = [f"{each['microseconds'][name]:.0f}" for each in found.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "The functions with the most time of their own, under cProfile:"]
    for name in first["profiles"]:
        for which, each in found.items():
            lines += ["", f"### `{name}`, {which}", "", "| function | calls | share |"]
            lines.append("|---|---|---|")
            lines += [f"| `{f}` | {c:.0f} | {s:.1%} |" for f, c, s in each["profiles"][name]]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="of 50 calls, in each round")
    parser.add_argument("--rounds", type=int, default=3, help="processes, in turns")
    parser.add_argument("--before", type=Path, help="another checkout, with its library built")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/host-cost.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(options.repeats)))
        return
    # Here, since a process for another checkout runs this file with the package of that one.
    from benchmarks.figures import command_of, write
    from unilogit_kernels.bench.devices import Cpu

    facts = {**Cpu().facts(), "threads": 1}
    checkouts = {} if options.before is None else {"before": options.before.resolve()}
    checkouts["now" if checkouts else "µs"] = ROOT
    rounds: dict[str, list[Figures]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            rounds[name].append(_in_checkout(checkout, options.repeats))
    found = {name: _least_of(each) for name, each in rounds.items()}
    title = "What a call with next to no work costs"
    results = [{"checkout": name, **each} for name, each in found.items()]
    command = command_of("host_cost", arguments).replace(str(options.before), "CHECKOUT")
    write(options.json, facts, command, title, report(found), results)


if __name__ == "__main__":
    main()
