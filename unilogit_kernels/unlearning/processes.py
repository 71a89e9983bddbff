"""A run of several processes: one world, one voice, one error for all, and rows that are shared."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed, nn

from unilogit_kernels.huggingface.wrappers import unwrapped
from unilogit_kernels.unlearning.errors import (
    INPUT_ERRORS,
    LostProcessError,
    RunError,
    TrainingError,
    one_line,
)

_T = TypeVar("_T")
_Row = TypeVar("_Row")

_WORLD_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
"""Parts of what torch says where another process is gone and the error has no class of its own."""
_TOLD = "_unilogit_told_by_all"
"""The attribute of an error that every process knows of, so that the first one tells it."""
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
    _warn_of_restarts()


def _warn_of_restarts() -> None:
    """Say it where torchrun would hand restarted workers the store of those that are gone.

    They may take the addresses in it for those of now, and then wait for nobody, or are refused.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launched() > 1 and restarts != "0" and shared and is_first():
        warnings.warn(
            f"torchrun may start the workers anew {restarts} times, but by default it hands them "
            "the store of the first attempt, with addresses of processes that are gone: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, and take its --rdzv_backend c10d "
            "or --standalone",
            stacklevel=2,
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


def join() -> torch.device:
    """Meet the other processes that were launched, if there are any.

    Returns:
        The device of this one.

    Raises:
        RunError: they would not find each other; see `check_launch` and `check_world`.
    """
    check_launch()
    if launched() == 1:
        cpu = torch.device("cpu")
        return cpu if on_cpu() else torch.accelerator.current_accelerator() or cpu
    state = PartialState(cpu=on_cpu())
    check_world(state.num_processes)
    device: torch.device = state.device
    return device


def ranks_of_one_copy(model: nn.Module) -> int:
    """How many processes, one after the other, hold one copy of a model and need the same rows.

    That is more than one under transformers' tensor parallelism.
    """
    return getattr(unwrapped(model), "tp_size", None) or 1


def over_rows(
    rows: Sequence[_Row],
    work: Callable[[list[_Row]], Sequence[_T]],
    model: nn.Module | None = None,
) -> list[_T]:
    """Share rows among the processes, and have the results of all in each of them.

    Every process calls this, with the same rows. All take equally many, so that models which are
    sharded run equally often: where rows run out, they begin again.

    Args:
        rows: any number.
        work: from the rows of this process to a result for each; results are pickled, so tensors
            in them should be on the CPU. Without other processes it gets all rows.
        model: which the rows go through; processes that share it by tensor parallelism get the
            same rows.

    Returns:
        The results in the order of the rows, the same in each process.

    Raises:
        RunError: the work failed in another process.
        LostProcessError: another process is gone.
        Exception: what it raised in this one.
    """
    if not _connected() or not rows:
        return list(work(list(rows)))
    copy = 1 if model is None else ranks_of_one_copy(model)
    world, own = distributed.get_world_size() // copy, distributed.get_rank() // copy
    mine = [(own + world * turn) % len(rows) for turn in range(-(-len(rows) // world))]
    found = together(lambda: list(work([rows[position] for position in mine])))
    every: list[Any] = [None] * distributed.get_world_size()
    with hearing_all():
        distributed.all_gather_object(every, list(zip(mine, found, strict=True)))
    by_row = {position: result for each in every for position, result in each}
    return [by_row[position] for position in range(len(rows))]


def size() -> int:
    """How many processes share the work: 1 where none has met another."""
    return distributed.get_world_size() if _connected() else 1


def from_first(work: Callable[[], _T]) -> _T:
    """Do something in the first process alone, and have what came out in each of them.

    Args:
        work: what to do; its result is pickled, and no collective belongs in it.

    Raises:
        RunError: it failed in the first process, where this is another.
        LostProcessError: another process is gone.
        Exception: what it raised, where this is the first.
    """
    if not _connected():
        return work()
    first = distributed.get_rank() == 0
    found: list[Any] = [together(lambda: work() if first else None)]
    with hearing_all():
        distributed.broadcast_object_list(found, src=0)
    result: _T = found[0]
    return result


@contextmanager
def hearing_all() -> Iterator[None]:
    """Say plainly that another process is gone, where torch fails because of that.

    Raises:
        LostProcessError: it is gone, or has not answered before the group's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not _is_loss(error):
            raise
        raise LostProcessError(
            f"another process of the run has ended, or has not answered in time ({one_line(error)})"
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    of_torch = getattr(distributed, "DistError", ())  # of NCCL, and of the store
    return isinstance(error, of_torch) or any(part in str(error) for part in _LOST)


def tells(error: BaseException) -> bool:
    """Whether this process is the one to tell of an error: of its own, if the others know it not.

    Args:
        error: that ended the work of this process.
    """
    if isinstance(error, LostProcessError):
        return True  # The first one may be the one that is gone.
    shared = isinstance(error, (*INPUT_ERRORS, TrainingError)) or hasattr(error, _TOLD)
    return is_first() or not shared


def voice() -> str:
    """Which process speaks, for what several may say: empty where it is the only one."""
    return f"process {_first(_RANK_VARIABLES, 0)}: " if _connected() and launched() > 1 else ""


def together(work: Callable[[], _T]) -> _T:
    """Do the same in every process, and fail in all if it fails in one.

    Without it the others would wait for the one that failed until a timeout ends them.

    Args:
        work: what to do; no collective belongs in it.

    Returns:
        What it returned in this process.

    Raises:
        RunError: it failed in another process.
        LostProcessError: another process is gone.
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
    with hearing_all():
        distributed.all_gather_object(every, told)
    if mine is not None:
        setattr(mine, _TOLD, True)
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
