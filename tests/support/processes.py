"""Several processes in one gloo group, for tests: begun in milliseconds, and none hangs a test.

`run_ranks(function, *args)` calls `function(*args)` in each rank of a new group and returns what
the ranks returned; what one raises is raised here. `rank_outcomes` returns what became of each rank
instead, for tests in which some fail, are killed or come late.

The ranks are forked from a server that has imported torch and transformers once, and runs nothing.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.nn.parallel",
        "peft",
        "transformers.models.llama.modeling_llama",
        "unilogit_kernels.unlearning.trainer",
        "tests.support.frozen",  # last
    ]
)
_START_SECONDS = 200.0
"""Until all ranks are there: the server imports torch first, on a machine that may be busy."""
_GRACE_SECONDS = 1.0
"""For the others to say what befell them, too, once one has failed."""


class RankError(RuntimeError):
    """What a rank said when it failed, or that it is gone."""


class Outcome(NamedTuple):
    """What became of a rank.

    Attributes:
        value: what the function returned.
        error: what it raised; a `RankError` where the process died, a `TimeoutError` where it was
            still running in the end, with the stacks of its threads.
        exit_code: None where the rank was still running, minus a signal where one killed it.
        seconds: from the moment when all ranks were there until it was done.
    """

    value: Any
    error: BaseException | None
    exit_code: int | None
    seconds: float


def run_ranks(
    function: Callable[..., Any], *args: Any, ranks: int = 2, seconds: float = 60
) -> list[Any]:
    """Call a function in each process of a new gloo group, as by `torchrun`.

    Args:
        function: at the top of a module. It may destroy the group, and need not.
        args: pickled; the rank is `dist.get_rank()`.
        ranks: number of processes, each with one thread.
        seconds: until they are killed.

    Returns:
        What each returned, by rank.

    Raises:
        BaseException: what the rank that failed first raised; its cause is the traceback.
        RankError: a process died.
        TimeoutError: one has not ended in time; the message has its stack.
    """
    found = _run(function, args, ranks, seconds, go_on=False)
    failed = [outcome for outcome in found if outcome.error is not None]
    if failed:
        # Those that are still waiting for the failed one are a consequence.
        first = min(failed, key=lambda o: (isinstance(o.error, TimeoutError), o.seconds))
        assert first.error is not None
        raise first.error
    return [outcome.value for outcome in found]


def rank_outcomes(
    function: Callable[..., Any], *args: Any, ranks: int = 2, seconds: float = 60
) -> list[Outcome]:
    """`run_ranks` for ranks that are to fail: waits for all, and raises nothing.

    Args:
        function, args, ranks, seconds: see `run_ranks`.

    Returns:
        What became of each, by rank.
    """
    return _run(function, args, ranks, seconds, go_on=True)


def _run(
    function: Callable[..., Any], args: tuple[Any, ...], ranks: int, seconds: float, *, go_on: bool
) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        work = pickle.dumps((function, args))
        started: list[_Rank] = []
        try:
            started += (_Rank(rank, ranks, work, Path(folder), seconds) for rank in range(ranks))
            begin = time.monotonic()
            if _all(started, begin + _START_SECONDS, "is there", go_on=False):
                begin = time.monotonic()
                for each in started:
                    each.say(b"begin")
                _all(started, begin + seconds, "is done", go_on=go_on)
            return [each.outcome(begin, seconds) for each in started]
        finally:
            for each in started:
                each.end()


def _all(started: list[_Rank], deadline: float, what: str, *, go_on: bool) -> bool:
    """Listen to all ranks until each has spoken, or died, or time is over."""
    silent = list(started)
    while silent and (left := deadline - time.monotonic()) > 0:
        ready = connection.wait([x for each in silent for x in each.waits()], timeout=left)
        for each in [each for each in silent if any(x in ready for x in each.waits())]:
            each.listen()
            silent.remove(each)
            if each.failed and not go_on:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return not silent and not any(each.failed for each in started)


class _Rank:
    """The parent's view of a process."""

    def __init__(self, rank: int, ranks: int, work: bytes, folder: Path, seconds: float) -> None:
        self.rank, self.stacks = rank, folder / f"stacks{rank}"
        self.pipe, other = _CONTEXT.Pipe()
        self.process: ForkServerProcess = _CONTEXT.Process(
            target=_main, args=(rank, ranks, work, str(folder), seconds, other), daemon=True
        )
        self.process.start()
        other.close()
        self.heard: tuple[str, Any, str] | None = None
        self.died, self.at = False, 0.0

    def waits(self) -> list[Any]:
        return [self.pipe, self.process.sentinel]

    def listen(self) -> None:
        self.at = time.monotonic()
        try:
            self.heard = pickle.loads(self.pipe.recv_bytes()) if self.pipe.poll() else None
        except EOFError:
            self.heard = None
        self.died = self.heard is None
        if self.died:
            self.process.join()

    @property
    def failed(self) -> bool:
        return self.died or (self.heard is not None and self.heard[0] == "error")

    def say(self, word: bytes) -> None:
        if not self.died:
            self.pipe.send_bytes(word)

    def outcome(self, begin: float, seconds: float) -> Outcome:
        code = self.process.exitcode
        if self.died:
            error = RankError(f"rank {self.rank} died with exit code {code}")
            return Outcome(None, error, code, self.at - begin)
        if self.heard is None or self.heard[0] == "ready":
            late = f"rank {self.rank} was not done within {seconds:g} s"
            stacks = self.stacks.read_text() if self.stacks.exists() else ""
            return Outcome(None, TimeoutError(f"{late}\n{stacks}"), None, seconds)
        kind, value, trace = self.heard
        if kind == "value":
            return Outcome(value, None, 0, self.at - begin)
        value.__cause__ = RankError(f"on rank {self.rank}:\n{trace}")
        return Outcome(None, value, 1, self.at - begin)

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.pipe.close()


def _main(
    rank: int, ranks: int, work: bytes, folder: str, seconds: float, pipe: Connection
) -> None:
    """What a rank does. It ends by being killed, once all have spoken.

    An interpreter that ends by itself may wait for ever in torch 2.13 (see `processes.leave`), and
    a rank that ends early may take a collective with it that another is still in.
    """
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in environment.items()}
    # The group is there: who asks for it by these does not connect.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(work)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=2 * seconds),  # a hang is the parent's to end
        )
        pipe.send_bytes(pickle.dumps(("ready", None, "")))
        pipe.recv_bytes()
        with Path(folder, f"stacks{rank}").open("w") as stacks:
            faulthandler.dump_traceback_later(0.95 * seconds, file=stacks)
            message = pickle.dumps(("value", function(*args), ""))
            faulthandler.cancel_dump_traceback_later()
    except BaseException as error:
        message = _failed(error)
    pipe.send_bytes(message)
    # Until the parent kills it, or is gone.
    connection.wait([pipe])
    os._exit(0)


def _failed(error: BaseException) -> bytes:
    trace = "".join(traceback.format_exception(error))
    error.__traceback__ = error.__cause__ = error.__context__ = None
    try:
        message = pickle.dumps(("error", error, trace))
        pickle.loads(message)
    except Exception:  # Whatever a class's own pickling does.
        plain = RankError(f"{type(error).__name__}: {error}")
        message = pickle.dumps(("error", plain, trace))
    return message
