"""Make an environment for each row of the matrix, run the smoke test in it, and print a table.

`python -m tests.versions [NAME ...]`; environments are kept in `.venv/versions` for the next time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".venv" / "versions"


class Row(NamedTuple):
    """One environment.

    Attributes:
        name: For the command line.
        python: The interpreter's version; a row whose interpreter is not installed is skipped.
        packages: What is installed, beside numpy and what these bring.
        level: Of `smoke`, how much is expected to work.
    """

    name: str
    python: str
    packages: tuple[str, ...]
    level: str


_TRAINER = tuple(
    requirement.partition(";")[0].strip()
    for requirement in requires("unilogit-kernels") or ()
    if 'extra == "unlearn"' in requirement and not requirement.startswith("transformers")
)
"""What the extra brings beside the transformers that a row names."""
_OLD = ("transformers==4.57.6", *_TRAINER)
_NEWEST = ("transformers>=5", *_TRAINER)
MATRIX = (
    Row("oldest-torch", "3.10", ("torch==2.10.0", "numpy<2.3"), "losses"),
    Row("torch-alone", "3.11", ("torch==2.13.0",), "losses"),
    Row("transformers-4.45", "3.11", ("torch==2.13.0", "transformers==4.45.1"), "head"),
    Row("transformers-4.57", "3.11", ("torch==2.13.0", *_OLD), "trainer"),
    Row("newest", "3.11", ("torch==2.13.0", *_NEWEST), "trainer"),
    Row("python-3.12", "3.12", ("torch==2.13.0", *_NEWEST), "trainer"),
    Row("python-3.13", "3.13", ("torch==2.13.0", *_NEWEST), "trainer"),
    Row("python-3.14", "3.14", ("torch", *_NEWEST), "trainer"),
)
"""torch from PyTorch's CPU index, where PIP_EXTRA_INDEX_URL names it; else from PyPI, for CUDA."""


def interpreter(version: str) -> str | None:
    """A Python of that version that starts: a shim of pyenv may be there without one."""
    found = [shutil.which(f"python{version}")]
    found += [
        str(path) for path in sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python"))
    ]
    for path in filter(None, found):
        asked = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False)
        if told.stdout.strip() == version:
            return path
    return None


def run(row: Row) -> str:
    """What came of it, in a few words."""
    python = interpreter(row.python)
    if python is None:
        return f"not run: there is no Python {row.python} here"
    folder = HOME / row.name
    in_it = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        command = [str(in_it), "-m", "pip", "install", "--quiet", "numpy", *row.packages]
        if subprocess.run(command, check=False).returncode:
            return "not run: it cannot be installed here"
        (folder / ".installed").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(in_it), "-m", "tests.versions.smoke", row.level]
    failed = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    return "FAILED" if failed else f"passed: {row.level}"


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.versions", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(r.name for r in MATRIX))
    wanted = parser.parse_args().names
    results = {}
    for row in MATRIX:
        if not wanted or row.name in wanted:
            print(f"{row.name}:", flush=True)
            results[row.name] = run(row)
            print(f"  {results[row.name]}", flush=True)
    return int("FAILED" in results.values())


if __name__ == "__main__":
    sys.exit(main())
