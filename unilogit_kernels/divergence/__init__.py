"""KL divergence from a reference model: the two-model losses.

The layers are those of the single-model losses: `functional`, `inputs`, `ops`, `calls` and `loops`,
then the two-row kernels of `backends`. `closed_form` is the maths on `[n]` vectors, `pairs` what
describes a pair of rows.
"""

from unilogit_kernels.divergence.closed_form import Mask, Rewrite, Shift, Uniform
from unilogit_kernels.divergence.functional import (
    count_ignored_positions,
    kl_loss,
    linear_kl_loss,
)

__all__ = [
    "Mask",
    "Rewrite",
    "Shift",
    "Uniform",
    "count_ignored_positions",
    "kl_loss",
    "linear_kl_loss",
]
