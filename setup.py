"""Builds the CPU kernels: a plain shared library, without torch and without Python's C API.

The library is optional. Where it cannot be built the package installs without it, and the eager
backend does the work (`unilogit doctor` says so).

The sources of the CUDA kernels are packaged. Where nvcc is installed, a wheel gets them compiled
too; where not, NVRTC compiles them when they are first used. An installation in place is left to
NVRTC.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE_DIR = Path("csrc/cpu")
COMPILE_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-g0"]
# Products and sums are fused where the source says so, and nowhere else: some must cancel exactly.
COMPILE_FLAGS += ["-ffp-contract=off"]
COMPILE_FLAGS += ["-Wall", "-Wextra"]
# False alarms inside the AVX-512 headers of GCC 12.
COMPILE_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
LINK_FLAGS = ["-fopenmp"]

CUDA_DIR = Path("csrc/cuda")
CUDA_PACKAGE = Path("unilogit_kernels/backends/cuda")
CUDA_ARCHITECTURES = "75 80 86 89 90 100 120"
PTX_ARCHITECTURE = "90"
"""What GPUs run for which there is no binary: those of a generation between, and newer ones."""


REPOSITORY = os.environ.get("UNILOGIT_KERNELS_REPOSITORY", "")
"""Where the sources are on the web, for links out of the package's page; forks have their own."""
REVISION = os.environ.get("UNILOGIT_KERNELS_REVISION", "main")


def readme() -> str:
    """The README, with links and pictures that lead somewhere from the page of an index, too."""
    text = Path("README.md").read_text(encoding="utf-8")
    if not REPOSITORY:
        return text
    raw, page = (f"{REPOSITORY}/{kind}/{REVISION}" for kind in ("raw", "blob"))
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{raw}/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{page}/", text)


def urls() -> dict[str, str]:
    """Those that an index shows beside the README."""
    found = {"Paper": "https://arxiv.org/abs/2505.06027"}
    if REPOSITORY:
        found |= {
            "Source": REPOSITORY,
            "Issues": f"{REPOSITORY}/issues",
            "Changelog": f"{REPOSITORY}/blob/{REVISION}/CHANGELOG.md",
            "Documentation": f"{REPOSITORY}/tree/{REVISION}/docs",
        }
    return found


class BuildLibrary(build_ext):
    """Builds `_cpu_kernels.so`, named without Python's ABI tag, or explains why it could not."""

    def run(self) -> None:
        """Build the library; into a wheel, the CUDA sources and perhaps their binary as well."""
        super().run()
        if not self.inplace:
            package = Path(self.build_lib) / CUDA_PACKAGE
            self.copy_tree(str(CUDA_DIR), str(package / "csrc"))
            self.build_fatbin(package)

    def build_fatbin(self, package: Path) -> None:
        """Compile the CUDA kernels for every architecture; a failure leaves that to NVRTC."""
        nvcc = os.environ.get("UNILOGIT_KERNELS_NVCC", shutil.which("nvcc") or "")
        if not nvcc:
            return
        sources = runpy.run_path(str(CUDA_PACKAGE / "sources.py"))
        name = sources["FATBIN_PATTERN"].format(digest=sources["digest"]())
        architectures = os.environ.get("UNILOGIT_KERNELS_CUDA_ARCHITECTURES", CUDA_ARCHITECTURES)
        codes = [f"arch=compute_{a},code=sm_{a}" for a in architectures.split()]
        codes.append(f"arch=compute_{PTX_ARCHITECTURE},code=compute_{PTX_ARCHITECTURE}")
        command = [nvcc, "--fatbin", f"-std={sources['STANDARD']}", "--threads=0"]
        command += ["--compress-mode=size", *(f"--generate-code={code}" for code in codes)]
        command += [str(CUDA_DIR / "kernels.cu"), "-o", str(package / name)]
        self.announce(" ".join(command), level=2)
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"the CUDA kernels were not compiled ({error}): NVRTC will, at first use")
            (package / name).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        """The file's path in the package."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: the library is not a Python module and has no init function."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; a failure leaves the package without the library."""
        extra = shlex.split(os.environ.get("UNILOGIT_KERNELS_CPU_FLAGS", ""))
        ext.extra_compile_args = [*COMPILE_FLAGS, *extra]
        ext.extra_link_args = [*LINK_FLAGS, *extra]
        try:
            super().build_extension(ext)
        except Exception as error:  # a missing compiler shows in a different way on every platform
            self.warn(
                f"the CPU kernels were not built ({type(error).__name__}: {error}). The package "
                "works without them, on the slower eager backend. They need a C++17 compiler with "
                "OpenMP, such as g++; install one and reinstall to get them."
            )
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library does not depend on Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        return ("py3", "none", super().get_tag()[2])


class PlatformDistribution(Distribution):
    """Has a library even though nothing in it is a Python extension module."""

    def has_ext_modules(self) -> bool:
        """Always: keeps the package in the platform's directory."""
        return True


def library() -> Extension:
    """The library as an extension that setuptools may fail to build."""
    sources: Any = sorted(str(path) for path in SOURCE_DIR.glob("*.cpp"))
    headers = sorted(str(path) for path in SOURCE_DIR.glob("*.h"))
    return Extension(
        "unilogit_kernels.backends.cpu._cpu_kernels",
        sources=sources,
        depends=headers,
        language="c++",
        optional=True,
    )


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=urls(),
    ext_modules=[library()],
    distclass=PlatformDistribution,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
