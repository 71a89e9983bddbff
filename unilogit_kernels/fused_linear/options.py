"""How a fused linear call may run."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

_UNITS = {"": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    if prefix or suffix == "b"
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*")

MEMORY_BUDGET = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Default bytes that the buffers of one fused linear call may take, by device type; on GPUs the
least of it, see `budget.budget_of`."""


class LinearOptions(NamedTuple):
    """How a fused linear call may run; none of it changes what it computes beyond rounding.

    Attributes:
        memory_budget: Bytes that buffers of logits and partial sums may take beside operands and
            gradients, at least 1 MiB; or a text such as `"64MiB"` or `"1.5 GB"`. None for 64 MiB on
            CPU; on GPUs for about a thousand tokens' logits and the sums of half of the weight's
            gradient in float32, 256 MiB at least and 4 GiB at most, however many tokens there are.
            See `explain_plan`.
        logits_dtype: What the logits are rounded to before their statistics. None for float32 where
            the device's GEMM can write it (GPUs, and CPUs on which float32 GEMMs are the faster
            ones), else hidden's dtype. hidden's dtype reproduces an eager Hugging Face model;
            float32 on CPU takes float32 GEMMs.
        skip_below: Tokens whose slope (weight times `f'(d)`) is below this share of the largest get
            no gradient. 0 skips only exact zeros, and on CPU none of a frozen `weight`, whose
            gradient comes along with the loss. A skipped token's own gradient is off by at most
            `2 * skip_below * max slope * max |W_j|`.
        compact: Whether tokens that cannot matter are dropped before each GEMM. Counting them
            synchronises a GPU; False does without, for CUDA graphs, at full cost.

    Example:
        >>> import torch
        >>> from unilogit_kernels import LinearOptions, linear_unilogit_loss
        >>> hidden, weight = torch.randn(4, 16), torch.randn(1000, 16)
        >>> small = LinearOptions(memory_budget=1 << 20)
        >>> linear_unilogit_loss(hidden, weight, torch.arange(4), options=small).shape
        torch.Size([])
    """

    memory_budget: int | str | None = None
    logits_dtype: torch.dtype | None = None
    skip_below: float = 0.0
    compact: bool = True


def budget_in_bytes(options: LinearOptions) -> int | None:
    """Their memory budget as a number, or None for the default or a text that is none."""
    given = options.memory_budget
    return size_in_bytes(given) if isinstance(given, str) else given


def size_in_bytes(text: str) -> int | None:
    """The bytes that a text such as `"64MiB"` or `"1.5 GB"` names, or None if it names none.

    Example:
        >>> size_in_bytes("64MiB") == 64 << 20, size_in_bytes("1.5 GB"), size_in_bytes("much")
        (True, 1500000000, None)
    """
    found = _SIZE.fullmatch(text.lower())
    if found is None or found[2] not in _UNITS:
        return None
    return int(float(found[1]) * _UNITS[found[2]])
