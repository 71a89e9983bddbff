"""The list of commands, and those that need no model."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from unilogit_kernels import __version__
from unilogit_kernels.bench.measure import Options
from unilogit_kernels.bench.providers import providers
from unilogit_kernels.cli.app import COMMANDS, app, load
from unilogit_kernels.unlearning.methods import Method, method_names


def run(line: str, monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> Result:
    monkeypatch.setenv("COLUMNS", str(columns))
    return CliRunner().invoke(app, line.split())


@pytest.mark.parametrize(("option", "said"), [("--help", "unlearn"), ("--version", __version__)])
def test_what_needs_no_torch_does_not_import_it(option: str, said: str) -> None:
    """torch alone takes seconds to import."""
    script = (
        f"import sys; sys.argv[1:] = [{option!r}]\n"
        "from unilogit_kernels.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert said in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (inspect.getdoc(load(name)) or "").splitlines()[0] == COMMANDS[name].help
    told = " ".join(run("--help", monkeypatch, columns=200).output.split())
    assert COMMANDS[name].help in told


def test_the_paper_s_recipe_is_in_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    told = run("unlearn --help", monkeypatch).output
    assert "2505.06027" in told
    assert "--forget-weight 0.03" in told


def test_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = run("methods", monkeypatch).output
    assert max(map(len, listed.splitlines())) <= 100
    found = json.loads(run("methods --json", monkeypatch).output)
    assert [each["name"] for each in found] == method_names()
    for each in found:
        assert each["name"] in listed
        assert each["description"]
        Method(each["name"], {k: v for k, v in each["parameters"].items() if v is not None})
    by_name = {each["name"]: each for each in found}
    assert by_name["undial"]["parameters"] == {"gamma": 10.0}
    assert by_name["undial"]["needs"] == "the starting model"
    assert by_name["idk_dpo"]["needs"] == "the starting model's log p, refusals"
    assert by_name["unilogit"] == {**by_name["unilogit"], "parameters": {}, "needs": ""}


def test_one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Inverse temperature" in run("methods npo", monkeypatch).output
    unknown = run("methods anger", monkeypatch)
    assert unknown.exit_code == 2
    assert "method must be one of" in unknown.output


def test_a_quick_benchmark_compiles_nothing() -> None:
    everybody = [*providers("logits"), *providers("linear")]
    quick = [provider for provider in everybody if Options(compilers=False).wants(provider)]
    assert any(provider.compiles for provider in everybody)
    assert quick == [provider for provider in everybody if not provider.compiles]
