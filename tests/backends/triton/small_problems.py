"""Triton's kernels on CPU tensors, laid out so that small problems take every path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.support.caches import forget_layouts

SHARES = ("whole rows", "split rows")
"""How programs may share rows: one for each, or several for one."""


@contextmanager
def small_problems(share: str) -> Iterator[None]:
    """Let `backend="triton"` take CPU tensors, under an interpreter or an executor of your choice.

    Body tiles are made small, so that short rows have several of them, and a tail, and ends; and
    the device that the launches imagine is so small, or so large, that rows are shared as asked.
    """
    # Kernels are decorated when this is imported, which the interpreter must come before.
    from unilogit_kernels.backends import gpu, registry
    from unilogit_kernels.backends.triton import settings

    small = dataclasses.replace(
        settings.TABLE["cuda:90"],
        lanes=16,
        capped_lanes=16,
        warps=4,
        split_warps=1,
        resident_warps=4,
        multiprocessors=1 if share == "whole rows" else 64,
    )
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(settings, "current_settings", lambda: small)
        if share == "whole rows":
            patch.setattr(gpu, "WAVES", 1)
        patch.setitem(registry._DEVICES, "triton", "cpu")
        patch.setattr(registry, "unavailable_reason", lambda name: None)
        forget_layouts()
        yield
    forget_layouts()
