"""What the executor raises."""

from __future__ import annotations


class PtxError(RuntimeError):
    """Anything that keeps a kernel from running to its end."""


class UnsupportedPtxError(PtxError):
    """The kernel uses something that the executor does not model. It never guesses."""


class KernelFaultError(PtxError):
    """A check failed while the kernel ran: out of bounds, misaligned, a race, a barrier..."""
