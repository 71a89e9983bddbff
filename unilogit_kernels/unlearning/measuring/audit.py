"""A record of an evaluation for those who have to answer for it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import unilogit_kernels
from unilogit_kernels.unlearning.measuring.set_metrics import Metric

STATEMENT = (
    "These measurements say how a model behaves on the rows named here. They are no proof that "
    "what the rows hold has been erased from its weights: other questions, fine-tuning or "
    "inspection of the weights may bring it back."
)

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "rouge-score",
    "nltk",
    "regex",
)


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over the Python files of this package, their names included, in order.

    Two builds of one version number differ in it if their code does.
    """
    hashed = hashlib.sha256()
    root = Path(unilogit_kernels.__file__).parent
    for path in sorted(root.rglob("*.py")):
        hashed.update(path.relative_to(root).as_posix().encode() + b"\0")
        hashed.update(path.read_bytes() + b"\0")
    return hashed.hexdigest()


def estimates(found: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """Aggregates with their intervals, by name, for JSON."""
    return {name: metric.estimate._asdict() for name, metric in found.items()}


def audit_record(
    *,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    files: Mapping[str, str],
    model: str,
    found: Mapping[str, Metric],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """What was measured, of what, with what, and what it does not say.

    Args:
        settings: what was asked for.
        inputs: digests of what was measured, as `record.digests` has them: rows as they were
            encoded, weights as they were loaded.
        files: SHA-256 of the model's files by name.
        model: directory or Hub id.
        found: the metrics.
        missing: what could not be computed, and why.
    """
    return {
        "statement": STATEMENT,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model,
        "model_files_sha256": dict(files),
        "inputs": dict(inputs),
        "settings": dict(settings),
        "code": {"unilogit-kernels": unilogit_kernels.__version__, "sha256": code_digest()},
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "metrics": estimates(found),
        "not_computed": dict(missing),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
