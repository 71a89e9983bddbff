"""The numbers by which launchers name things to kernels, which the headers of csrc state too."""

from __future__ import annotations

import torch

OBJECTIVE_IDS = {
    "unilogit": 0,
    "unilogit_forward": 1,
    "cross_entropy": 2,
    "gradient_ascent": 3,
    "weighted_statistics": 4,
}
"""The objectives that fused kernels know, the last one on CPUs alone: `UnilogitObjective` of
`csrc/cpu/api.h`, `Objective` of `csrc/cuda/row_math.h`. Triton's kernels take the names
themselves."""

GPU_OBJECTIVES = frozenset(OBJECTIVE_IDS) - {"weighted_statistics"}
"""Those that a sweep on a GPU knows."""

NO_OBJECTIVE = -1
"""`kNoObjective` of `csrc/cuda/row_math.h`: statistics alone."""

DTYPE_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What fused kernels read and write: `UnilogitType` of `csrc/cpu/api.h`, `Type` of
`csrc/cuda/pair_kernels.h`."""
