"""Times that alternate, errors against float64, and peak memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unilogit_kernels.bench.devices import Device
from unilogit_kernels.bench.oracle import Oracle
from unilogit_kernels.bench.peaks import peak_mib, peak_of_fresh_process
from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.provider import OURS, Job, Provider
from unilogit_kernels.bench.providers import providers

ROUNDS = 7
"""Counted rounds, at least, of what is fast."""
MOST_ROUNDS = 50
FAST_SECONDS = 2.0
"""Where a round of everybody is short, rounds go on for about so long, up to `MOST_ROUNDS`."""
SLOW_SECONDS, SLOW_ROUNDS = 5.0, 3
"""A step that takes longer is repeated less often."""
VERY_SLOW_SECONDS = 20.0
"""A step that takes longer is run once, so that it does not take the others' rounds: its first run
counts, since what warms up is a small part of it. All others run once before they count."""
PROBES = ((64, 10.0), (8, 30.0))
"""A peer first steps on these parts of the tokens, and does not run if that takes so many seconds.
Its whole step takes up to as many times longer, but less where it has a cost that is fixed."""
NO_PEAK_SECONDS = 60.0
"""The peak of a peer whose step takes longer is not measured."""
SHAPE_SECONDS = 240.0
"""So long after the first steps no further round starts, as long as everybody has had one and ours
`SLOW_ROUNDS`."""
_SPARE = 0.9
"""Share of the free memory that a step may be expected to take."""


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        rounds: Counted rounds, after one step that is not.
        mode: One of `providers.MODES`.
        memory: Of whom to measure peak memory too: `"all"`, `"ours"` or `"none"`.
        seconds: When to stop adding rounds, see `SHAPE_SECONDS`.
        only: Parts of names of the providers to run beside ours; empty for all.
        skip: Parts of names of providers to leave out.
        compilers: Whether providers run whose first call compiles, which takes many seconds.
    """

    rounds: int = ROUNDS
    mode: str = "both"
    memory: str = "all"
    seconds: float = SHAPE_SECONDS
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    compilers: bool = True

    def wants(self, provider: Provider) -> bool:
        """Whether a provider is to run."""
        name = provider.name.lower()
        if provider.is_ours:
            return True
        if provider.compiles and not self.compilers:
            return False
        if any(part.lower() in name for part in self.skip):
            return False
        return not self.only or any(part.lower() in name for part in self.only)


@dataclass
class Measurement:
    """One provider on one problem.

    Attributes:
        provider: Its name.
        loss: What it computed.
        mode: What was timed.
        milliseconds: Times, one per round.
        relative_to_ours: Median over common rounds of its time divided by ours in the same round;
            ours is the one with the same loss, and Unilogit for a bound.
        loss_error: Relative error of the loss against float64, or None for a bound.
        gradient_error: Largest relative error (Frobenius) of a gradient against float64.
        peak_mib: Peak memory beyond inputs and gradients, in MiB.
        first_call_s: Seconds of the first step, compilation included.
        missing: Why it did not run.
        memory_missing: Why its peak was not measured.
    """

    provider: str
    loss: str
    mode: str = "both"
    milliseconds: list[float] = field(default_factory=list)
    relative_to_ours: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    peak_mib: float | None = None
    first_call_s: float | None = None
    missing: str | None = None
    memory_missing: str | None = None

    @property
    def median(self) -> float:
        """Median time in milliseconds."""
        return statistics.median(self.milliseconds)


@dataclass
class _Runner:
    """A provider that runs: its measurement so far, how it is timed, and how often it may be."""

    provider: Provider
    measurement: Measurement
    time: Callable[[], float]
    most_rounds: int = MOST_ROUNDS

    @property
    def rounds(self) -> int:
        """Rounds done."""
        return len(self.measurement.milliseconds)

    @property
    def must_go_on(self) -> bool:
        """Whether it needs more rounds even when time is up."""
        return self.rounds < (min(SLOW_ROUNDS, self.most_rounds) if self.provider.is_ours else 1)

    def run(self) -> None:
        """One round."""
        self.measurement.milliseconds.append(self.time())
        if self.measurement.milliseconds[-1] > 1e3 * SLOW_SECONDS:
            self.most_rounds = min(self.most_rounds, SLOW_ROUNDS)


def measure(
    shape: Shape,
    device: Device,
    options: Options,
    progress: Callable[[str], None] = lambda line: None,
    note: Callable[[Sequence[Measurement]], None] = lambda found: None,
) -> list[Measurement]:
    """Run every provider of the shape's entry in turn.

    Args:
        shape: The problem.
        device: Where.
        options: How.
        progress: Told what has been done, as steps can take long.
        note: Given all that is known so far, whenever that is more.

    Returns:
        One measurement for each provider, ours first. All have `missing` if the problem itself does
        not fit into memory.
    """
    everybody = [
        provider
        for provider in providers(shape.entry)
        if options.wants(provider) and options.mode in provider.modes
    ]
    found = [Measurement(p.name, p.loss, options.mode) for p in everybody]
    reason = _too_large(shape.operand_bytes + shape.gradient_bytes, device)
    if reason is not None:
        for measurement in found:
            measurement.missing = reason
        return found
    # What was compiled for other shapes would count against the limit of recompilations.
    torch.compiler.reset()
    _measure_times(shape, device, options, everybody, found, progress, note)
    gc.collect()
    if options.memory != "none":
        progress("times are measured; now peaks of memory")
    for provider, measurement in zip(everybody, found, strict=True):
        wanted = {"all": provider.loss != "floor", "ours": provider.is_ours, "none": False}
        if measurement.missing is None and wanted[options.memory]:
            _measure_peak(shape, device, options.mode, provider, measurement)
            note(found)
    return found


