"""Compiled kernels on disk, one file each.

A file is complete or not there: it is written beside its place and moved into it. So processes that
compile the same kernel at the same time replace each other's equal files, and none waits.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path

DIRECTORY_VARIABLE = "UNILOGIT_KERNELS_CACHE"
"""Environment variable that names another folder for compiled kernels."""

_CHECKSUM_BYTES = hashlib.sha256().digest_size


def directory() -> Path:
    """Where compiled kernels are kept: `$UNILOGIT_KERNELS_CACHE`, or the user's cache."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen:
        return Path(chosen)
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / "unilogit_kernels"
    return Path.home() / ".cache" / "unilogit_kernels"


def read(key: str) -> bytes | None:
    """What was written under this key; None if nothing was, or if it is not what was written."""
    try:
        content = (directory() / key).read_bytes()
    except OSError:
        return None
    checksum, data = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    return data if hashlib.sha256(data).digest() == checksum else None


def write(key: str, data: bytes) -> None:
    """Keep `data` under a key that is a file name; where that is impossible, warn once."""
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{key}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            Path(name).replace(folder / key)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        _warn_once(str(folder), str(error))


@cache
def _warn_once(folder: str, error: str) -> None:
    warnings.warn(
        f"compiled CUDA kernels cannot be kept in {folder} ({error}): every process compiles them "
        f"anew; name a folder that can be written in {DIRECTORY_VARIABLE}",
        stacklevel=3,
    )
