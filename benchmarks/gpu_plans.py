"""The plans of fused linear calls on GPUs, as `explain_plan` predicts them: a table of docs/gpu.md.

`python -m benchmarks.gpu_plans` prints Markdown; it measures nothing.
"""

from __future__ import annotations

import itertools

from unilogit_kernels import LinearOptions, explain_plan
from unilogit_kernels.functional.explain import PlanReport

GPUS = ("H100", "H200", "B200", "MI300X")
TOKENS = (2048, 8192, 65_536)
MODELS = ((4096, 128_256), (3584, 262_144), (896, 151_936))
"""Hidden size and vocabulary, as of Llama 3 8B, a Gemma and Qwen2 0.5B."""
BUDGETS = (1, 2, 4)
"""GiB, beside the default one, for the first model."""


def order_of(report: PlanReport) -> str:
    """Which order, and what waits in it."""
    if report.plan.saves_rows:
        return f"rows wait ({report.saved_share:.0%})"
    return report.plan.order.replace("_", " ")


def line(n: int, h: int, v: int, *, train_weight: bool, budget: int | None = None) -> str:
    """One call."""
    options = LinearOptions(memory_budget=None if budget is None else budget << 30)
    report = explain_plan(n, h, v, train_weight=train_weight, options=options)
    times = []
    for gpu in GPUS:
        seconds = report.predicted_seconds[gpu]
        times.append(f"{1e3 * seconds:.1f} ({seconds / report.bare_gemm_seconds[gpu]:.2f})")
    least, *_, most = sorted([*report.launches_on.values()] * 2)
    cells = [
        f"{n:,} x {h:,} x {v:,}",
        "trained" if train_weight else "frozen",
        "default" if budget is None else f"{budget} GiB",
        order_of(report),
        f"{report.gemms:.2f}",
        f"{least:,}" if least == most else f"{least:,} to {most:,}",
        f"{report.peak_bytes / 2**20:,.0f}",
        *times,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    what = "tokens x hidden x vocabulary | lm_head | budget | order | GEMMs | launches | peak, MiB"
    head = f"| {what} | {' | '.join(f'{gpu}, ms' for gpu in GPUS)} |"
    print(head, "|" + "---|" * (head.count("|") - 1), sep="\n")
    for n, (h, v), train_weight in itertools.product(TOKENS, MODELS, (True, False)):
        print(line(n, h, v, train_weight=train_weight))
    for n, budget in itertools.product(TOKENS, BUDGETS):
        print(line(n, *MODELS[0], train_weight=True, budget=budget))


if __name__ == "__main__":
    main()
