"""The examples run, each of them in a few lines."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.tekken import MissingTokenizerError, save_tekken
from tests.support import ROOT
from tests.support.tiny_models import make_model, make_tokenizer, one_thread
from unilogit_kernels.testing import AllocationGuard

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"sft_trainer": "trl", "lightning_module": "lightning"}
"""What an example needs beside this package's extra `test`: the extra `integrations`."""
LARGE = "large_vocabulary"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sure of what it says, so that there is something to forget."""
    folder = tmp_path_factory.mktemp("model")
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing, with the vocabulary of Mistral's tokenizer."""
    folder = tmp_path_factory.mktemp("large")
    try:
        tokenizer = save_tekken(folder)
    except MissingTokenizerError as error:
        pytest.skip(str(error))
    make_model(vocab_size=len(tokenizer), hidden_size=64).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def _run(path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example, and see that its loss falls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), str(folder)])
    losses = runpy.run_path(str(path), run_name="__main__")["losses"]
    assert len(losses) == 3
    assert losses[2] < losses[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem != LARGE], ids=lambda path: path.stem
)
def test_an_example_runs(
    path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem], reason="needs unilogit-kernels[integrations]")
    _run(path, folder, tmp_path, monkeypatch)


@pytest.mark.filterwarnings("ignore")
def test_the_example_with_a_large_vocabulary_makes_no_logits(
    large_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(path for path in EXAMPLES if path.stem == LARGE)
    # A batch has 32 rows of at least 26 tokens.
    with AllocationGuard(forbidden_elements=32 * 26 * 131_072):
        _run(path, large_folder, tmp_path, monkeypatch)


def _lines_of_user_code(path: Path) -> Iterator[int]:
    """Those of statements, each once; imports and the docstring are none."""
    for node in ast.parse(path.read_text()).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not text and not isinstance(node, ast.Import | ast.ImportFrom):
            assert node.end_lineno is not None
            yield from range(node.lineno, node.end_lineno + 1)


def test_examples_are_short() -> None:
    assert {path.stem for path in EXAMPLES} >= NEEDS.keys()
    for path in EXAMPLES:
        lines = path.read_text().splitlines()
        written = [number for number in _lines_of_user_code(path) if lines[number - 1].strip()]
        assert len(written) < 20, path.name
