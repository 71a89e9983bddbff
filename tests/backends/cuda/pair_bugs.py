"""Bugs that are put into the two-row kernels on purpose, each of which must be caught."""

from __future__ import annotations

import torch

from ptxsim import Schedule
from tests.backends import test_divergence_kernels as pairs
from tests.backends.cuda import devices
from tests.backends.cuda.bugs import SPLIT, Bug, Case
from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.backends.cuda.launch import CudaKernels

KERNELS = CudaKernels()
TRANSFORMS = (LogitTransform(scale=0.5), LogitTransform(scale=2.0, softcap=5.0))
CUT = 1100
"""Both chunks are long enough to be split."""


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Odd rows, which begin at every alignment; labels in columns of both warps of a block."""
    a, b, _ = pairs.rows(8, 2601, torch.bfloat16)
    return a, b, torch.arange(8) * 310 + 40


# ---- problems ----------------------------------------------------------------------------------


def statistics(device: devices.PtxLauncher) -> None:
    pairs.check_state(KERNELS, *rows(), (CUT,), TRANSFORMS)


def gradients(device: devices.PtxLauncher) -> None:
    """In place of either model's logits."""
    students: tuple[pairs.Student, ...] = ("a", "b")
    for student in students:
        pairs.check_gradient(KERNELS, *rows(), student, (CUT,), TRANSFORMS, in_place=True)


def other_alignment(device: devices.PtxLauncher) -> None:
    """Rows of b begin elsewhere than rows of a."""
    a, b, labels = rows()
    shifted = torch.empty(b.numel() + 1, dtype=b.dtype)[1:].view_as(b).copy_(b)
    pairs.check_state(KERNELS, a, shifted, labels)


def equal_rows(device: devices.PtxLauncher) -> None:
    pairs.test_equal_rows_have_no_divergence_and_no_gradient(KERNELS, torch.bfloat16)


def fading_infinity(device: devices.PtxLauncher) -> None:
    """A token that b forbids has an infinite product, and no weight beside a's other tokens."""
    name = "token impossible in b, without weight in a"
    (hard,) = (pair for pair in pairs.hard_pairs() if pair[0] == name)
    pairs.test_hard_rows(KERNELS, *hard, cuts=(2, 3))


def distant_rows(device: devices.PtxLauncher) -> None:
    """Two rows that are further apart than 32 bits count."""
    device.schedule = Schedule(check_races=False)  # which would take memory for all in between
    stride = 2**31 + 8
    memory = torch.empty(stride + 300, dtype=torch.bfloat16)
    a, b, labels = pairs.rows(2, 300, torch.bfloat16)
    pairs.check_state(KERNELS, memory.as_strided((2, 300), (stride, 1)).copy_(a), b, labels)


def in_kernels(right: str, wrong: str, caught: str | None) -> Bug:
    return Bug("pair_kernels.h", right, wrong, caught)


CASES = {
    "no barrier before the warps' parts are read": Case(
        in_kernels("  __syncthreads();\n  if (warp == 0) {", "  if (warp == 0) {", "data race"),
        statistics,
    ),
    "parts of warps that do not exist": Case(
        in_kernels("exists ? parts[lane] : empty_pair()", "parts[lane]", None), statistics
    ),
    "every thread stores what was merged": Case(
        in_kernels(
            "part = merge_block(part);\n  if (threadIdx.x != 0) return;",
            "part = merge_block(part);",
            "data race",
        ),
        statistics,
        SPLIT,
    ),
    "a part too many is merged": Case(
        in_kernels("i < count; i +=", "i <= count; i +=", None), statistics, SPLIT
    ),
    "a merge does not begin with an empty part": Case(
        in_kernels(
            "PairPart part = empty_pair();\n  for (int i = static_cast",
            "PairPart part;\n  for (int i = static_cast",
            None,
        ),
        statistics,
        SPLIT,
    ),
    "earlier columns are forgotten": Case(
        in_kernels(
            "store_pair(spread_nan(merge(load_pair(state, state_stride), part)), state, "
            "state_stride);\n  } else",
            "store_pair(spread_nan(part), state, state_stride);\n  } else",
            None,
        ),
        statistics,
    ),
    "a vector too many in the tail": Case(
        in_kernels(
            "i < layout.tail_vectors; i += team.size()) {\n    part",
            "i <= layout.tail_vectors; i += team.size()) {\n    part",
            None,
        ),
        statistics,
    ),
    "the label's column is left out of one row only": Case(
        in_kernels("x[i] = y[i] = -infinity()", "x[i] = -infinity()", None), statistics
    ),
    "a label of another chunk becomes an address": Case(
        in_kernels("team.part == 0 && label >= 0", "team.part == 0", None), statistics
    ),
    "products stay where the maximum was": Case(
        Bug("pair_math.h", "fmaf(part.a_sum, a_move - b_move, part.a_dot)", "part.a_dot", None),
        statistics,
    ),
    "an infinite product without weight stays": Case(
        Bug("pair_math.h", "weight == 0.0f ? 0.0f : dot", "dot", None), fading_infinity
    ),
    "vectors of rows of another alignment": Case(
        in_kernels(
            "a.beyond() != beyond || b.beyond() != beyond", "a.beyond() != beyond", "misaligned"
        ),
        other_alignment,
    ),
    "32-bit offset of a row": Case(
        in_kernels(
            "row * row_stride * (type",
            "static_cast<int>(row * row_stride) * (type",
            None,
        ),
        distant_rows,
    ),
    "the other model is the student": Case(
        in_kernels("a_is_student ? a : b", "a_is_student ? b : a", None), gradients
    ),
    "the label's logit is read behind its gradient": Case(
        in_kernels(
            "rows.out.store(rows.label, at_label)",
            "rows.out.store(rows.label, gradient.at_label * "
            "rows.student.slope(rows.student.load(rows.label)))",
            None,
        ),
        gradients,
    ),
    "terms are fused before they are rounded": Case(
        Bug(
            "pair_math.h",
            "sum_of_rounded(first, gamma * exponential(t))",
            "fmaf(gamma, exponential(t), first)",
            None,
        ),
        equal_rows,
    ),
}
