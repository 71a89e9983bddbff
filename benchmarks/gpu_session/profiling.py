"""Where a step's time goes: on the host, on the device, and in between."""

from __future__ import annotations

import csv
import io
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_session.cases import Case, Missing, Report
from benchmarks.gpu_session.one_step import large
from benchmarks.gpu_session.target import Target
from benchmarks.gpu_session.timeline import Event, describe
from unilogit_kernels import LinearOptions, explain_plan, linear_unilogit_loss
from unilogit_kernels.bench.problems import Problem, Shape

_STEPS, _HOST_STEPS = 3, 5
_NCU_SECONDS = 150.0
_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
_MOST_KERNELS = 25


def cases(target: Target) -> list[Case]:
    """Kernels and host time of steps, a graph, then hardware counters."""
    shapes = _shapes(target)
    found = [Case(f"step: {shape.title}", partial(_step, target, shape)) for shape in shapes]
    linear = next(shape for shape in shapes if shape.h is not None)
    found.append(Case(f"graph: {linear.title}", partial(_graph, target, linear)))
    found += [
        Case(f"ncu: {what}", partial(_ncu, target, what), _NCU_SECONDS)
        for what in ("logits", "linear")
    ]
    return found


def _shapes(target: Target) -> list[Shape]:
    if target.rehearses:
        return list(target.shapes())[:2]
    v, h = 128_256, 4096
    return [
        Shape(8192, v, "bfloat16", h),
        Shape(8192, v, "bfloat16", h, frozen_head=True),
        Shape(8192, v, "bfloat16"),
        Shape(8, v, "bfloat16"),
    ]


def _synchronise(target: Target) -> None:
    if not target.rehearses:
        torch.cuda.synchronize()


# ---- a step ------------------------------------------------------------------------------------


def _step(target: Target, shape: Shape, report: Report) -> dict[str, Any]:
    with target.launching("triton", "whole rows"):
        step = large(shape, "triton" if target.rehearses else None, target.device)
        for _ in range(target.rounds(2)):
            step()
        _synchronise(target)
        timer, rounds = target.timer(), range(target.rounds(_HOST_STEPS))
        found: dict[str, Any] = {
            "host_ms": round(statistics.median(_host(target, step) for _ in rounds), 3),
            "step_ms": round(statistics.median(timer.time(step)[0] for _ in rounds), 3),
        }
        found.update(_plan_of(shape))
        report([found])
        steps = target.rounds(_STEPS)
        found.update(describe(_events(target, step, steps), steps))
    found["kernels"] = found["kernels"][:_MOST_KERNELS]
    return found


def _host(target: Target, step: Any) -> float:
    """Milliseconds until a step has been handed to the device, which had nothing to do."""
    _synchronise(target)
    start = time.perf_counter()
    step()
    milliseconds = 1e3 * (time.perf_counter() - start)
    _synchronise(target)
    return milliseconds


def _plan_of(shape: Shape) -> dict[str, Any]:
    if shape.h is None:
        return {}
    plan = explain_plan(
        shape.n, shape.h, shape.vocab_size, train_weight=not shape.frozen_head, device="cuda"
    )
    return {"planned_launches": plan.launches, "planned_gemms": round(plan.gemms, 3)}


def _events(target: Target, step: Any, steps: int) -> list[Event]:
    """Of the device, of a few steps; in a rehearsal what torch does on the CPU stands in."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if target.rehearses else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        _synchronise(target)
    wanted = DeviceType.CPU if target.rehearses else DeviceType.CUDA
    return [
        Event(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted
    ]


# ---- a graph -----------------------------------------------------------------------------------


def _graph(target: Target, shape: Shape, report: Report) -> dict[str, Any]:
    """A fused step in a CUDA graph takes what the device takes: the rest is the host's."""
    problem, options = Problem(shape, target.device), LinearOptions(compact=False)

    def step() -> tuple[Tensor, ...]:
        hidden, weight = problem.operands
        loss = linear_unilogit_loss(hidden, weight, problem.labels, options=options)
        return (loss.detach(), *torch.autograd.grad(loss, problem.trained))

    if target.rehearses:
        raise Missing("needs a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    equal = all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    assert equal, "a replayed graph gives something else"
    timer = target.timer()
    return {
        "eager_ms": statistics.median(timer.time(step)[0] for _ in range(_HOST_STEPS)),
        "replayed_ms": statistics.median(timer.time(graph.replay)[0] for _ in range(_HOST_STEPS)),
    }


# ---- hardware counters -------------------------------------------------------------------------


def _ncu(target: Target, what: str, report: Report) -> dict[str, Any]:
    """Bytes that kernels move to and from memory, by their names."""
    tool = shutil.which("ncu")
    if tool is None:
        raise Missing("ncu is not on PATH")
    command = [tool, "--csv", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--metrics", ",".join(_METRICS), "--launch-count", "60"]
    command += [sys.executable, "-m", "benchmarks.gpu_session.one_step", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = read_counters(done.stdout)
    if not rows:
        raise RuntimeError(f"ncu counted nothing: {(done.stdout + done.stderr)[-1000:]}")
    return {"kernels": rows}


def read_counters(text: str) -> list[dict[str, Any]]:
    """Sums by kernel of what `ncu --csv` prints, a line for each launch and metric."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    launches: dict[str, set[str]] = defaultdict(set)
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        value = (row.get("Metric Value") or "").replace(",", "")
        try:
            number = float(value) * _UNITS.get(row.get("Metric Unit") or "", 1.0)
        except ValueError:
            continue
        sums[row["Kernel Name"]][row["Metric Name"]] += number
        launches[row["Kernel Name"]].add(row["ID"])
    return [
        {"name": name, "launches": len(launches[name]), **metrics} for name, metrics in sums.items()
    ]


_UNITS = {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "us": 1e3, "usecond": 1e3, "ms": 1e6}
"""Of bytes and nanoseconds."""
