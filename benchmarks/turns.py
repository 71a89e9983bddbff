"""Times that alternate, so that whatever else the machine does meets everybody."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from unilogit_kernels.bench.devices import Device


def in_turns(
    jobs: Mapping[str, Callable[[], object]], device: Device, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each, by round.

    Args:
        jobs: By name; each runs once in a round, in this order.
        device: Where.
        rounds: That count, after one that does not.
    """
    times = {name: list[float]() for name in jobs}
    for counted in [False, *[True] * rounds]:
        for name, job in jobs.items():
            milliseconds, _ = device.time(job)
            if counted:
                times[name].append(milliseconds)
    return times
