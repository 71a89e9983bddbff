"""What every backend inherits or does for itself."""

from __future__ import annotations

import pytest
import torch

from unilogit_kernels.backends.contract import RowKernels, Tile
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.backends.registry import load


def test_scaling_in_place_rounds_once(backend: str, dtype: torch.dtype) -> None:
    kernels = load(backend)
    if not kernels.scales_in_place:
        with pytest.raises(NotImplementedError, match="scales nothing in place"):
            kernels.scale_(torch.ones(1), torch.ones(()))
        return
    values = torch.randn(5003).to(dtype)
    expected = (values.float() * 0.37).to(dtype)
    for factor in (0.37, 1.0):
        kernels.scale_(values, torch.tensor(factor))
        assert torch.equal(values, expected)


def test_a_backend_without_a_kernel_is_none() -> None:
    class Half(RowKernels):
        name = "half"

    with pytest.raises(TypeError, match=r"abstract.*divergence_gradient"):
        Half()  # type: ignore[abstract]


def test_a_sweep_that_a_backend_lacks_is_refused() -> None:
    tile = Tile(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="eager backend sweeps no objective"):
        EagerKernels().log_odds_sweep(tile, torch.ones(1), "unilogit", 3, None)
