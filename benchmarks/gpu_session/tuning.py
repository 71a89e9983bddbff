"""Launch settings of the Triton kernels and sizes of the plan, tried beside today's."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_session.cases import Case, Missing, Report, name_of
from benchmarks.gpu_session.search import Settings, search, singles
from benchmarks.gpu_session.target import Target
from tests.support.caches import forget_layouts
from unilogit_kernels import LinearOptions, explain_plan, linear_unilogit_loss
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import RowKernels, Tile
from unilogit_kernels.bench.problems import DTYPES, Problem, Shape
from unilogit_kernels.fused_linear import plan
from unilogit_kernels.fused_linear.plan import Plan

MIB = 1 << 20
_ROUNDS = 7
_CASE_SECONDS = 120.0

SWEEP_KNOBS: dict[str, Sequence[Any]] = {
    "sweep_warps": (4, 8, 16, 32),
    "LARGEST_TILE": (8192, 16384, 32768),
    "lanes": (8, 16, 32, 64),
    "maxnreg": (None, 48, 64, 80, 128),
}
SPLIT_KNOBS: dict[str, Sequence[Any]] = {
    "split_warps": (1, 2, 4, 8),
    "lanes": (8, 16, 32, 64),
    "maxnreg": (None, 48, 64, 80, 128),
    "resident_warps": (16, 32, 64),
}
"""Fields of `triton.settings.Settings`, one of its options, a constant of `triton.log_odds`, and
what `gpu.sweep_size` returns."""
PLAN_KNOBS: dict[str, Sequence[Any]] = {
    "memory_budget": tuple(MIB * size for size in (256, 512, 1024, 2048, 3072, 4096)),
    "ROWS_WORKING_SHARE": (2, 3, 8),
    "TILE_BYTES": tuple(MIB * size for size in (16, 64, 128, 256)),
    "CHUNK_BYTES": tuple(MIB * size for size in (128, 512, 1024)),
}
"""An option of a call, and constants of `fused_linear.plan`, of which some are by device."""


class Launch(NamedTuple):
    """Rows to launch on, and what may be changed about it."""

    n: int
    v: int
    dtype: str
    knobs: dict[str, Sequence[Any]]

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.n} x {self.v} {self.dtype}"


def launches(target: Target) -> list[Launch]:
    """Sweeps in both dtypes, and rows that are split."""
    if target.rehearses:
        return [Launch(6, 2053, "bfloat16", {"lanes": (8, 16), "sweep_warps": (4,)})]
    return [
        Launch(8192, 128_256, "bfloat16", SWEEP_KNOBS),
        Launch(4096, 128_256, "float32", SWEEP_KNOBS),
        Launch(64, 128_256, "bfloat16", SPLIT_KNOBS),
    ]


def plan_shapes(target: Target) -> list[Shape]:
    """Fused linear steps with a trained lm_head."""
    if target.rehearses:
        return [Shape(6, 301, "bfloat16", 16)]
    return [
        Shape(8192, 128_256, "bfloat16", 4096),
        Shape(8192, 151_936, "bfloat16", 896),
        Shape(2048, 262_144, "bfloat16", 3584),
    ]


def compile_cases(target: Target) -> list[Case]:
    """Launch every setting once, by many processes, which leaves it in Triton's cache."""
    return [
        Case(
            name_of("compile", launch.title, **settings),
            partial(_launch_once, target, launch, settings),
        )
        for launch in launches(target)
        for settings in singles(launch.knobs)
    ]


def cases(target: Target) -> list[Case]:
    """The plan's sizes and the launches in turns, the largest shape of each first."""
    found = []
    for i in range(3):
        for kind, shapes, run in (
            ("plan", plan_shapes(target), _tune_plan),
            ("launch", launches(target), _tune_launch),
        ):
            if i < len(shapes):
                shape: Any = shapes[i]
                case = partial(run, target, shape)
                found.append(Case(f"{kind}: {shape.title}", case, _CASE_SECONDS))
    return found


# ---- launches ----------------------------------------------------------------------------------


def _sweep(target: Target, launch: Launch) -> Callable[[], None]:
    n, v, dtype, _ = launch
    problem = Problem(Shape(n, v, dtype), target.device)
    logits, weight = problem.operands[0].detach(), torch.ones(n, device=target.device)
    out = torch.empty_like(logits)
    kernels: RowKernels = registry.load("triton")
    return lambda: _ignore(
        kernels.log_odds_sweep(Tile(logits, problem.labels), weight, "unilogit", v, out)
    )