def _measure_times(
    shape: Shape,
    device: Device,
    options: Options,
    everybody: list[Provider],
    found: list[Measurement],
    progress: Callable[[str], None],
    note: Callable[[Sequence[Measurement]], None],
) -> None:
    problem = Problem(shape, device.type)
    oracle = Oracle(problem)
    runners = []
    for provider, measurement in zip(everybody, found, strict=True):
        job = take_first_step(provider, problem, oracle, device, measurement)
        if job is not None:
            runners.append(_Runner(provider, measurement, _timer(job, options.mode, device)))
            progress(f"{provider.name}: first step {measurement.first_call_s:.2f} s")
        else:
            progress(f"{provider.name}: {measurement.missing}")
        note(found)
    for runner in runners:
        first = runner.measurement.first_call_s or 0.0
        if options.mode == "both" and first > VERY_SLOW_SECONDS and not runner.provider.compiles:
            runner.measurement.milliseconds.append(1e3 * first)
            runner.most_rounds = 1

    def after_round() -> None:
        _relate(found)
        note(found)

    _alternate(runners, options.rounds, time.perf_counter() + options.seconds, after_round)
    _relate(found)


def _relate(found: Sequence[Measurement]) -> None:
    """Divide times by ours of the same round."""
    for measurement in found:
        ours = _ours_for(measurement, found)
        pairs = zip(measurement.milliseconds, ours, strict=False)
        ratios = [theirs / mine for theirs, mine in pairs]
        measurement.relative_to_ours = statistics.median(ratios) if ratios else None


def _ours_for(measurement: Measurement, found: Sequence[Measurement]) -> list[float]:
    """Our times for the job that a measurement is compared with."""
    name = OURS.get(measurement.loss, OURS["unilogit"])
    return next((m.milliseconds for m in found if m.provider == name), [])


def _too_slow(provider: Provider, problem: Problem) -> str | None:
    """Whether a peer's step would take too long, from steps on a part of the tokens."""
    if provider.is_ours or provider.loss == "floor" or provider.compiles:
        return None
    n = problem.shape.n
    for part, most_seconds in PROBES:
        tokens = n // part
        if tokens < 2:
            continue
        job = provider.prepare(problem.sliver(tokens))
        start = time.perf_counter()
        job.backward(job.forward())
        seconds = time.perf_counter() - start
        if seconds > most_seconds:
            return f"too slow: {seconds:.1f} s a step for {tokens} of the {n} tokens"
    return None


def take_first_step(
    provider: Provider,
    problem: Problem,
    oracle: Oracle,
    device: Device,
    measurement: Measurement,
) -> Job | None:
    """Run a whole step, whatever the mode, and note its errors and its time.

    Args:
        provider: Whose.
        problem: Of what.
        oracle: Of the problem.
        device: Where.
        measurement: Receives errors and time, or why there are none.

    Returns:
        The job, or None if the provider does not run.
    """
    shape = problem.shape
    reason = provider.unavailable(shape, device.type)
    reason = reason or _too_large(provider.extra_bytes(shape), device)
    try:
        reason = reason or _too_slow(provider, problem)
        if reason is None:
            job = provider.prepare(problem)
            start = time.perf_counter()
            loss = job.forward()
            gradients = job.backward(loss)
            value = None if loss is None else loss.item()  # an accelerator has finished now
            measurement.first_call_s = time.perf_counter() - start
            if value is not None and gradients is not None:
                measurement.loss_error = oracle.loss_error(measurement.loss, value)
                measurement.gradient_error = oracle.gradient_error(measurement.loss, gradients)
            return job
    except Exception as error:  # a peer's failure is a result, not the end of the run
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    measurement.missing = reason
    return None


def _timer(job: Job, mode: str, device: Device) -> Callable[[], float]:
    def forward() -> Tensor | None:
        with torch.no_grad():
            return job.forward()

    def time_backward() -> float:
        loss = job.forward()
        return device.time(lambda: job.backward(loss))[0]

    if mode == "forward":
        return lambda: device.time(forward)[0]
    if mode == "backward":
        return time_backward
    return lambda: device.time(lambda: job.backward(job.forward()))[0]


def _alternate(
    runners: list[_Runner],
    rounds: int,
    deadline: float,
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """Time everybody in turn, so that whatever else the machine does meets all of them.

    Those whose slow first step counts already are one round ahead, and sit out the first.
    """
    goal = rounds
    for done in range(MOST_ROUNDS):
        late = time.perf_counter() > deadline
        for runner in runners:
            wanted = runner.rounds <= done and runner.rounds < min(goal, runner.most_rounds)
            if wanted and (not late or runner.must_go_on):
                runner.run()
        after_round()
        if done == 0:
            together = sum(runner.measurement.milliseconds[0] for runner in runners) / 1e3
            goal = max(rounds, min(MOST_ROUNDS, int(FAST_SECONDS / max(together, 1e-9))))
        if done + 1 >= goal:
            return


def _too_large(needed: int, device: Device) -> str | None:
    free = device.free_bytes()
    if needed <= _SPARE * free:
        return None
    return f"does not fit: about {needed / 2**30:.1f} GiB more, {free / 2**30:.1f} GiB are free"


def _measure_peak(
    shape: Shape, device: Device, mode: str, provider: Provider, measurement: Measurement
) -> None:
    if (measurement.first_call_s or 0) > NO_PEAK_SECONDS and not provider.is_ours:
        measurement.memory_missing = "too slow"
        return
    try:
        if device.peaks_need_a_process:
            measurement.peak_mib = peak_of_fresh_process(shape, device.type, mode, provider.name)
        else:
            measurement.peak_mib = peak_mib(shape, device, mode, provider)
    except RuntimeError as error:
        measurement.memory_missing = str(error)
