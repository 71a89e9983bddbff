"""What is timed: shapes, and problems with seeded inputs of a shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BLOCK_ELEMENTS = 1 << 21
"""Random numbers are drawn in float32 in blocks of so many, to keep large weights small."""


@dataclass(frozen=True)
class Shape:
    """A problem without its data.

    Attributes:
        n: Tokens.
        vocab_size: V.
        dtype: Name of the dtype.
        h: Hidden size for a fused linear, or None for a loss on logits.
        frozen_head: Whether the lm_head needs no gradient.
        softcap: Cap of the logits, or None.
        model: The model whose lm_head has this shape, or "".
    """

    n: int
    vocab_size: int
    dtype: str
    h: int | None = None
    frozen_head: bool = False
    softcap: float | None = None
    model: str = ""

    @property
    def entry(self) -> str:
        """`"logits"` or `"linear"`."""
        return "logits" if self.h is None else "linear"

    @property
    def title(self) -> str:
        """For tables: the shape, the dtype and what is frozen."""
        sizes = (self.n, self.vocab_size) if self.h is None else (self.n, self.h, self.vocab_size)
        head = "" if self.h is None else ", frozen head" if self.frozen_head else ", trained head"
        cap = "" if self.softcap is None else f", softcap {self.softcap:g}"
        name = f"{self.model}: " if self.model else ""
        sizes_text = " x ".join(f"{size:,}" for size in sizes)
        return f"{name}{self.entry} {sizes_text} {self.dtype}{head}{cap}"

    @property
    def operand_bytes(self) -> int:
        """Bytes of logits, or of hidden states and weight."""
        elements = self.n * self.vocab_size if self.h is None else self.h * (self.n + self.rows)
        return elements * DTYPES[self.dtype].itemsize

    @property
    def rows(self) -> int:
        """Rows of the weight; 0 where there is none."""
        return 0 if self.h is None else self.vocab_size

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that a training step returns."""
        size = DTYPES[self.dtype].itemsize
        if self.h is None:
            return self.operand_bytes
        return self.h * (self.n + (0 if self.frozen_head else self.rows)) * size


class Problem:
    """A shape with seeded inputs: logits of a few units, labels that are sometimes likely.

    Args:
        shape: What to build.
        device: Where.

    Attributes:
        labels: int64 `[n]`.
        operands: The logits, or hidden states and weight.
    """

    def __init__(self, shape: Shape, device: str = "cpu") -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[shape.dtype]
        n, v, h = shape.n, shape.vocab_size, shape.h
        labels = torch.randint(0, v, (n,), generator=generator, device=device)
        # A third of the tokens are known to the model, as in text that it was trained on.
        known = labels[::3]
        if h is None:
            logits = _normal(n, v, 3.0, dtype, generator)
            logits[::3].scatter_add_(1, known[:, None], logits.new_full((len(known), 1), 16.0))
            operands = [logits]
        else:
            hidden = _normal(n, h, 1.0, dtype, generator)
            weight = _normal(v, h, 3 / h**0.5, dtype, generator)
            hidden[::3] += (1.8 * weight[known].float()).to(dtype)
            operands = [hidden, weight]
        self.labels = labels
        trains = [True, not shape.frozen_head]
        self.operands = [
            x.requires_grad_(wanted) for x, wanted in zip(operands, trains, strict=False)
        ]

    @property
    def trained(self) -> list[Tensor]:
        """The operands that want a gradient."""
        return [x for x in self.operands if x.requires_grad]

    def sliver(self, tokens: int) -> Problem:
        """The same problem for the first few tokens; a weight is shared."""
        part = object.__new__(Problem)
        part.shape = Shape(**{**vars(self.shape), "n": tokens})
        part.labels = self.labels[:tokens]
        first = self.operands[0].detach()[:tokens].clone().requires_grad_()
        part.operands = [first, *self.operands[1:]]
        return part


def _normal(
    rows: int, columns: int, scale: float, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    result = torch.empty(rows, columns, dtype=dtype, device=generator.device)
    for block in result.split(max(1, _BLOCK_ELEMENTS // columns)):
        block.copy_(torch.randn(*block.shape, generator=generator, device=block.device).mul_(scale))
    return result
