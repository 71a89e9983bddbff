"""Every example in a docstring and every Python block of every page runs; every link leads."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import unilogit_kernels
from tests.support import ROOT
from tests.support.tiny_models import FORGET, RETAIN, one_thread, save_model, write_rows

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(unilogit_kernels.__path__, "unilogit_kernels.")
    # The C++ library lies in the package, but is no module of Python.
    if not module.name.endswith(("__main__", "_cpu_kernels"))
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_functions_have_examples() -> None:
    for name in unilogit_kernels.__all__:
        assert ">>>" in (getattr(unilogit_kernels, name).__doc__ or ""), name


@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name
)
@pytest.mark.usefixtures(one_thread.__name__)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks, one after the other, in a folder with what they name."""
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(page.read_text())
    if any('"DIR"' in block for block in blocks):
        save_model(tmp_path / "DIR")
        write_rows(tmp_path / "forget.jsonl", FORGET)
        write_rows(tmp_path / "retain.jsonl", RETAIN)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    if page.name == "unlearning.md":
        assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in Path("OUT").iterdir()}


def test_the_site_has_every_page() -> None:
    """And no page is named that is not there: mkdocs says so as well, where it is installed."""
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:tests|tools|benchmarks|csrc|docs)/[\w./-]+)", text):
        assert (ROOT / named.rstrip(".")).exists(), named
