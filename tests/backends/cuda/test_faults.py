"""Bugs that are put into the CUDA sources on purpose, each of which must be caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ptxsim import KernelFaultError
from tests.backends.cpu import rows
from tests.backends.cuda import devices
from tests.backends.cuda.bugs import Bug, sources_with
from tests.backends.cuda.test_rows import KERNELS, distant_rows

pytestmark = [
    pytest.mark.skipif(devices.NVCC is None, reason=devices.WITHOUT_NVCC),
    pytest.mark.prove,
]


BUGS = {
    "missing barrier before the warps' parts are read": Bug(
        "kernels.h", "  __syncthreads();\n  if (warp == 0) {", "  if (warp == 0) {", "data race"
    ),
    "missing barrier before the gradient row is shared": Bug(
        "kernels.h",
        "    __syncthreads();\n    entries = shared;",
        "    entries = shared;",
        "data race",
    ),
    "race in place: the label's logit is read behind the barrier": Bug(
        "kernels.h",
        "values[row_index] = value;",
        "values[row_index] = value + 0.0f * target_of(row, label, transform);",
        "data race",
    ),
    "the label's entry belongs to nobody": Bug(
        "row_walk.h", "if (before < 0 || before", "if (before > 0 || before", None
    ),
    "a vector too many in the tail": Bug(
        "row_walk.h",
        "/ kVector;\n    end = tail",
        "/ kVector + 1;\n    end = tail",
        "data race|out-of-bounds",
    ),
    "the tail begins too late": Bug(
        "row_walk.h",
        "tail = peeled + tiles * tile_columns();",
        "tail = peeled + tiles * tile_columns() + (tiles > 0 ? kVector : 0);",
        None,
    ),
    "unaligned rows are not peeled": Bug(
        "row_walk.h", "(kVector - beyond) % kVector, v)", "0, v)", "misaligned"
    ),
    "32-bit offset of a row": Bug(
        "row_walk.h",
        "data + row * row_stride",
        "data + static_cast<int>(row) * static_cast<int>(row_stride)",
        "out-of-bounds",
    ),
    "an ignored label becomes an address": Bug(
        "kernels.h", "label >= 0 ? target_of", "true ? target_of", "data race|out-of-bounds"
    ),
    "the excess stays in the sum": Bug(
        "row_parts.h", "with_excess(part.sum, -transform.excess(part.max))", "part.sum", None
    ),
    "the excess stays in the gradient": Bug(
        "row_walk.h", "with_excess(gradient.coefficient, -excess)", "gradient.coefficient", None
    ),
    "the product with the maximum overflows": Bug(
        "transform.h", "fabsf(max) < kAllOrNothing ? kLog2E : 1.0f", "kLog2E", None
    ),
    "the sum stays where the maximum was": Bug(
        "row_parts.h", "fmaf(part.sum, weight, sum.total())", "part.sum + sum.total()", None
    ),
}


def sweep_in_place(device: devices.PtxLauncher) -> None:
    """Two warps a block, odd rows, labels in columns of the second warp, and one that is none."""
    logits, labels, weight = rows.problem(64, 2099, torch.bfloat16)
    labels[:] = torch.arange(64) * 8 + 1100
    labels[7] = -(10**9)
    rows.check_sweep(logits, labels, weight, "unilogit", rows.PLAIN, logits)


def large_logits(device: devices.PtxLauncher) -> None:
    logits, labels, weight = rows.problem(64, 2099, torch.float32)
    logits += torch.tensor([-1e4, 1e5, 1e8, 3e38]).repeat(16)[:, None]
    out = torch.empty_like(logits)
    rows.check_sweep(logits, labels, weight, "cross_entropy", rows.PLAIN, out)


PROBLEMS: dict[str, Callable[[devices.PtxLauncher], None]] = {
    "32-bit offset of a row": distant_rows,
    "the excess stays in the sum": large_logits,
    "the excess stays in the gradient": large_logits,
    "the product with the maximum overflows": large_logits,
    "no bug, large logits": large_logits,
}


@pytest.mark.parametrize("name", ["no bug", "no bug, large logits", *BUGS])
def test_bugs_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "KERNELS", KERNELS)
    problem = PROBLEMS.get(name, sweep_in_place)
    resident = 128 if problem is distant_rows else 64
    with devices.small_problems("whole rows") as device, devices.block_sizes(64, 32, resident):
        device.arch = 90
        if name not in BUGS:
            problem(device)
            return
        device.headers = sources_with(BUGS[name], tmp_path)
        if BUGS[name].caught is None:
            with pytest.raises(AssertionError):
                problem(device)
        else:
            with pytest.raises((KernelFaultError, AssertionError), match=BUGS[name].caught):
                problem(device)
