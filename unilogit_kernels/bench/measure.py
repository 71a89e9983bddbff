"""Times that alternate, errors against float64, and peak memory of a fresh process."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.providers import OURS, Provider, Step, providers


@dataclass(frozen=True)
class Measurement:
    """One provider on one problem.

    Attributes:
        provider: Its name.
        loss: What it computed.
        milliseconds: Times of forward and backward together, one per round.
        relative_to_ours: Median over the rounds of its time divided by ours in the same round.
        loss_error: Relative error of the loss against float64, or None for a floor.
        gradient_error: Largest relative error (Frobenius) of a gradient against float64.
        peak_mib: Peak resident memory of a fresh process beyond inputs and gradients, in MiB.
        missing: Why it did not run.
    """

    provider: str
    loss: str
    milliseconds: list[float]
    relative_to_ours: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    peak_mib: float | None = None
    missing: str | None = None

    @property
    def median(self) -> float:
        """Median time in milliseconds."""
        return statistics.median(self.milliseconds)


def measure(
    shape: Shape, *, rounds: int = 7, memory: bool = True, only: Sequence[str] = ()
) -> list[Measurement]:
    """Run every provider of the shape's entry in turn, `rounds` times.

    Args:
        shape: The problem.
        rounds: Counted rounds, after one that is not.
        memory: Whether to measure peak memory too, each provider in a process of its own.
        only: Names of the providers beside ours, or nothing for all of them.
    """
    problem = Problem(shape)
    steps: dict[str, Step] = {}
    errors: dict[str, tuple[float, float] | None] = {}
    missing: dict[str, str] = {}
    everybody = [p for p in providers(shape.entry) if not only or p.name in (OURS, *only)]
    for provider in everybody:
        reason = provider.missing()
        if reason is None:
            try:
                step = provider.prepare(problem)
                errors[provider.name] = _errors(provider, problem, step())
                steps[provider.name] = step
                continue
            except Exception as error:  # a peer's failure is a result, not the end of the run
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        missing[provider.name] = reason
    times = _alternate(steps, rounds)
    results = []
    for provider in everybody:
        name = provider.name
        loss_error, gradient_error = errors.get(name) or (None, None)
        measures_memory = (
            memory and provider.loss != "floor" and name in times and "compiled" not in name
        )
        results.append(
            Measurement(
                name,
                provider.loss,
                times.get(name, []),
                _ratio(times, name),
                loss_error,
                gradient_error,
                _peak_in_fresh_process(shape, name) if measures_memory else None,
                missing.get(name),
            )
        )
    return results


def _alternate(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _ratio(times: dict[str, list[float]], name: str) -> float | None:
    if name not in times or OURS not in times:
        return None
    return statistics.median(
        theirs / ours for theirs, ours in zip(times[name], times[OURS], strict=True)
    )


def _errors(
    provider: Provider, problem: Problem, result: tuple[Tensor, list[Tensor]] | None
) -> tuple[float, float] | None:
    if result is None:
        return None
    loss, gradients = result
    exact_loss, exact_gradients = problem.exact[provider.loss]
    loss_error = abs(loss.item() - exact_loss.item()) / abs(exact_loss.item())
    return loss_error, max(
        ((ours.double() - exact).norm() / exact.norm()).item()
        for ours, exact in zip(gradients, exact_gradients, strict=True)
    )


def _peak_in_fresh_process(shape: Shape, provider: str) -> float | None:
    command = [sys.executable, "-m", "unilogit_kernels.bench.measure"]
    arguments = ["--shape", json.dumps(asdict(shape)), "--provider", provider]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    return float(result.stdout.split()[-1]) if result.returncode == 0 else None


def _status(field: str) -> int:
    """A field of this process's memory status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def peak_beyond_inputs_and_gradients(shape: Shape, provider: Provider) -> float:
    """Growth of the resident set's high-water mark over one step, less the gradients, in MiB.

    A step on a sliver of the same problem goes first, so that libraries, thread pools and compiled
    code do not count. Linux only.
    """
    sliver = Shape(2, shape.vocab_size, shape.dtype, shape.h, shape.frozen_head)
    provider.prepare(Problem(sliver))()
    problem = Problem(shape)
    step = provider.prepare(problem)
    gradients = sum(x.nbytes for x in problem.trained)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before - gradients) / 2**20


def main() -> None:
    """Print the peak of one provider on one problem; for a fresh process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--provider", required=True)
    arguments = parser.parse_args()
    shape = Shape(**arguments.shape)
    provider = next(p for p in providers(shape.entry) if p.name == arguments.provider)
    print(peak_beyond_inputs_and_gradients(shape, provider))


if __name__ == "__main__":
    main()
