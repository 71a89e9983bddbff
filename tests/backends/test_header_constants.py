"""What the launchers and the headers of csrc both state is the same in both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

from tests.backends.cpu import rows as cpu_rows
from tests.support import ROOT
from unilogit_kernels.backends import ids
from unilogit_kernels.backends.cpu import kernels, library
from unilogit_kernels.backends.cuda import divergence, geometry, log_odds
from unilogit_kernels.maths import pair_state, row_state, statistics
from unilogit_kernels.objectives import REGISTRY

CSRC = ROOT / "csrc"
STATE_ROWS = ("ROW_MAX", "ROW_SUM", "TARGET", "RUNNER_UP", "COUNT", "LINEAR", "DOT", "SQUARE")
SLOPE_ROWS = ("REST", "AT_LABEL", "AT_RUNNER_UP", "TILT", "UNIFORM")


def enumerators(header: str, name: str) -> dict[str, int]:
    """What an enum of a header says, in its order."""
    text = re.sub("//.*", "", (CSRC / header).read_text())
    (body,) = re.findall(rf"enum {name}\b[^{{]*{{([^}}]*)}}", text)
    return {key: int(value) for key, value in re.findall(r"(\w+) = (-?\w+)", body)}


def constants(header: str) -> dict[str, int]:
    """The integers that a header defines by numbers alone."""
    found: dict[str, int] = {}
    definition = (
        r"^(?:#define (\w+)|constexpr (?:int|(?:std::)?int(?:32_t|64_t)) (\w+) =) ([^;\n]*)"
    )
    for macro, name, value in re.findall(definition, (CSRC / header).read_text(), re.MULTILINE):
        plain = re.sub(r"int64_t\{(\w+)\}", r"\1", value)
        if re.fullmatch(r"(0x)?[\dA-Fa-f]+( << \d+)?", plain):
            found[macro or name] = eval(plain)
    return found


def spelled(name: str, prefix: str) -> str:
    """An objective as an enumerator: the name of its class, if it has one of its own."""
    words = REGISTRY[name].__name__ if name in REGISTRY else pascal_case(name)
    return "k" + prefix + words.removeprefix(prefix)


def pascal_case(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


@pytest.mark.parametrize(
    ("header", "enum", "prefix", "known"),
    [
        ("cpu/api.h", "UnilogitObjective", "Unilogit", frozenset(ids.OBJECTIVE_IDS)),
        ("cuda/row_math.h", "Objective", "", ids.GPU_OBJECTIVES),
    ],
)
def test_objectives(header: str, enum: str, prefix: str, known: frozenset[str]) -> None:
    found = enumerators(header, enum)
    assert found.pop("kNoObjective", ids.NO_OBJECTIVE) == ids.NO_OBJECTIVE
    assert found == {spelled(name, prefix): ids.OBJECTIVE_IDS[name] for name in known}


def test_needs_of_the_cpu_library() -> None:
    """The bits of `RowNeeds` by the names of its fields, in order."""
    fields = row_state.RowNeeds._fields
    assert enumerators("cpu/api.h", "UnilogitNeeds") == {
        "kUnilogit" + pascal_case(name): row_state.RowNeeds(**{name: True}).bits for name in fields
    }


def test_rows_of_the_cpu_library() -> None:
    """Enumerated from 0 on, in the order of Python's."""
    rows = r"enum {}Row {{ ([\w, ]*) }};"
    source = (CSRC / "cpu/log_odds.cpp").read_text()
    for name, expected in (
        ("State", ["Max", "Sum", "Target", "RunnerUp", "Count", "Linear", "Dot", "Square"]),
        ("Slope", ["Rest", "AtLabel", "AtRunnerUp", "Tilt", "Uniform"]),
    ):
        (found,) = re.findall(rows.format(name), source)
        assert found.split(", ") == ["k" + each for each in expected]
    assert (row_state.RUNNER_UP, row_state.COUNT, row_state.SQUARE) == (3, 4, 7)
    assert (statistics.REST, statistics.AT_RUNNER_UP, statistics.UNIFORM) == (0, 2, 4)


@pytest.mark.parametrize(
    ("header", "enum", "prefix"),
    [("cpu/api.h", "UnilogitType", "kUnilogit"), ("cuda/pair_kernels.h", "Type", "k")],
)
def test_dtypes(header: str, enum: str, prefix: str) -> None:
    assert enumerators(header, enum) == {
        prefix + geometry.TYPES[dtype]: i for dtype, i in ids.DTYPE_IDS.items()
    }
    assert constants("cpu/api.h")["kTypes"] == len(ids.DTYPE_IDS)


def test_needs() -> None:
    assert enumerators("cuda/row_parts.h", "Need") == {
        "kNeeds" + pascal_case(name): row_state.RowNeeds(**{name: True}).bits
        for name in row_state.RowNeeds._fields
    }


@pytest.mark.parametrize(
    ("header", "enum", "prefix", "module", "names"),
    [
        ("cuda/row_parts.h", "StateRow", "State", row_state, STATE_ROWS),
        ("cuda/row_math.h", "SlopeRow", "Slope", statistics, SLOPE_ROWS),
    ],
)
def test_rows(
    header: str, enum: str, prefix: str, module: ModuleType, names: Sequence[str]
) -> None:
    assert enumerators(header, enum) == {
        "k" + prefix + pascal_case(name): getattr(module, name) for name in names
    }


def test_statuses_of_the_cpu_library() -> None:
    assert enumerators("cpu/api.h", "UnilogitStatus") == {
        "kUnilogitOk": 0,
        "kUnilogitOutOfMemory": library.OUT_OF_MEMORY,
        "kUnilogitUnsupported": library._UNSUPPORTED,
    }


@pytest.mark.parametrize(
    ("header", "name", "expected"),
    [
        ("cpu/api.h", "UNILOGIT_INTERFACE", library._INTERFACE),
        ("cpu/api.h", "kUnilogitStudentIsA", kernels._STUDENT_IDS["a"]),
        ("cpu/api.h", "kNoColumn", row_state.NO_COLUMN),
        ("cuda/row_parts.h", "kNoColumn", row_state.NO_COLUMN),
        ("cuda/row_walk.h", "kFlightBytes", log_odds._FLIGHT_BYTES),
        ("cuda/row_walk.h", "kFewerFlightBytes", log_odds._FEWER_FLIGHT_BYTES),
        ("cuda/pair_math.h", "kPairFields", pair_state.B_SUM + 1),
        ("cpu/rows.h", "kStreamBytes", cpu_rows.STREAM_BYTES),
    ],
)
def test_constants(header: str, name: str, expected: int) -> None:
    assert constants(header)[name] == expected


def test_columns_of_a_pair_in_flight() -> None:
    found = constants("cuda/pair_kernels.h")
    assert found["kPairVector"] * found["kPairVectors"] == divergence._PAIR_COLUMNS


def test_columns_of_a_state_are_int32() -> None:
    """As `kNoColumn` and every column of a state are."""
    assert torch.iinfo(torch.int32).max == row_state.NO_COLUMN
