"""What only a GPU can show. Without one these tests are skipped; nothing else covers them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WITHOUT_GPU = "needs an NVIDIA or AMD GPU that torch can see, and there is none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason=WITHOUT_GPU))


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend for GPUs; one that cannot run fails its tests, but for CUDA C++ on AMD."""
    from unilogit_kernels import available_backends

    name = str(request.param)
    if name == "cuda" and torch.version.hip:
        pytest.skip("CUDA C++ is for NVIDIA GPUs")
    reason = available_backends()[name]
    assert reason is None, f"backend {name!r} is not available here: {reason}"
    return name
