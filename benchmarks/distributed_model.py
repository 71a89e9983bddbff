"""What an lm_head's loss costs a rank in three layouts, from 1 to 1,024 GPUs: on paper.

Every figure is of `explain_plan`: the loops themselves on tensors without data, and the collectives
that they enter. Times are rooflines at the rates that are named, never measurements:

- *data parallel*: each rank has the whole head, and the weight's gradient is summed over all ranks;
- *gathered head*: the head is sharded over the ranks of a node (FSDP), gathered once for the loss,
  and its gradient scattered;
- *vocabulary parallel*: the ranks of a node share the vocabulary, and the tokens of all of them.

    python -m benchmarks.distributed_model
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from unilogit_kernels import explain_plan
from unilogit_kernels.functional.explain import ACCELERATORS, PlanReport

NODE = 8
"""GPUs that a fast link joins, and that share a head or a vocabulary."""

BFLOAT16 = 2


class Link(NamedTuple):
    """Bytes per second that a GPU sends to others, by data sheet, one way."""

    inside: float
    outside: float


LINKS = {"H100": Link(450e9, 50e9), "B200": Link(900e9, 50e9)}
"""NVLink 4 and 5 inside a node; a 400 Gb/s network card for each GPU outside."""


class Cost(NamedTuple):
    """Of one loss, forward and backward, for a rank.

    Attributes:
        seconds: Of the loss itself.
        sent: Bytes inside the node, and outside.
        held: Bytes of the head, its gradient, and the most beside them.
    """

    seconds: float
    sent: tuple[float, float]
    held: float

    def with_sending(self, link: Link) -> float:
        """Seconds where nothing overlaps."""
        return self.seconds + self.sent[0] / link.inside + self.sent[1] / link.outside


def ring(size: float, ranks: int) -> float:
    """Bytes that a rank sends to gather, or to scatter, `size` bytes over a ring."""
    return size * (ranks - 1) / ranks


def sum_of_gradients(size: float, gpus: int) -> tuple[float, float]:
    """Bytes of a sum over all GPUs: scattered and gathered inside a node, summed across nodes."""
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    return 2 * ring(size, inside), 2 * ring(size / inside, nodes)


def costs(gpu: str, n: int, h: int, v: int, gpus: int) -> dict[str, Cost]:
    """The three layouts, with `n` tokens for each GPU; of one GPU there is but the first."""
    head = BFLOAT16 * v * h
    whole = explain_plan(n, h, v)
    found = {
        "data parallel": Cost(
            seconds_of(whole, gpu), sum_of_gradients(head, gpus), 2 * head + whole.peak_bytes
        )
    }
    if gpus == 1:
        return found
    ranks = min(gpus, NODE)
    # Gathered for the loss, and its gradient scattered at once; the shards' sums go outside.
    outside = 2 * ring(head / ranks, max(1, gpus // NODE))
    found["gathered head"] = Cost(
        seconds_of(whole, gpu),
        (2 * ring(head, ranks), outside),
        2 * head + 2 * head / ranks + whole.peak_bytes,
    )
    # Each rank brings its own tokens: theirs are gathered first, and the gradient is scattered.
    shared = explain_plan(n * ranks, h, v, vocab_parallel=ranks, sequence_parallel=True)
    found["vocabulary parallel"] = Cost(
        seconds_of(shared, gpu),
        (sum(each.received for each in shared.collectives), outside),
        # The gathered hidden states are among the buffers; their gradient is as large.
        2 * head / ranks + BFLOAT16 * n * ranks * h + shared.peak_bytes,
    )
    return found


def seconds_of(report: PlanReport, gpu: str) -> float:
    """The prediction."""
    return report.predicted_seconds[gpu]


def table(gpu: str, n: int, h: int) -> list[str]:
    """Markdown."""
    link = LINKS[gpu]
    rates = ACCELERATORS[gpu].rates
    lines = [
        f"### {gpu}, {n:,} tokens for each GPU, hidden size {h:,}",
        "",
        f"Rates: {rates}; links {link.inside / 1e9:.0f} GB/s inside a node of {NODE} and "
        f"{link.outside / 1e9:.0f} GB/s outside, by data sheet.",
        "",
        "| vocabulary | GPUs | data parallel | gathered head | vocabulary parallel | least time |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for v in (128_256, 262_144, 524_288):
        for gpus in (1, 8, 64, 1024):
            found = costs(gpu, n, h, v, gpus)
            cells = [
                f"{1e3 * cost.with_sending(link):.1f} ms, {cost.held / 2**30:.1f} GiB"
                for cost in found.values()
            ]
            cells += ["-"] * (3 - len(cells))
            best = min(found, key=lambda name: found[name].with_sending(link))
            lines.append(f"| {v:,} | {gpus:,} | {' | '.join(cells)} | {best} |")
    return [*lines, ""]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    given = parser.parse_args()
    for gpu in LINKS:
        print("\n".join(table(gpu, given.tokens, given.hidden)))


if __name__ == "__main__":
    main()
