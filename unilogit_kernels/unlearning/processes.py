"""A run of several processes: one world, one voice, one error for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

from unilogit_kernels.unlearning.errors import INPUT_ERRORS, RunError

_T = TypeVar("_T")

_WORLD_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_YES = ("1", "true", "yes", "on", "y", "t")


def _first(variables: tuple[str, ...], default: int) -> int:
    for name in variables:
        value = os.environ.get(name)
        if value is not None:
            try:
                return int(value)
            except ValueError as error:
                raise RunError(f"{name} must be an integer, got {value!r}") from error
    return default


def launched() -> int:
    """How many processes `torchrun`, `accelerate launch` or MPI started: 1 without them.

    Raises:
        RunError: the environment variable that says so is no number.
    """
    return _first(_WORLD_VARIABLES, 1)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    try:
        return launched() == 1 or _first(_RANK_VARIABLES, 0) == 0
    except RunError:
        return True  # Somebody has to say it.


def on_cpu() -> bool:
    """Whether to compute on the CPU: no accelerator, or `ACCELERATE_USE_CPU` rules it out."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in _YES
    return told or not torch.accelerator.is_available()


def check_alone(command: str) -> None:
    """See that no launcher started several processes of a command that knows one only.

    Raises:
        RunError: it did.
    """
    if launched() > 1:
        raise RunError(f"{command} runs in one process, but {launched()} were launched: start one")


def check_launch() -> None:
    """See that whoever launched this process told it how to find the others.

    Raises:
        RunError: it would wait for them for ever, or do the work of all alone.
    """
    by_mpi = any(name in os.environ for name in _RANK_VARIABLES[1:])
    unset = [name for name in _RENDEZVOUS if name not in os.environ]
    if launched() > 1 and unset and not by_mpi:
        raise RunError(
            f"WORLD_SIZE says that {launched()} processes share the work, but not how they find "
            f"each other ({', '.join(unset)}): start with `torchrun`, or unset WORLD_SIZE"
        )
    # What `accelerate launch` sets if it is asked for more than one process, and in each of them.
    of_several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if of_several and launched() == 1 and "RANK" not in os.environ:
        raise RunError(
            "`accelerate launch --cpu` starts one process, however many it is asked for: start "
            "with `torchrun --nproc_per_node N`, or ask for one"
        )


def check_world(size: int) -> None:
    """See that the processes that were launched have found each other.

    Args:
        size: of the world that they are to make up.

    Raises:
        RunError: each is on its own, and would do all the work and write over the others'.
    """
    if size != launched():
        raise RunError(
            f"WORLD_SIZE says that {launched()} processes share the work, but this one is in a "
            f"world of {size}: start with `torchrun` or `accelerate launch`, or unset WORLD_SIZE"
        )


def together(work: Callable[[], _T]) -> _T:
    """Do the same in every process, and fail in all if it fails in one.

    Without it the others would wait for the one that failed until a timeout ends them.

    Args:
        work: what to do; no collective belongs in it.

    Returns:
        What it returned in this process.

    Raises:
        RunError: it failed in another process.
        Exception: what it raised in this one.
    """
    if not _connected():
        return work()
    result: list[_T] = []
    mine: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        mine = error
    told = mine and (type(mine).__name__, str(mine), isinstance(mine, INPUT_ERRORS))
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, told)
    if mine is not None:
        raise mine
    for rank, other in enumerate(every):
        if other is not None:
            name, message, of_input = other
            raise RunError(message if of_input else f"process {rank} failed: {name}: {message}")
    return result[0]


def leave(code: int) -> None:
    """End a process that has a process group, at once; any other returns.

    An interpreter that ends by itself may wait for ever in torch 2.13: DDP's reducer, holding the
    interpreter's lock, joins gloo's thread, which waits for that lock.

    Args:
        code: the exit code.
    """
    if _connected():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _connected() -> bool:
    return distributed.is_available() and distributed.is_initialized()
