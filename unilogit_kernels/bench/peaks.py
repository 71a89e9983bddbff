"""Peak memory of one step, beyond inputs and gradients.

On a CPU the peak is the high-water mark of the resident set of a fresh process, this module's
`main`; on a GPU that of torch's allocator.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict

import torch

from unilogit_kernels.backends.memory import release
from unilogit_kernels.bench.devices import Device, find_device
from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.provider import MODES, Provider
from unilogit_kernels.bench.providers import providers

_TIMEOUT_S = 600
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""glibc gives larger blocks back when they are freed, so that the mark starts from what is used."""


def peak_mib(shape: Shape, device: Device, mode: str, provider: Provider) -> float:
    """Growth of the high-water mark over one step, less the gradients, in MiB.

    A step on a sliver of the same problem goes first, or on the whole problem where the provider
    compiles, so that libraries, thread pools and compiled code do not count.

    Args:
        shape: The problem.
        device: Where.
        mode: `"forward"`, or else the whole step is meant.
        provider: Whose step.
    """
    problem = Problem(shape, device.type)

    def step(job_problem: Problem) -> None:
        job = provider.prepare(job_problem)
        if mode == "forward":
            with torch.no_grad():
                job.forward()
        else:
            job.backward(job.forward())

    step(problem if provider.compiles else problem.sliver(2))
    gradients = 0 if mode == "forward" else shape.gradient_bytes
    return growth_mib(lambda: step(problem), device) - gradients / 2**20


def growth_mib(step: Callable[[], object], device: Device) -> float:
    """Growth of the high-water mark over one step, in MiB.

    Args:
        step: What is run, once; on a CPU in a process that has run little else.
        device: Where.
    """
    if device.type == "cpu":
        _give_back()
    before = device.start_peak()
    step()
    return (device.peak() - before) / 2**20


def peak_of_fresh_process(shape: Shape, device: str, mode: str, provider: str) -> float:
    """`peak_mib` of a provider, by name, in a process of its own.

    Raises:
        RuntimeError: The process failed; the last line of its errors is told.
    """
    arguments = ["--shape", json.dumps(asdict(shape)), "--provider", provider]
    arguments += ["--device", device, "--mode", mode]
    return told_by_fresh_process("unilogit_kernels.bench.peaks", *arguments)


def told_by_fresh_process(module: str, *arguments: str) -> float:
    """The last number that a module prints, whose process gives freed memory back.

    Args:
        module: Run as `python -m`.
        arguments: Of its command line.

    Raises:
        RuntimeError: The process failed; the last line of its errors is told.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            env={**os.environ, **_MALLOC},
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took more than {_TIMEOUT_S} s") from error
    if result.returncode != 0:
        said = result.stderr.strip().splitlines() or ["nothing"]
        raise RuntimeError(f"its process ended with {result.returncode}: {said[-1]}")
    return float(result.stdout.split()[-1])


def _give_back() -> None:
    """Return what is free to the system: memory that a first step left behind would hide a peak."""
    release()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    """Print the peak of one provider on one problem."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    shape = Shape(**options.shape)
    provider = next(p for p in providers(shape.entry) if p.name == options.provider)
    print(peak_mib(shape, find_device(options.device), options.mode, provider))


if __name__ == "__main__":
    main()
