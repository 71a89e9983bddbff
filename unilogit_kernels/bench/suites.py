"""Named sets of shapes: what the figures are stated for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from unilogit_kernels.bench.problems import Shape

_DTYPES = ("float32", "bfloat16")
_GPU_TOKENS = 8192


class Model(NamedTuple):
    """The lm_head of a published model."""

    name: str
    vocab_size: int
    h: int
    cpu_tokens: int
    softcap: float | None = None


MODELS = (
    Model("SmolLM2 135M", 49_152, 576, 1024),
    Model("Llama-3 8B", 128_256, 4096, 64),
    Model("Mistral-Nemo 12B", 131_072, 5120, 64),
    Model("Qwen2.5 7B", 152_064, 3584, 64),
    Model("Gemma-2 9B", 256_000, 3584, 64, softcap=30.0),
)
"""From the configs on the Hugging Face Hub; 152,064 are Qwen2.5's 151,936 with their padding."""


def targets(device: str) -> list[Shape]:
    """The shapes that the CPU figures are stated for, logits first."""
    logits = [(512, 49_152), (1024, 131_072), (8, 131_072)]
    linear = [(512, 576, 49_152), (1024, 1024, 131_072)]
    shapes = [Shape(n, v, dtype) for dtype in _DTYPES for n, v in logits]
    return shapes + [
        Shape(n, v, dtype, h, frozen)
        for dtype in _DTYPES
        for n, h, v in linear
        for frozen in (False, True)
    ]


def models(device: str) -> list[Shape]:
    """The heads of published models; on a CPU with few tokens."""
    return [
        Shape(
            model.cpu_tokens if device == "cpu" else _GPU_TOKENS,
            model.vocab_size,
            dtype,
            model.h,
            frozen,
            model.softcap,
            model.name,
        )
        for dtype in _DTYPES
        for model in MODELS
        for frozen in (False, True)
    ]


def sweep_n(device: str) -> list[Shape]:
    """Tokens from 256 to 16k at SmolLM2's head on a CPU, Llama-3's on a GPU."""
    v, h = (49_152, 576) if device == "cpu" else (128_256, 4096)
    sizes = [256 << i for i in range(7)]
    return [Shape(n, v, dtype, h) for dtype in _DTYPES for n in sizes]


def sweep_v(device: str) -> list[Shape]:
    """Vocabularies from 32k to 512k."""
    n, h = (512, 576) if device == "cpu" else (_GPU_TOKENS, 4096)
    sizes = [32_768 << i for i in range(5)]
    return [Shape(n, v, dtype, h) for dtype in _DTYPES for v in sizes]


def sweep_h(device: str) -> list[Shape]:
    """Hidden sizes from 256 to 8192."""
    n, v = (512, 49_152) if device == "cpu" else (_GPU_TOKENS, 128_256)
    sizes = [256 << i for i in range(6)]
    return [Shape(n, v, dtype, h) for dtype in _DTYPES for h in sizes]


def quick(device: str) -> list[Shape]:
    """Small ones that show within half a minute that everything runs.

    In float32: without instructions for it, some CPUs take half a minute for one bfloat16 GEMM.
    """
    return [Shape(64, 32_000, "float32"), Shape(128, 32_000, "float32", 256)]


SUITES: dict[str, Callable[[str], list[Shape]]] = {
    "targets": targets,
    "models": models,
    "sweep-n": sweep_n,
    "sweep-v": sweep_v,
    "sweep-h": sweep_h,
    "quick": quick,
}
"""By the name that `unilogit bench --suite` takes; each a function of the device's type."""
