"""Benchmarks by name."""

from __future__ import annotations

from pathlib import Path

from unilogit_kernels.unlearning.benchmarks.sets import Benchmark
from unilogit_kernels.unlearning.rows import DataError


def load_benchmark(name: str, data_dir: Path) -> Benchmark:
    """Read a benchmark from local files.

    Args:
        name: such as `"tofu:forget10"`.
        data_dir: the folder that holds its files.

    Raises:
        DataError: no such benchmark, or a file without which nothing is left to train on or to
            evaluate.
    """
    raise DataError(f"there is no benchmark {name!r} ({data_dir})")
