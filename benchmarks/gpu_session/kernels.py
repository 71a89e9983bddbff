"""Every kernel of both backends with every flag, dtype and layout: the cases, in order of value."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks.gpu_session import pairs, rows
from benchmarks.gpu_session.cases import (
    Case,
    Combination,
    Missing,
    Report,
    in_order_of_value,
    in_turns,
    name_of,
)
from benchmarks.gpu_session.judge import Judge
from benchmarks.gpu_session.target import SHARES, Target
from tests.support.layouts import FEW_LAYOUTS
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.ids import GPU_OBJECTIVES
from unilogit_kernels.bench.problems import DTYPES

_DTYPES, _TRANSFORMS, _CHUNKS = tuple(DTYPES), tuple(rows.TRANSFORMS), (1, 3)
_OUT = ("in place", *_DTYPES)


class Kernel(NamedTuple):
    """A function of a backend, what checks it, and the values of each parameter of that."""

    check: Callable[..., Judge]
    parameters: dict[str, Sequence[Hashable]]


KERNELS = {
    "sweep": Kernel(
        rows.check_sweep,
        {
            "dtype": _DTYPES,
            "transform": _TRANSFORMS,
            "objective": tuple(sorted(GPU_OBJECTIVES)),
            "layout": FEW_LAYOUTS,
            "out": (*_OUT, "none"),
            "data": rows.DATA,
        },
    ),
    "statistics": Kernel(
        rows.check_statistics,
        {
            "dtype": _DTYPES,
            "transform": _TRANSFORMS,
            "needs": tuple(rows.NEEDS),
            "layout": FEW_LAYOUTS,
            "chunks": _CHUNKS,
            "data": rows.DATA,
        },
    ),
    "gradient": Kernel(
        rows.check_gradient,
        {
            "dtype": _DTYPES,
            "transform": _TRANSFORMS,
            "state": ("plain", "runner-up", "logsumexp", "everything"),
            "layout": FEW_LAYOUTS,
            "out": _OUT,
            "chunks": _CHUNKS,
        },
    ),
    "pair statistics": Kernel(
        pairs.check_pair_statistics,
        {
            "dtype": _DTYPES,
            "other": _DTYPES,
            "transform": _TRANSFORMS,
            "other_transform": _TRANSFORMS,
            "labelled": (True, False),
            "layout": FEW_LAYOUTS,
            "chunks": _CHUNKS,
        },
    ),
    "pair gradient": Kernel(
        pairs.check_pair_gradient,
        {
            "dtype": _DTYPES,
            "other": _DTYPES,
            "transform": _TRANSFORMS,
            "other_transform": _TRANSFORMS,
            "student": ("a", "b"),
            "out": _OUT,
            "layout": FEW_LAYOUTS,
            "chunks": _CHUNKS,
        },
    ),
    "scale": Kernel(rows.check_scale, {"dtype": _DTYPES, "factor": (0.3, 1.0)}),
}
MOST_BEYOND_PAIRS = 300
"""Of a kernel's combinations beyond all pairs, so many are worth a case."""


def cases(target: Target) -> tuple[list[Case], list[Case], list[Case]]:
    """Those that launch everything once, each value of each parameter; all pairs; and others."""
    lots: list[list[list[Case]]] = [[], [], []]
    for backend, missing in target.backends().items():
        for name, kernel in KERNELS.items():
            parameters: dict[str, Sequence[Hashable]] = {"share": SHARES, **kernel.parameters}
            for lot, combinations in zip(lots, in_order_of_value(parameters), strict=True):
                lot.append(
                    [
                        _case(target, backend, missing, name, each)
                        for each in combinations[:MOST_BEYOND_PAIRS]
                    ]
                )
    first, pairs_of_values, beyond = (in_turns(lot) for lot in lots)
    return first, pairs_of_values, beyond


def _case(
    target: Target, backend: str, missing: str | None, kernel: str, combination: Combination
) -> Case:
    run = partial(_check, target, backend, missing, kernel, combination)
    return Case(name_of(backend, kernel, **combination), run)


def _check(
    target: Target,
    backend: str,
    missing: str | None,
    kernel: str,
    combination: Combination,
    report: Report,
) -> dict[str, Any]:
    if missing is not None:
        raise Missing(missing)
    if target.rehearses and (backend, kernel) == ("triton", "scale"):
        raise Missing("Triton's interpreter does not run this kernel")
    values = dict(combination)
    share = str(values.pop("share"))
    with target.launching(backend, share):
        kernels = registry.load(backend)
        judge = KERNELS[kernel].check(kernels, target.sizes(share), target.device, **values)
    return judge.found()
