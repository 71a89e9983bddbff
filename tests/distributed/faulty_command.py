"""`unilogit`, one of whose processes is killed once, for `torchrun`: see test_launchers.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback

from unilogit_kernels.cli import training
from unilogit_kernels.cli.main import main

KILL = "UNILOGIT_TEST_KILL"
"""The environment variable with rank, step and a file that is made when it was done."""


class KillOnce(TrainerCallback):
    def __init__(self, rank: str, step: str, done: str) -> None:
        self.mine = os.environ["RANK"] == rank
        self.step, self.done = int(step), Path(done)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.mine and state.global_step == self.step and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def command() -> None:
    wanted, module = os.environ.get(KILL), cast(Any, training)
    execute = module.execute

    def faulty(prepared: Any, callbacks: Any = ()) -> Any:
        more = [KillOnce(*wanted.split(","))] if wanted else []
        return execute(prepared, [*callbacks, *more])

    module.execute = faulty
    main()


if __name__ == "__main__":
    sys.argv[0] = "unilogit"
    command()
