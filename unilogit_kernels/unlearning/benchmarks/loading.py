"""Benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from unilogit_kernels.unlearning.benchmarks.files import Files
from unilogit_kernels.unlearning.benchmarks.muse import read_muse
from unilogit_kernels.unlearning.benchmarks.rwku import read_rwku
from unilogit_kernels.unlearning.benchmarks.sets import Benchmark
from unilogit_kernels.unlearning.benchmarks.tofu import read_tofu
from unilogit_kernels.unlearning.benchmarks.wmdp import read_wmdp
from unilogit_kernels.unlearning.records import DataError

_READERS: Mapping[str, Callable[[str, str, Files], Benchmark]] = {
    "tofu": read_tofu,
    "muse-news": read_muse,
    "muse-books": read_muse,
    "rwku": read_rwku,
    "wmdp": read_wmdp,
}


def benchmark_names() -> list[str]:
    """The benchmarks that there are, without their splits."""
    return sorted(_READERS)


def load_benchmark(name: str, data_dir: Path) -> Benchmark:
    """Read a benchmark from local files.

    Args:
        name: with its split, if it has any: `"tofu:forget10"`, `"muse-news"`,
            `"muse-books:scal_2"`, `"rwku:1_Stephen_King"`, `"wmdp:bio"`.
        data_dir: the folder that holds its files.

    Raises:
        DataError: no such benchmark or split, a file that it cannot do without is not there, or
            one cannot be read.
    """
    kind, _, split = name.partition(":")
    if kind not in _READERS:
        known = ", ".join(benchmark_names())
        raise DataError(
            f"benchmark must be one of {known}, with its split after a colon, got {name!r}"
        )
    if not data_dir.is_dir():
        raise DataError(f"the data of benchmark {name!r}: {data_dir} is no folder")
    return _READERS[kind](name, split, Files(data_dir))
