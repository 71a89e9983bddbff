"""Row kernels for NVIDIA and AMD GPUs, in Triton; triton is imported when they are loaded."""

from __future__ import annotations

import torch

OLDEST_TRITON = (3, 6)
"""What the kernels are compiled with in the tests, from here to 3.9."""

OLDEST_NVIDIA = (8, 0)
"""Compute capability from which on bfloat16 is native."""


def triton_version() -> tuple[int, ...]:
    """Major and minor version of triton, such as `(3, 7)`."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def unavailable_reason() -> str | None:
    """Why the kernels cannot run on this machine, or None if they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with pip install triton"
    if triton_version() < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA or AMD GPU (torch.cuda.is_available() is False)"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < OLDEST_NVIDIA:
        return (
            f"{torch.cuda.get_device_name()} has compute capability "
            f"{capability[0]}.{capability[1]}, below {OLDEST_NVIDIA[0]}.{OLDEST_NVIDIA[1]}"
        )
    return None
