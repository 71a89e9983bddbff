"""What is shipped: a wheel that needs no compiler, from the tree and from the sdist alike."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.versions.wheel import THREAD_POOLS
from unilogit_kernels.backends.cuda import sources as cuda_sources

NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "UNILOGIT_KERNELS_NVCC": ""}
SMOKE = """
import torch, unilogit_kernels as uk
from unilogit_kernels.backends.cpu.library import library_path
from unilogit_kernels.backends.cuda import sources
assert sources.directory().parent == sources.Path(sources.__file__).parent, sources.directory()
x = torch.randn(4, 1000, requires_grad=True)
uk.unilogit_loss(x, torch.arange(4), backend="cpu").backward()
print(uk.__file__, library_path())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which is built from the tree: so both are complete."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    # One architecture and no optimisation are quick.
    environment = {
        **os.environ,
        "UNILOGIT_KERNELS_CUDA_ARCHITECTURES": "90",
        "UNILOGIT_KERNELS_CPU_FLAGS": "-O0",
    }
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list(out.glob("*.tar.gz"))) == 1
    (built,) = out.glob("*.whl")
    return built


def test_tag_and_contents(wheel: Path) -> None:
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    names = zipfile.ZipFile(wheel).namelist()
    assert "unilogit_kernels/py.typed" in names
    for name in ("template.html", "style.css"):
        assert f"unilogit_kernels/unlearning/comparison/report/{name}" in names
    assert "unilogit_kernels/backends/cpu/_cpu_kernels.so" in names
    for header in cuda_sources.HEADERS:
        assert f"unilogit_kernels/backends/cuda/csrc/{header}" in names
    fatbin = cuda_sources.FATBIN_PATTERN.format(digest=cuda_sources.digest())
    has_nvcc = shutil.which("nvcc") is not None
    assert (f"unilogit_kernels/backends/cuda/{fatbin}" in names) == has_nvcc
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"unilogit_kernels"}


def test_runs_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", SMOKE],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PATH": "/nonexistent"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(tmp_path)) == 2


def test_installs_where_nothing_can_be_compiled(tmp_path: Path) -> None:
    """The build says so, and the package is there without the library."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    result = subprocess.run(
        [*command, "--build-temp", str(tmp_path / "temp")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **NO_COMPILER},
    )
    assert result.returncode == 0, result.stderr
    assert "the CPU kernels were not built" in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_no_file_is_too_long_to_read() -> None:
    """At most 400 lines of source a file, in the package and in csrc."""
    kinds = (".py", ".h", ".cpp", ".cu", ".css", ".html")
    files = [
        path
        for folder in ("unilogit_kernels", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
    ]
    long = [path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    assert len(files) > 250
    assert long == []


def test_there_is_one_pool_of_threads() -> None:
    """The library's OpenMP is torch's own: two pools would take the cores from each other."""
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    # In a process of its own: other packages that tests import bring pools of their own.
    subprocess.run([sys.executable, "-c", THREAD_POOLS], check=True, cwd=ROOT)
