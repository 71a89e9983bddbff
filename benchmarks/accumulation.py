"""How errors grow with the number of chunks: ours beside the ways in which others add up.

`python benchmarks/accumulation.py` prints a Markdown table: relative errors against float64 of the
mean cross-entropy and of its gradients, in one dtype and on the same operands. The others are
written out here, so that they differ from ours in nothing but where partial sums are kept:

- *Liger-like*: token chunks, the weight's gradient adds up in the weight's dtype.
- *torch-like*: the same, and the loss adds up in that dtype too (`F.linear_cross_entropy`).
- *CCE-like*: blocks of tokens x columns, both gradients add up in the operands' dtype.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels import linear_objective_loss
from unilogit_kernels.fused_linear import compaction
from unilogit_kernels.fused_linear.plan import Plan


class Result(NamedTuple):
    """Loss and gradients of hidden states and weight."""

    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Result:
    """In float64."""
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(F.linear(x, w), labels)
    gradients = torch.autograd.grad(loss, (x, w))
    return Result(loss.detach(), *(gradient.detach() for gradient in gradients))


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, chunks: int) -> Result:
    """The vocabulary order in `chunks` tiles of tokens by `chunks` chunks of columns."""
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    plan = Plan("vocabulary_chunks", len(x) // chunks, len(w) // chunks)
    with patch.object(compaction, "plan_linear", lambda *_, **__: plan):
        loss = linear_objective_loss(x, w, labels, "cross_entropy")
    gradients = torch.autograd.grad(loss, (x, w))
    return Result(loss.detach(), *(gradient.detach() for gradient in gradients))


def _gradient_rows(x: Tensor, w: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Losses (float32) and gradient rows of the mean, in the operands' dtype."""
    logits = F.linear(x, w).float()
    rows = torch.softmax(logits, 1)
    rows[torch.arange(len(x)), labels] -= 1
    return F.cross_entropy(logits, labels, reduction="none"), (rows / n).to(x.dtype)


def liger_like(hidden: Tensor, weight: Tensor, labels: Tensor, chunks: int) -> Result:
    """Token chunks; the weight's gradient in its own dtype."""
    loss, d_weight, parts = hidden.new_zeros((), dtype=torch.float32), torch.zeros_like(weight), []
    for x, y in zip(hidden.chunk(chunks), labels.chunk(chunks), strict=True):
        losses, rows = _gradient_rows(x, weight, y, len(hidden))
        loss += losses.sum() / len(hidden)
        parts.append(rows @ weight)
        d_weight += rows.t() @ x
    return Result(loss, torch.cat(parts), d_weight)


def torch_like(hidden: Tensor, weight: Tensor, labels: Tensor, chunks: int) -> Result:
    """The same with the loss in the operands' dtype too."""
    result = liger_like(hidden, weight, labels, chunks)
    loss = hidden.new_zeros(())
    for x, y in zip(hidden.chunk(chunks), labels.chunk(chunks), strict=True):
        loss += (_gradient_rows(x, weight, y, len(hidden))[0].sum() / len(hidden)).to(hidden.dtype)
    return result._replace(loss=loss)


def cce_like(hidden: Tensor, weight: Tensor, labels: Tensor, chunks: int) -> Result:
    """Blocks of tokens and columns; both gradients in the operands' dtype."""
    losses, rows = _gradient_rows(hidden, weight, labels, len(hidden))
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    tokens, columns = len(hidden) // chunks, len(weight) // chunks
    for i in range(0, len(hidden), tokens):
        for j in range(0, len(weight), columns):
            block = rows[i : i + tokens, j : j + columns]
            d_hidden[i : i + tokens] += block @ weight[j : j + columns]
            d_weight[j : j + columns] += block.t() @ hidden[i : i + tokens]
    return Result(losses.mean(), d_hidden, d_weight)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Result]] = {
    "ours": ours,
    "Liger-like": liger_like,
    "torch-like": torch_like,
    "CCE-like": cce_like,
}


def table(n: int, h: int, v: int, dtype: torch.dtype, chunk_counts: list[int]) -> str:
    """The errors as Markdown."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, h).to(dtype), (3 / h**0.5 * torch.randn(v, h)).to(dtype)
    labels = torch.randint(0, v, (n,))
    truth = exact(hidden, weight, labels)
    lines = [
        f"Relative errors against float64: {n:,} x {h:,} x {v:,} {str(dtype)[6:]}.",
        "",
        "| | chunks | loss | gradient of hidden | gradient of weight |",
        "|---|---|---|---|---|",
    ]
    for name, way in WAYS.items():
        for chunks in chunk_counts:
            errors = [
                float((ours_.double() - true).norm().item() / true.norm().item())
                for ours_, true in zip(way(hidden, weight, labels, chunks), truth, strict=True)
            ]
            lines.append(f"| {name} | {chunks} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[2048, 256, 8192], metavar="N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 4, 16, 64])
    args = parser.parse_args()
    n, h, v = args.shape
    print(table(n, h, v, getattr(torch, args.dtype), args.chunks))


if __name__ == "__main__":
    main()
