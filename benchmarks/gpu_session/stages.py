"""The stages: their shares of the time, and where their cases come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from benchmarks.gpu_session import (
    entries,
    hard,
    kernels,
    machine,
    profiling,
    speed,
    suite,
    tuning,
)
from benchmarks.gpu_session.cases import Case, Missing, in_turns
from benchmarks.gpu_session.target import Target


@contextmanager
def target(*, rehearse: bool) -> Iterator[Target]:
    """What to run on."""
    if not rehearse:
        yield Target()
        return
    from benchmarks.gpu_session.rehearsal import rehearsal

    with rehearsal() as stand_in:
        yield stand_in


def cases(stage: str, on: Target) -> Sequence[Case]:
    """Those of a stage, in order of value."""
    missing = on.missing()
    if missing is not None:
        return [Case("a GPU", lambda report: _raise(Missing(missing)))]
    return on.chosen(_CASES[stage](on))


def _raise(error: Exception) -> dict[str, object]:
    raise error


def _right(on: Target) -> list[Case]:
    """Kernels and losses in turns, as far as pairs of flags go; the tests; then all else."""
    _, pairs, beyond = kernels.cases(on)
    some = [*hard.cases(on), *entries.cases(on)]
    return [*in_turns([pairs, some]), *suite.cases(on), *beyond]


_CASES: dict[str, Callable[[Target], list[Case]]] = {
    "machine": machine.cases,
    "right": _right,
    "speed": speed.cases,
    "compile": tuning.compile_cases,
    "tuning": tuning.cases,
    "profile": profiling.cases,
}
