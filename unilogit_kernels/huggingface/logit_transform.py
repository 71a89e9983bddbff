"""What a model does to the output of its lm_head, found out by sending known numbers through it.

Two probes are sent in the place of the logits. The first, of a few tokens, shows each value in each
column, and so everything that depends on neither the inputs nor the mode; the scale, the cap and
the number of real tokens are read from it. The second is a single row that goes through every call
and has to come out as the first one tells. Both are as wide as the logits and are compared in every
column: a mask, a bias or a factor of some of the columns cannot hide.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from unilogit_kernels import reference

# The smallest value is in the linear part of any cap and shows the scale and what is added, the
# largest is far beyond any cap and shows it, and those between show whether it is the tanh that the
# kernels know. All have few enough bits that a cast of the logits to bfloat16 leaves them alone.
_SMALLEST, _LARGEST = 2.0**-20, 2.0**100
_VALUES = (_SMALLEST, _LARGEST, 0.5, -1.0, 3.0, -10.0, 30.0, -100.0, 1000.0, -_LARGEST)
# Some models cast logits to float32 before they cap them, so a float64 probe may come back rounded.
_TOLERANCE = 8 * torch.finfo(torch.float32).eps
# Sequences and tokens of the first probe: one token for each value.
OBSERVED_TOKENS = 2, len(_VALUES) // 2
_INSTEAD = "use objective_loss on model(...).logits"


class UnsupportedHeadError(ValueError):
    """The fused losses cannot stand in for this model's head, or for what follows it."""


@dataclasses.dataclass(frozen=True)
class HeadTransform:
    """What a model does to the output of its lm_head: `softcap * tanh(scale * x / softcap)`.

    Attributes:
        logit_scale: factor on the raw logits, or None for 1.
        softcap: the cap, or None.
        vocab_size: number of leading columns the model keeps.
    """

    logit_scale: float | None
    softcap: float | None
    vocab_size: int

    def __call__(self, raw: Tensor) -> Tensor:
        """Transform raw logits `[..., rows of the weight]`; the dtype is kept."""
        return reference.transform_logits(raw, **dataclasses.asdict(self))


def first_probe(columns: int) -> Tensor:
    """Every value in every column: float64 `[*OBSERVED_TOKENS, columns]`."""
    tokens = torch.arange(math.prod(OBSERVED_TOKENS)).view(*OBSERVED_TOKENS, 1)
    return _values()[(tokens + torch.arange(columns)) % len(_VALUES)]


def row_probe(columns: int, vocab_size: int) -> Tensor:
    """The smallest value but for one column of each other: float64 `[1, 1, columns]`."""
    row = torch.full((1, 1, columns), _SMALLEST, dtype=torch.float64)
    # Spread, since the first tokens of a vocabulary are those that are likely to be special.
    places = torch.linspace(0, vocab_size - 1, min(len(_VALUES), vocab_size)).long()
    row[..., places] = _values()[: len(places)]
    return row


def transform_of(seen: Tensor, probe: Tensor) -> HeadTransform:
    """The transform that made `seen` of the first probe.

    Raises:
        UnsupportedHeadError: there is none.
    """
    kept = seen.shape[-1] if seen.dim() else 0
    if seen.shape != (*probe.shape[:-1], kept) or not 2 <= kept <= probe.shape[-1]:
        raise UnsupportedHeadError(_other_shape(seen, probe))
    found, columns = seen.detach().cpu().double(), probe[..., :kept]
    # Medians, so that a column which differs is named as the one that differs.
    scale = float(found[columns == _SMALLEST].median()) / _SMALLEST
    cap = abs(float(found[columns == _LARGEST].median()))
    if scale == 0 or not math.isfinite(scale):
        scale = 1.0
    transform = HeadTransform(
        logit_scale=None if abs(scale - 1) <= _TOLERANCE else scale,
        softcap=cap if 0 < cap < _LARGEST * min(abs(scale), 1) / 2 else None,
        vocab_size=kept,
    )
    difference = difference_from(transform(probe), found, probe)
    if difference is not None:
        raise UnsupportedHeadError(difference)
    return transform


def difference_from(expected: Tensor, seen: Tensor, probe: Tensor) -> str | None:
    """How `seen` of a probe differs from what is expected, in any column, or None."""
    if seen.shape != expected.shape:
        return _other_shape(seen, probe)
    found = seen.detach().cpu().double()
    # A comparison that NaN fails.
    wrong = ~((found - expected).abs() <= _TOLERANCE * expected.abs())
    return _other_values(found, expected, wrong) if bool(wrong.any()) else None


def _values() -> Tensor:
    return torch.tensor(_VALUES, dtype=torch.float64)


def _other_shape(seen: Tensor, probe: Tensor) -> str:
    return (
        f"the model makes logits of shape {list(seen.shape)} of a head's output of shape "
        f"{list(probe.shape)}, where the fused losses know only a model that keeps each token and "
        f"some leading columns, and treats all tokens alike; {_INSTEAD}"
    )


def _other_values(found: Tensor, expected: Tensor, wrong: Tensor) -> str:
    columns = wrong.flatten(0, -2).any(0).nonzero().flatten().tolist()
    where = tuple(wrong.nonzero()[0].tolist())
    named = ", ".join(map(str, columns[:4])) + (", ..." if len(columns) > 4 else "")
    return (
        "the model does to its logits what the fused losses cannot: beside a factor, a tanh cap "
        f"and the number of columns, {len(columns)} of {found.shape[-1]} columns are changed "
        f"({named}); column {where[-1]} came out as {float(found[where]):.9g} where "
        f"{float(expected[where]):.9g} was expected (masks, biases and temperatures of single "
        f"columns or tokens are not supported); {_INSTEAD}"
    )


def failed_after_head(error: Exception) -> str:
    """What to say of a model that cannot go on from the probe."""
    return (
        "given one row in the place of its logits, the model fails after its head with "
        f"{type(error).__name__}: {error}; if it does not fail with its own logits, {_INSTEAD}"
    )
