"""A GPU's plan and chunk loops on CPU tensors, with what they launch recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from unilogit_kernels.fused_linear import compaction
from unilogit_kernels.fused_linear.compaction import LinearInputs
from unilogit_kernels.fused_linear.gemm import GemmDtypes
from unilogit_kernels.fused_linear.recorder import Recorder
from unilogit_kernels.rows.divergence import PairProblem
from unilogit_kernels.rows.objective import RowProblem


class LoopLaunches:
    """Counts what the loops launch: operators here, row kernels by whoever drives them.

    Attributes:
        operators: Names of torch's operators and matrix products, in order.
    """

    def __init__(self) -> None:
        self.operators: list[str] = []
        self._recorder: Recorder | None = None
        self._outside = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """What is launched inside counts, once."""
        if self._recorder is not None:
            yield
            return
        self._recorder = Recorder()
        # Inside operators, below autograd, some of torch's functions pass by the recorder.
        above = torch._C._ForceDispatchKeyGuard(*self._outside)
        try:
            with torch.no_grad(), above, self._recorder:
                yield
        finally:
            self.operators += [launch.name for launch in self._recorder.launches]
            self._recorder = None

    def recording(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose launches count."""

        def recording(*args: Any, **kwargs: Any) -> Any:
            with self.recorded():
                return function(*args, **kwargs)

        return recording

    def multiply(
        self, dtypes: GemmDtypes, a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False
    ) -> None:
        """`GemmDtypes.multiply` as a GPU does it: 16-bit factors, sums in float32."""
        with _disable_current_modes():
            product = a.to(dtypes.exact) @ b.to(dtypes.exact)
            out.copy_(out + product if accumulate else product)
        if self._recorder is not None:
            self._recorder.add("gemm", [a, b], [out])


@contextmanager
def planned_for_a_gpu() -> Iterator[LoopLaunches]:
    """Fused linear calls on CPU tensors follow the plan of a GPU, and its dtypes."""
    launches = LoopLaunches()
    dtypes_of, shape_of = GemmDtypes.of, LinearInputs.shape

    def gpu_dtypes(
        dtype: torch.dtype, device_type: str, logits_dtype: torch.dtype | None = None
    ) -> GemmDtypes:
        return dtypes_of(dtype, "cuda", logits_dtype)

    def multiply(dtypes: GemmDtypes, *args: Any, **kwargs: Any) -> None:
        launches.multiply(dtypes, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GemmDtypes, "of", staticmethod(gpu_dtypes))
        patch.setattr(GemmDtypes, "multiply", multiply)
        patch.setattr(
            LinearInputs, "shape", lambda *args: shape_of(*args)._replace(device_type="cuda")
        )
        for name in ("linear_loss", "linear_state", "linear_gradient"):
            patch.setattr(compaction, name, launches.recording(getattr(compaction, name)))
        for rows in (RowProblem, PairProblem):
            patch.setattr(rows, "values", launches.recording(rows.values))
        yield launches
