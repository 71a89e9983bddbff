"""Values that are known, of which only roundings may be wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels.testing import assert_within_budget


def assert_rounded(
    found: Tensor, exact: Tensor, what: str = "", *, smallest_scale: float = 0.0
) -> None:
    """Assert: `exact`, in float64, but for a few roundings, and NaN and infinite where it is.

    What plain torch does is to round what is exact.
    """
    finite = exact.isfinite()
    special = found[~finite].double(), exact[~finite]
    torch.testing.assert_close(*special, rtol=0.0, atol=0.0, equal_nan=True)
    exact = exact[finite]
    plain = exact.to(found.dtype)
    assert_within_budget(found[finite], exact, plain, what, smallest_scale=smallest_scale)
