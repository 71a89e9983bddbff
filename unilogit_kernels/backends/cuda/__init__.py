"""Row kernels for NVIDIA GPUs in CUDA C++ (`csrc/cuda`), for where Triton is missing.

Nothing of CUDA is imported before a kernel is loaded. A kernel comes from the fatbin that the build
made where nvcc was installed, else NVRTC compiles it from the packaged sources at first use.
"""

from __future__ import annotations

import torch

OLDEST_CAPABILITY = (7, 5)
"""Compute capability of the oldest GPUs that CUDA 13 compiles for."""


def unavailable_reason() -> str | None:
    """Why the kernels cannot run on this machine, or None if they can. Starts no driver itself."""
    from unilogit_kernels.backends.cuda import driver, sources

    if torch.version.hip is not None:
        return "torch is built for AMD GPUs, and these kernels are for NVIDIA's"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU (torch.cuda.is_available() is False)"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}."
            f"{capability[1]}, below {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
        )
    reason = driver.missing_bindings()
    if reason is None and sources.fatbin() is None:
        reason = driver.missing_compiler()
    return reason
