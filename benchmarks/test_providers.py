"""The harness's providers under pytest-benchmark: `pytest benchmarks`.

For ratios use `unilogit bench`, which alternates the providers; this suite is for looking at one of
them closely (`-k`) and for tracking it over time (`--benchmark-autosave`, `--benchmark-compare`).
"""

from __future__ import annotations

from functools import cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from unilogit_kernels.bench.devices import Device, find_device
from unilogit_kernels.bench.measure import (
    ROUNDS,
    SLOW_ROUNDS,
    SLOW_SECONDS,
    Measurement,
    take_first_step,
)
from unilogit_kernels.bench.oracle import Oracle
from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.provider import Provider
from unilogit_kernels.bench.providers import providers
from unilogit_kernels.bench.suites import targets

CASES = [(shape, provider) for shape in targets("cpu") for provider in providers(shape.entry)]


@cache
def _problem(shape: Shape) -> tuple[Problem, Oracle, Device]:
    _problem.cache_clear()
    problem = Problem(shape)
    return problem, Oracle(problem), find_device("cpu")


@pytest.mark.parametrize(
    ("shape", "provider"), CASES, ids=lambda x: x.title if isinstance(x, Shape) else x.name
)
def test_forward_and_backward(
    benchmark: BenchmarkFixture, shape: Shape, provider: Provider
) -> None:
    measurement = Measurement(provider.name, provider.loss)
    job = take_first_step(provider, *_problem(shape), measurement)
    if job is None:
        pytest.skip(measurement.missing or "")
    benchmark.group = shape.title
    benchmark.extra_info["loss_error"] = measurement.loss_error
    benchmark.extra_info["gradient_error"] = measurement.gradient_error
    slow = (measurement.first_call_s or 0) > SLOW_SECONDS and not provider.compiles
    benchmark.pedantic(lambda: job.backward(job.forward()), rounds=SLOW_ROUNDS if slow else ROUNDS)
