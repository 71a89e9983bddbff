"""How fast: this package beside torch, other packages and bounds, at shapes in order of value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_session.cases import Case, Report
from benchmarks.gpu_session.target import Target
from unilogit_kernels.bench import report as reports
from unilogit_kernels.bench.devices import Device
from unilogit_kernels.bench.measure import Measurement, Options, measure
from unilogit_kernels.bench.problems import Shape

COMPILED = ("compiled", "torch_compile")
"""Parts of the names of those that torch compiles, which takes most of a minute: they come last."""
_ROUNDS, _ROUNDS_SECONDS = 5, 8.0
_CASE_SECONDS, _COMPILED_SECONDS = 90.0, 240.0
_GEMM_SIZE, _COPY_BYTES, _RATE_ROUNDS = 8192, 4 << 30, 12


def cases(target: Target) -> list[Case]:
    """Rates of the machine, everybody but the compiled, then these."""
    shapes = target.shapes()
    found = [Case("rates", partial(_rates, target))]
    for shape in shapes:
        run = partial(_measure, target, shape, Options(_ROUNDS, skip=COMPILED))
        found.append(Case(shape.title, run, _CASE_SECONDS))
    for shape in [] if target.rehearses else shapes:
        run = partial(_measure, target, shape, Options(_ROUNDS, only=COMPILED))
        found.append(Case(f"{shape.title}, compiled", run, _COMPILED_SECONDS))
    return found


def _measure(target: Target, shape: Shape, options: Options, report: Report) -> dict[str, Any]:
    device = target.timer()

    def note(found: Sequence[Measurement]) -> None:
        report([asdict(each) for each in found])

    rounds = target.rounds(options.rounds)
    options = Options(rounds, "both", "all", _ROUNDS_SECONDS, options.only, options.skip)
    found = measure(shape, device, options, note=note)
    return {
        "title": shape.title,
        "clocks": _clocks(device),
        "columns": reports.COLUMNS,
        "cells": reports.rows(found),
        "measurements": [asdict(each) for each in found],
    }


def _clocks(device: Device) -> dict[str, Any]:
    """As they are right after the work."""
    return {name: value for name, value in device.facts().items() if name.startswith("clocks")}


def _rates(target: Target, report: Report) -> dict[str, Any]:
    """What GEMMs and a copy reach here: what all times are held against."""
    size = _GEMM_SIZE if not target.rehearses else 64
    elements = (_COPY_BYTES if not target.rehearses else 1 << 16) // 2
    a, b = (torch.randn(size, size, device=target.device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    runs: dict[str, Callable[[], Any]] = {
        "bfloat16 GEMM": lambda: torch.mm(a, b.t(), out=product),
    }
    if not target.rehearses:
        wide = product.float()
        aten = torch.ops.aten
        runs["bfloat16 GEMM into float32"] = lambda: aten.mm.dtype_out(
            a, b.t(), torch.float32, out=wide
        )
        runs["bfloat16 GEMM added to float32"] = lambda: aten.addmm.dtype_out(
            wide, a, b.t(), torch.float32, out=wide
        )
    found: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            found[f"{name}, TFLOP/s"] = 2e-9 * size**3 / _least(target, run)
        except RuntimeError as error:  # of torch without that GEMM
            found[name] = str(error).splitlines()[0]
    source = torch.randn(elements, device=target.device).bfloat16()
    copy = torch.empty_like(source)
    found["copy, TB/s"] = 2e-9 * source.nbytes / _least(target, lambda: copy.copy_(source))
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}


def _least(target: Target, run: Callable[[], Any]) -> float:
    """Milliseconds."""
    timer = target.timer()
    return min(timer.time(run)[0] for _ in range(target.rounds(_RATE_ROUNDS)))
