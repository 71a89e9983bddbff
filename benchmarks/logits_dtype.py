"""float32 or 16-bit logits: what each costs in digits, and in time by the model of `explain_plan`.

`python -m benchmarks.logits_dtype` prints Markdown. Errors are measured, on a CPU, against float64
on the same bfloat16 operands: rows of one confidence each, as a model has them on what it has
memorised. Both kinds keep float32 statistics; 16-bit ones round each logit once, as an eager
Hugging Face model and other fused losses do. Times on GPUs are predicted, not measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels import LinearOptions, explain_plan, linear_objective_loss, reference

N, H, V = 64, 256, 32_768
LOG_ODDS = (0.0, 4.0, 8.0, 12.0)
"""Of the label, about: probabilities of 0.5, 0.98, 0.9997 and 0.999994."""
OBJECTIVES = ("cross_entropy", "unilogit")
LOGITS = (torch.float32, torch.bfloat16)
GPU_SHAPES = ((8192, 4096, 128_256), (8192, 896, 151_936))
GPUS = ("H100", "H200", "B200", "MI300X")


def operands(log_odds: float) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 hidden states and weight, and labels that have about these log-odds."""
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, H, generator=draw) / H**0.5).bfloat16()
    labels = torch.randint(V, (N,), generator=draw)
    hidden, own = 4 * torch.randn(N, H, generator=draw), weight[labels].float()
    for _ in range(8):  # towards the label's row until the log-odds are there
        logits = hidden @ weight.float().T
        off = log_odds - reference.target_log_odds(logits, labels)
        hidden += (off / own.square().sum(1))[:, None] * own
    return hidden.bfloat16(), weight, labels


def results(
    operand: Tensor, weight: Tensor, labels: Tensor, name: str, **how: object
) -> list[Tensor]:
    """Loss, and the gradients of hidden states and weight."""
    x, w = operand.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_objective_loss(x, w, labels, name, **how)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]


def errors(log_odds: float, name: str) -> list[str]:
    """Relative errors of loss and gradients, of either kind of logits."""
    hidden, weight, labels = operands(log_odds)
    exact = results(hidden.double(), weight.double(), labels, name)
    cells = []
    for dtype in LOGITS:
        found = results(hidden, weight, labels, name, options=LinearOptions(logits_dtype=dtype))
        off = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        cells.append(" / ".join(f"{each:.1e}" for each in off))
    return cells


def main() -> None:
    """Print both tables."""
    print(
        "| objective | log-odds of the label | float32 logits | bfloat16 logits |",
        "|---" * 4 + "|",
        sep="\n",
    )
    for name in OBJECTIVES:
        for log_odds in LOG_ODDS:
            print(f"| {name} | {log_odds:g} | {' | '.join(errors(log_odds, name))} |")
    print("\n| tokens x hidden x vocabulary | lm_head |", " | ".join(f"{g}, ms" for g in GPUS), "|")
    print("|---" * (2 + len(GPUS)) + "|")
    for n, h, v in GPU_SHAPES:
        for train_weight in (True, False):
            plans = []
            for dtype in LOGITS:
                options = LinearOptions(logits_dtype=dtype)
                plans.append(explain_plan(n, h, v, train_weight=train_weight, options=options))
            times = [[p.predicted_seconds[gpu] for p in plans] for gpu in GPUS]
            cells = [f"{1e3 * a:.1f} / {1e3 * b:.1f} ({a / b:.2f})" for a, b in times]
            head = "trained" if train_weight else "frozen"
            print(f"| {n:,} x {h:,} x {v:,} | {head} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