def _ignore(value: object) -> None:
    pass


def _launch_once(
    target: Target, launch: Launch, settings: Settings, report: Report
) -> dict[str, Any]:
    _need_triton(target)
    with target.launching("triton", "whole rows"), launch_settings(settings):
        _sweep(target, launch)()
    return {}


def _tune_launch(target: Target, launch: Launch, report: Report) -> dict[str, Any]:
    _need_triton(target)
    with target.launching("triton", "whole rows"):
        step = _sweep(target, launch)

        def milliseconds(settings: Settings) -> float:
            with launch_settings(settings):
                return _median(target, step)

        return search(launch.knobs, milliseconds, report)


def _need_triton(target: Target) -> None:
    missing = target.backends()["triton"]
    if missing is not None:
        raise Missing(missing)


@contextmanager
def launch_settings(changes: Settings) -> Iterator[None]:
    """Launch by other settings inside, see `SWEEP_KNOBS`."""
    from unilogit_kernels.backends import gpu
    from unilogit_kernels.backends.triton import log_odds
    from unilogit_kernels.backends.triton import settings as module

    changes = dict(changes)
    constants = {name: changes.pop(name) for name in list(changes) if name.isupper()}
    today = module.current_settings()
    sweep_size = gpu.sweep_size
    if "sweep_warps" in changes:
        warps = changes.pop("sweep_warps")
        sweep_size = lambda *sizes, **more: warps  # noqa: E731
    if "maxnreg" in changes:
        options = {k: v for k, v in today.options.items() if k != "maxnreg"}
        registers = changes.pop("maxnreg")
        changes["options"] = options if registers is None else {**options, "maxnreg": registers}
    if "lanes" in changes:
        changes["capped_lanes"] = min(today.capped_lanes, changes["lanes"])
    now = dataclasses.replace(today, **changes)
    with (
        replaced(module, "current_settings", lambda: now),
        replaced(gpu, "sweep_size", sweep_size),
        _constants(log_odds, constants),
    ):
        yield


@contextmanager
def _constants(module: ModuleType, values: Settings) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values if hasattr(module, name)}
    unknown = sorted(set(values) - set(before))
    if unknown:
        raise Missing(f"{module.__name__} has no {', '.join(unknown)} any more")
    for name, value in values.items():
        setattr(module, name, value)
    forget_layouts()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
        forget_layouts()


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Another value under a module's name, inside."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


# ---- the plan ----------------------------------------------------------------------------------


def _tune_plan(target: Target, shape: Shape, report: Report) -> dict[str, Any]:
    problem = Problem(shape, target.device)
    backend = "triton" if target.backends()["triton"] is None else None
    known: dict[Plan, float] = {}

    def milliseconds(settings: Settings) -> float:
        again = not settings
        settings = dict(settings)
        options = LinearOptions(memory_budget=settings.pop("memory_budget", None))

        def step() -> None:
            hidden, weight = problem.operands
            loss = linear_unilogit_loss(
                hidden, weight, problem.labels, backend=backend, options=options
            )
            torch.autograd.grad(loss, problem.trained)

        with plan_sizes(settings):
            plan_now = _plan_of(shape, options, target.device)
            # Of settings that change nothing, only today's are timed twice.
            if again or plan_now not in known:
                known[plan_now] = _median(target, step)
            return known[plan_now]

    with target.launching("triton", "whole rows"):
        knobs = {"memory_budget": (MIB,), "TILE_BYTES": (MIB,)} if target.rehearses else PLAN_KNOBS
        return search(knobs, milliseconds, report)


def _plan_of(shape: Shape, options: LinearOptions, device: str) -> Plan:
    assert shape.h is not None
    return explain_plan(
        shape.n,
        shape.h,
        shape.vocab_size,
        dtype=DTYPES[shape.dtype],
        device=device,
        train_weight=not shape.frozen_head,
        options=options,
    ).plan


@contextmanager
def plan_sizes(changes: Settings) -> Iterator[None]:
    """Plan with other sizes inside, see `PLAN_KNOBS`."""
    values = dict(changes)
    for name, size in changes.items():
        today = getattr(plan, name, None)
        if isinstance(today, dict):
            values[name] = {**today, "cuda": size}
    with _constants(plan, values):
        yield


def _median(target: Target, step: Callable[[], None]) -> float:
    """Milliseconds, after one step that is not counted."""
    timer = target.timer()
    step()
    return statistics.median(timer.time(step)[0] for _ in range(target.rounds(_ROUNDS)))
