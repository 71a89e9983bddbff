"""Install a wheel where there is nothing else, and do what a new user does.

`python -m tests.versions.wheel dist/*.whl` makes an empty environment in an empty folder, with no
compiler on PATH, installs the wheel with pip, runs the first Python block of the README, then
`unilogit doctor` and, without the extra, `unilogit --help`, and says how long each took.
`--with torch==2.13.0` installs that one beside it, in place of the newest.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
THREAD_POOLS = """
import torch, unilogit_kernels, threadpoolctl
unilogit_kernels.unilogit_loss(torch.randn(64, 4096), torch.arange(64), backend="cpu")
pools = [each for each in threadpoolctl.threadpool_info() if each["user_api"] == "openmp"]
assert len(pools) == 1, pools
print("OpenMP:", pools[0]["filepath"])
"""


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.versions.wheel", description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--with", dest="beside", nargs="*", default=[], metavar="REQUIREMENT")
    given = parser.parse_args()
    wheel = given.wheel.resolve()
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python = environment / "bin" / "python"
        # Neither a compiler nor anything else of this machine is found.
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CC", "CXX")}
        clean["PATH"] = str(environment / "bin")

        def run(what: str, *command: str | Path, codes: tuple[int, ...] = (0,)) -> str:
            start = time.monotonic()
            done = subprocess.run(
                [*command], cwd=folder, env=clean, text=True, stdout=subprocess.PIPE, check=False
            )
            print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)
            assert done.returncode in codes, (what, done.returncode, done.stdout)
            return done.stdout

        run("pip install", python, "-m", "pip", "install", "--quiet", wheel, *given.beside)
        run("the README's first lines", python, "-c", block[1])
        told = run("unilogit doctor", environment / "bin" / "unilogit", "doctor")
        assert re.search(r"^  cpu +runs here$", told, re.MULTILINE), told
        # Without the extra it says what to install.
        run("unilogit --help", environment / "bin" / "unilogit", "--help", codes=(2,))
        run("pip install threadpoolctl", python, "-m", "pip", "install", "--quiet", "threadpoolctl")
        print(run("one pool of threads", python, "-c", THREAD_POOLS), end="")


if __name__ == "__main__":
    main()
