"""What is timed: named problems with inputs, and their exact results in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unilogit_kernels import objectives, reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ORACLE_TOKENS = 64
"""Tokens per block of the float64 oracle: 64 * 131,072 * 8 bytes are 64 MiB."""


@dataclass(frozen=True)
class Shape:
    """A problem without its data.

    Attributes:
        n: Tokens.
        vocab_size: V.
        dtype: Name of the dtype.
        h: Hidden size for a fused linear, or None for a loss on logits.
        frozen_head: Whether the lm_head needs no gradient.
    """

    n: int
    vocab_size: int
    dtype: str
    h: int | None = None
    frozen_head: bool = False

    @property
    def entry(self) -> str:
        """`"logits"` or `"linear"`."""
        return "logits" if self.h is None else "linear"

    @property
    def title(self) -> str:
        """For tables: the shape, the dtype and what is frozen."""
        sizes = (self.n, self.vocab_size) if self.h is None else (self.n, self.h, self.vocab_size)
        head = "" if self.h is None else ", frozen head" if self.frozen_head else ", trained head"
        return f"{self.entry} {' x '.join(f'{size:,}' for size in sizes)} {self.dtype}{head}"


class Problem:
    """A shape with seeded inputs: logits of a few units, labels that are sometimes likely.

    Args:
        shape: What to build.
        device: Where.
    """

    def __init__(self, shape: Shape, device: str = "cpu") -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        dtype = DTYPES[shape.dtype]
        n, v, h = shape.n, shape.vocab_size, shape.h
        self.labels = torch.randint(0, v, (n,), generator=generator).to(device)
        # A third of the tokens are known to the model, as in text that it was trained on.
        known = self.labels[::3].cpu()
        if h is None:
            logits = 3 * normal(n, v)
            logits[::3].scatter_add_(1, known[:, None], torch.full((len(known), 1), 16.0))
            self.operands = [logits.to(dtype).to(device).requires_grad_()]
        else:
            hidden, weight = normal(n, h), 3 / h**0.5 * normal(v, h)
            hidden[::3] += 1.8 * weight[known]
            self.operands = [
                hidden.to(dtype).to(device).requires_grad_(),
                weight.to(dtype).to(device).requires_grad_(not shape.frozen_head),
            ]

    @property
    def trained(self) -> list[Tensor]:
        """The operands that want a gradient."""
        return [x for x in self.operands if x.requires_grad]

    @cached_property
    def exact(self) -> dict[str, tuple[Tensor, list[Tensor]]]:
        """Mean loss and gradients in float64, by name of the loss."""
        operands = [x.detach().double().requires_grad_(x.requires_grad) for x in self.operands]
        trained = [x for x in operands if x.requires_grad]
        results = {
            name: (
                torch.zeros((), dtype=torch.float64, device=self.labels.device),
                [torch.zeros_like(x) for x in trained],
            )
            for name in ("unilogit", "cross_entropy")
        }
        for block in self._blocks():
            tokens, *weight = operands
            logits = tokens[block] if not weight else tokens[block] @ weight[0].t()
            d = reference.target_log_odds(logits, self.labels[block])
            for name, (loss, gradients) in results.items():
                objective = objectives.REGISTRY[name]()
                part = objective(d, self.shape.vocab_size).sum() / self.shape.n
                loss += part.detach()
                found = torch.autograd.grad(part, trained, retain_graph=True)
                for total, gradient in zip(gradients, found, strict=True):
                    total += gradient
        return results

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self.shape.n, _ORACLE_TOKENS):
            yield slice(start, start + _ORACLE_TOKENS)


def cpu_shapes() -> list[Shape]:
    """The shapes that the CPU figures are stated for."""
    logits = [(512, 49_152), (1024, 131_072), (8, 131_072)]
    linear = [(512, 576, 49_152), (1024, 1024, 131_072)]
    shapes = [Shape(n, v, dtype) for dtype in ("float32", "bfloat16") for n, v in logits]
    return shapes + [
        Shape(n, v, dtype, h, frozen)
        for dtype in ("float32", "bfloat16")
        for n, h, v in linear
        for frozen in (False, True)
    ]


def quick_shapes() -> list[Shape]:
    """Small ones that show within a minute that everything runs."""
    return [Shape(64, 32_000, "float32"), Shape(64, 32_000, "bfloat16", 256)]
