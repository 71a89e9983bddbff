"""Who is drawn in a picture, and by which colour and marker: one for each provider, everywhere."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from unilogit_kernels.bench.compare import WRONG
from unilogit_kernels.bench.measure import Measurement
from unilogit_kernels.bench.provider import OURS
from unilogit_kernels.bench.report import Result

MOST = 5
"""Series in a picture; the tables hold the others."""

_FAMILIES: dict[str, tuple[str, str]] = {
    OURS["unilogit"]: ("#000000", "P"),
    "eager Unilogit": ("#D55E00", "o"),
    "compiled Unilogit": ("#E69F00", "s"),
    "F.cross_entropy": ("#009E73", "^"),
    "compiled F.cross_entropy": ("#8A7A00", "v"),
    "F.linear_cross_entropy": ("#56B4E9", "D"),
    "cut_cross_entropy": ("#0072B2", "p"),
    "Liger": ("#CC79A7", "*"),
    "quack": ("#7F4F24", "<"),
    "TRL fused head": ("#6A3D9A", ">"),
}
"""Colour and marker by how names begin. Okabe and Ito's colours, which the colour-blind can tell
apart, with the yellow as dark as it must be on white, and two more; no two share a marker."""
_BOUND = ("#6E6E6E", "|")
_NAMES = {
    "eager Unilogit": "Unilogit, plain torch",
    "compiled Unilogit": "Unilogit, torch.compile",
    "F.cross_entropy": "F.cross_entropy (does not unlearn)",
    "compiled F.cross_entropy": "F.cross_entropy, torch.compile",
    "F.linear_cross_entropy, auto": "F.linear_cross_entropy",
    "cut_cross_entropy (torch_compile)": "Cut Cross-Entropy",
}
"""For a reader who does not know the harness's names."""
_FIRST = (OURS["unilogit"], "eager Unilogit", "F.cross_entropy")


def does_not_fit(why: str) -> bool:
    """Whether a provider is missing for want of memory."""
    return why.startswith("does not fit")


class Series(NamedTuple):
    """A provider in a picture.

    Attributes:
        name: The provider's.
        label: For the legend.
        colour: Its family's.
        marker: Its family's.
        is_bound: Whether it is no loss, but the least that any could take.
    """

    name: str
    label: str
    colour: str
    marker: str
    is_bound: bool

    @property
    def style(self) -> dict[str, Any]:
        """For matplotlib's `plot`."""
        ours = self.name == OURS["unilogit"]
        return {
            "color": self.colour,
            "marker": self.marker,
            "label": self.label,
            "linestyle": "--" if self.is_bound else "-",
            "linewidth": 2.6 if ours else 1.6,
            "markersize": 9 if ours or self.is_bound else 7,
            "markeredgewidth": 2 if self.is_bound else 1,
            "zorder": 5 if ours else 3,
        }


def label_of(name: str) -> str:
    """What a picture calls a provider; one that goes `through nll` is "composed"."""
    base, composed, _ = name.partition(", through nll")
    return _NAMES.get(base, base) + (", composed" if composed else "")


def series_of(name: str, loss: str) -> Series:
    """How a provider is drawn.

    Args:
        name: Its name.
        loss: What it computes; `"floor"` for a bound.
    """
    if loss == "floor":
        return Series(name, label_of(name), *_BOUND, True)
    family = _family(name)
    colour, marker = _FAMILIES.get(family, _BOUND)
    return Series(name, label_of(name), colour, marker, False)


def _family(name: str) -> str:
    """The longest beginning of a name that has a colour; the name itself where none has."""
    return max((f for f in _FAMILIES if name.startswith(f)), key=len, default=name)


def choose(results: Sequence[Result]) -> list[Series]:
    """At most `MOST` providers that tell a set of results, ours first.

    Ours; the literal loss and `F.cross_entropy`; the fastest of all other peers; the lowest bound.
    Where one of these is missing, the next peers take its place. Of a family (a peer's variants)
    one is drawn. The first three are named where they did not fit, too. Our cross-entropy is left
    out: it runs the same kernels in the same time.
    """
    ran: dict[str, list[Measurement]] = {}
    for m in (m for result in results for m in result.measurements):
        if m.milliseconds and not (m.gradient_error or 0) > WRONG:
            ran.setdefault(m.provider, []).append(m)

    never = {
        m.provider: m
        for result in results
        for m in result.measurements
        if m.provider in _FIRST and m.provider not in ran and does_not_fit(m.missing or "")
    }

    def rank(name: str) -> tuple[int, float]:
        ratios = [m.relative_to_ours for m in ran[name] if m.relative_to_ours is not None]
        return -len(ran[name]), statistics.geometric_mean(ratios) if ratios else float("inf")

    bounds = [name for name in ran if ran[name][0].loss == "floor"]
    peers = [n for n in ran if n not in bounds and n not in OURS.values() and n not in _FIRST]
    bound = min(bounds, key=rank, default=None)
    chosen = [name for name in _FIRST if name in ran or name in never]
    room = MOST - len(chosen) - (bound is not None)
    for name in _one_of_each_family(sorted(peers, key=rank), chosen):
        if room > 0:
            chosen.append(name)
            room -= 1
    chosen += [bound] if bound is not None else []
    return [series_of(n, (ran[n][0] if n in ran else never[n]).loss) for n in chosen]


def _one_of_each_family(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    families, kept = {_family(name) for name in taken}, []
    for name in names:
        if _family(name) not in families:
            families.add(_family(name))
            kept.append(name)
    return kept
