"""What the Triton kernels cost, without a GPU: `python -m benchmarks.static`.

Two tables, written to `results/static.json` and `results/static.md`. The first is read from kernels
compiled for each target through the project's own launch code; the second is counted while compiled
kernels are executed on the CPU (tools/ptxsim). Peers are measured in the same run. No number here
is a time, and nothing ran on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT / "tools" / "ptxsim" / "src"))  # it is not installed

from tests.backends.triton import costs  # noqa: E402
from tests.backends.triton.aot import TARGETS, Turn  # noqa: E402
from tests.backends.triton.costs import Compiled, Cost  # noqa: E402

RESULTS = _ROOT / "benchmarks" / "results"
VARIANTS = (
    (torch.bfloat16, 50_257),
    (torch.bfloat16, 128_256),
    (torch.float32, 50_257),
    (torch.float32, 128_256),
)
"""The first, whose rows begin at every alignment, is the one that every target is compiled for."""

PEER_TARGETS = ("cuda:80", "cuda:90")
"""Where the peers are compiled too. For newer GPUs Liger asks the machine for its own."""

COMPILED_COLUMNS = {
    "target": "target",
    "owner": "",
    "kernel": "kernel",
    "use": "launched for",
    "dtype": "dtype",
    "v": "V",
    "warps": "warps",
    "registers": "registers",
    "spilled": "spilled",
    "shared": "shared B",
    "occupancy": "occupancy",
    "loop_accesses": "accesses in loops (bits: count)",
    "instructions": "instructions",
    "per_logit": "a logit: instructions",
    "special_per_logit": "special functions",
}
EXECUTED_COLUMNS = {
    "call": "call",
    "owner": "",
    "dtype": "dtype",
    "v": "V",
    "bytes": "bytes / bytes of the logits",
    "sectors": "32-byte sectors / logits",
    "instructions": "instructions / logit",
    "special": "special functions / logit",
    "launches": "kernels",
}

Row = dict[str, Any]


def compiled_rows(targets: list[str]) -> list[Row]:
    """Resources of every kernel on every target."""
    rows = []
    for target in targets:
        compared = target in PEER_TARGETS
        for dtype, v in VARIANTS if compared else VARIANTS[:1]:
            found = costs.compile_ours(target, v, dtype)
            if compared:
                found += costs.compile_liger(target, v, dtype)
            if compared and dtype in costs.CCE_DTYPES:
                found += costs.compile_cce(target, v, dtype)
            rows += [_compiled_row(target, v, dtype, kernel) for kernel in found]
            print(f"compiled for {target}: {dtype}, V = {v}", file=sys.stderr, flush=True)
    return rows


def _compiled_row(target: str, v: int, dtype: torch.dtype, kernel: Compiled) -> Row:
    found = kernel.resources
    return {
        "target": target,
        "owner": kernel.owner,
        "kernel": kernel.launch.name.removesuffix("_kernel"),
        "use": kernel.use,
        "dtype": str(dtype).removeprefix("torch."),
        "v": v,
        "warps": kernel.launch.kernel.metadata.num_warps,
        "registers": found.registers,
        "spilled": found.spilled,
        "shared": found.shared,
        "occupancy": round(found.occupancy, 3),
        "loop_accesses": dict(sorted(found.loop_accesses.items(), reverse=True)),
        "instructions": found.instructions,
        "per_logit": _for_each_logit(kernel, dtype, lambda turn: turn.instructions),
        "special_per_logit": _for_each_logit(kernel, dtype, lambda turn: turn.special),
    }


PASSES = {"log_odds_update": 1, "log_odds_gradient": 1, "log_odds_sweep": 2}
"""Kernels whose loads are all of one matrix, and how often they pass over it."""


def _for_each_logit(
    kernel: Compiled, dtype: torch.dtype, count: Callable[[Turn], int]
) -> float | None:
    """Of the loops over full tiles, which load the most in a turn, what they execute together.

    None where tiles of the tail are as large, which look alike.
    """
    turns = kernel.resources.turns
    most = max((turn.loads for turn in turns), default=0)
    tiles = [turn for turn in turns if turn.loads == most]
    if len(tiles) != PASSES.get(kernel.launch.name.removesuffix("_kernel")):
        return None
    return round(sum(map(count, tiles)) * dtype.itemsize / (16 * most), 2)


def executed_rows() -> list[Row]:
    """Bytes and work for each logit, ours beside Liger's on the same inputs."""
    calls = {
        "forward": (costs.our_forward, costs.liger_forward),
        "forward and backward": (costs.our_step, costs.liger_step),
    }
    rows = []
    for dtype, v in VARIANTS:
        for name, pair in calls.items():
            for owner, call in zip(("ours", "Liger"), pair, strict=True):
                rows.append(_executed_row(name, owner, v, dtype, costs.execute(call, v, dtype)))
            print(f"executed: {name}, {dtype}, V = {v}", file=sys.stderr, flush=True)
    return rows


def _executed_row(name: str, owner: str, v: int, dtype: torch.dtype, cost: Cost) -> Row:
    return {
        "call": name,
        "owner": owner,
        "dtype": str(dtype).removeprefix("torch."),
        "v": v,
        "bytes": round(cost.bytes, 4),
        "sectors": round(cost.sectors, 4),
        "instructions": round(cost.instructions, 2),
        "special": round(cost.special, 3),
        "launches": list(cost.launches),
    }


def table(rows: list[Row], columns: dict[str, str]) -> str:
    """Rows in Markdown."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_text(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        # Single elements, narrower than 64 bits, are counted under 0.
        return ", ".join(f"{width or '< 64'}: {count}" for width, count in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(name.removesuffix("_kernel") for name in value)
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def report(versions: dict[str, str], compiled: list[Row], executed: list[Row]) -> str:
    """Both tables with what they mean."""
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"""# The Triton kernels without a GPU

`python -m benchmarks.static` with {names}. Nothing here ran on a GPU, and no number is a time.

## Compiled

Registers of a thread (on AMD vector registers), bytes spilled (on AMD registers), shared memory of
a program, resident warps over the most there could be, global accesses in loops by width, and
machine instructions in the binary. Then what the loops over full tiles execute for each logit, all
that a kernel has of them together (two in a sweep), by the shortest way around each: machine
instructions, and those of them for the special function units. CCE is a fused linear loss: its
kernels hold the GEMM too.

{table(compiled, COMPILED_COLUMNS)}

## Executed

Counted on the PTX for sm_90, on {costs.ROWS} rows with the launch settings of thousands. What
several lanes of a warp ask for together counts once, each time that it is asked for: the second
read of a row counts, whether or not it comes from a cache. The floor is 1 for a forward (one read)
and 3 with the gradient (two reads, one write).

{table(executed, EXECUTED_COLUMNS)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args()
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
    versions = {name: version(name) for name in packages}
    compiled, executed = compiled_rows(list(chosen.targets)), executed_rows()
    results = {"versions": versions, "compiled": compiled, "executed": executed}
    text = report(versions, compiled, executed)
    (chosen.output / "static.json").write_text(json.dumps(results, indent=1) + "\n")
    (chosen.output / "static.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
