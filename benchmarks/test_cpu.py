"""The harness's providers under pytest-benchmark: `pytest benchmarks`.

For ratios use `unilogit bench`, which alternates the providers; this suite is for looking at one of
them closely and for tracking it over time (`--benchmark-autosave`, `--benchmark-compare`).
"""

from __future__ import annotations

from functools import cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from unilogit_kernels.bench.problems import Problem, Shape, cpu_shapes
from unilogit_kernels.bench.providers import Provider, providers

CASES = [(shape, provider) for shape in cpu_shapes() for provider in providers(shape.entry)]


@cache
def _problem(shape: Shape) -> Problem:
    _problem.cache_clear()
    return Problem(shape)


@pytest.mark.parametrize(
    ("shape", "provider"), CASES, ids=lambda x: x.title if isinstance(x, Shape) else x.name
)
def test_forward_and_backward(
    benchmark: BenchmarkFixture, shape: Shape, provider: Provider
) -> None:
    reason = provider.missing()
    if reason is not None:
        pytest.skip(reason)
    benchmark.group = shape.title
    benchmark.pedantic(provider.prepare(_problem(shape)), warmup_rounds=1, rounds=7)
