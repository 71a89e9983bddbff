"""Where the rows of a run come from: files, or a benchmark."""

from __future__ import annotations

from pathlib import Path

from unilogit_kernels.unlearning.alternates import with_alternates
from unilogit_kernels.unlearning.benchmarks import Benchmark, load_benchmark
from unilogit_kernels.unlearning.checks import takes_retain_rows
from unilogit_kernels.unlearning.errors import RunError, reading
from unilogit_kernels.unlearning.methods import ALTPO
from unilogit_kernels.unlearning.rows import Row, read_refusals, read_rows
from unilogit_kernels.unlearning.settings import Settings

LEARNED = "data"
"""Name of the rows that a fine-tuning learns."""


def read_sets(settings: Settings) -> dict[str, list[Row]]:
    """The rows of a run.

    Args:
        settings: of the run, checked.

    Returns:
        By name: `"forget"`, `"retain"` and `"refusal"`, of which the last two may be empty; or
        `"data"` alone, where rows are learned and none forgotten: those of the files, then the
        benchmark's.

    Raises:
        DataError: a file cannot be read, or holds no rows.
        RunError: the benchmark has no such rows.
    """
    benchmark = _benchmark(settings)
    if settings.task == "finetune":
        learned = [row for path in settings.data for row in _rows("data", path, None)]
        if benchmark is not None:
            parts = ("retain", "known", "forget") if settings.with_forget else ("retain", "known")
            learned += [row for part in parts for row in benchmark.training.get(part, ())]
            if not learned:
                learned = _of(benchmark, "retain")
        return {LEARNED: learned}
    forget = _rows("forget", settings.forget, benchmark)
    retain = _rows("retain", settings.retain, benchmark) if takes_retain_rows(settings) else []
    with reading("--refusals"):
        refusals = [] if settings.refusals is None else read_refusals(settings.refusals, forget)
    if settings.method == ALTPO:
        forget, refusals = with_alternates(forget)
    return {"forget": forget, "retain": retain, "refusal": refusals}


def _benchmark(settings: Settings) -> Benchmark | None:
    if settings.benchmark is None or settings.data_dir is None:
        return None
    with reading(f"--benchmark {settings.benchmark}"):
        return load_benchmark(settings.benchmark, settings.data_dir)


def _rows(name: str, path: Path | None, benchmark: Benchmark | None) -> list[Row]:
    if path is not None:
        with reading(f"--{name}"):
            return read_rows(path)
    assert benchmark is not None  # As `Settings.check` has seen.
    return _of(benchmark, name)


def _of(benchmark: Benchmark, name: str) -> list[Row]:
    rows = benchmark.training.get(name, ())
    if not rows:
        lacking = "; ".join(f"{path}: {without}" for path, without in benchmark.missing.items())
        raise RunError(
            f"benchmark {benchmark.name!r} has no {name} rows here: name a file of them "
            f"(missing: {lacking or 'nothing'})"
        )
    return list(rows)
