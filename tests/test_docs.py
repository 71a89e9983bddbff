"""Every example in a docstring and every Python block of the README runs; every link leads."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import unilogit_kernels
from tests.support import ROOT

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(unilogit_kernels.__path__, "unilogit_kernels.")
    # The C++ library lies in the package, but is no module of Python.
    if not module.name.endswith(("__main__", "_cpu_kernels"))
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_functions_have_examples() -> None:
    for name in unilogit_kernels.__all__:
        assert ">>>" in (getattr(unilogit_kernels, name).__doc__ or ""), name


def test_readme_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:tests|tools|benchmarks|csrc|docs)/[\w./-]+)", text):
        assert (ROOT / named.rstrip(".")).exists(), named
