"""`unilogit doctor`: what this machine and this installation can do. Needs nothing but torch."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from unilogit_kernels import available_backends

EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "triton": ("fused kernels on NVIDIA and AMD GPUs", ("triton",)),
    "cuda": ("fused kernels on NVIDIA GPUs without Triton", ("cuda-core", "cuda-bindings")),
    "unlearn": (
        "fused losses of Hugging Face models, the Trainer, unilogit unlearn and evaluate",
        (
            "transformers",
            "accelerate",
            "safetensors",
            "typer",
            "rich",
            "rouge-score",
            "nltk",
            "regex",
            "scipy",
        ),
    ),
    "lora": ("LoRA adapters in unilogit unlearn and finetune", ("peft",)),
    "bench": (
        "unilogit bench with its peers and plots",
        ("pytest-benchmark", "matplotlib", "cut-cross-entropy", "liger-kernel"),
    ),
    "report": ("unilogit compare and report", ("jinja2", "matplotlib", "pyyaml")),
    "demo": ("the demo's model", ("gguf",)),
    "parquet": ("rows in parquet files", ("pyarrow",)),
    "integrations": ("the examples for TRL and Lightning", ("trl", "lightning")),
}
"""What each extra gives, and its packages."""


def diagnose() -> dict[str, Any]:
    """Versions, devices, backends and extras, as plain data.

    Returns:
        `versions`: package to version, or None where it is not installed; `devices`: one entry
        each; `backends`: name to None where it can run here, else to the reason why not; `extras`:
        name to what it gives, and which of its packages are missing.
    """
    packages = ["unilogit-kernels", "torch"]
    packages += [name for _, names in EXTRAS.values() for name in names]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in packages},
        "devices": [_cpu(), *(_cuda(index) for index in range(torch.cuda.device_count()))],
        "backends": dict(available_backends()),
        "extras": {
            extra: {"gives": gives, "missing": [name for name in names if _version(name) is None]}
            for extra, (gives, names) in EXTRAS.items()
        },
    }


def main(arguments: Sequence[str]) -> None:
    """Print the diagnosis.

    Args:
        arguments: of the command line, after `doctor`.
    """
    parser = argparse.ArgumentParser("unilogit doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    as_json = parser.parse_args(arguments).json
    found = diagnose()
    print(json.dumps(found, indent=2) if as_json else report(found))


def report(found: dict[str, Any]) -> str:
    """The diagnosis as text."""
    versions = ((name, number or "not installed") for name, number in found["versions"].items())
    devices = (
        (device["device"], device["name"], ", ".join(_details(device)))
        for device in found["devices"]
    )
    backends = (
        (name, "runs here" if reason is None else f"cannot run here: {reason}")
        for name, reason in found["backends"].items()
    )
    extras = (
        (name, _state(extra["missing"]), extra["gives"]) for name, extra in found["extras"].items()
    )
    return "\n\n".join(
        (
            _table(f"Python {found['python']}, {found['platform']}", versions),
            _table("Devices", devices),
            _table("Backends", backends),
            _table("Extras (pip install 'unilogit-kernels[NAME]')", extras),
        )
    )


def _table(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])


def _state(missing: Sequence[str]) -> str:
    return f"lacks {', '.join(missing)}" if missing else "installed"


def _details(device: dict[str, Any]) -> list[str]:
    return [f"{k} {v}" for k, v in device.items() if k not in ("device", "name")]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {
        "device": "cpu",
        "name": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cuda(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
