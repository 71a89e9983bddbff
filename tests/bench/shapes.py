"""Shapes and measurements that the tests of the harness take."""

from __future__ import annotations

from dataclasses import replace

from unilogit_kernels.bench.measure import Measurement
from unilogit_kernels.bench.problems import Shape
from unilogit_kernels.bench.provider import OURS

LOGITS = Shape(6, 700, "float32")
LINEAR = Shape(6, 700, "bfloat16", 16)
ROW = Measurement("other", "unilogit", "both", [2.0, 4.0, 3.0], 1.5, 1e-3, 1e-2, 12.3)
MINE = replace(ROW, provider=OURS["unilogit"], relative_to_ours=1.0)
