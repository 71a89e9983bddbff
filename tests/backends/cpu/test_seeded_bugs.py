"""Bugs that are put into the C++ sources of moments and general rows, each of which must be caught.

All of them are in one library, which has only the instruction set of every machine; a variable of
its chooses the bug.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.backends import test_statistics_kernels as shared
from tests.backends.cpu import test_general_rows as general
from tests.backends.cpu import test_weighted_statistics as weighted
from tests.backends.cpu.rows import CAPPED, KERNELS
from tests.support import ROOT
from unilogit_kernels.backends.cpu import library

SOURCES = ROOT / "csrc/cpu"
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-fopenmp", "-ffp-contract=off", "-fPIC", "-w"]

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(600),
    pytest.mark.skipif(COMPILER is None, reason="there is no g++"),
]


class Bug(NamedTuple):
    """An expression or a statement that is in a file once, and what replaces it."""

    file: str
    right: str
    wrong: str


def of_moments(right: str, wrong: str) -> Bug:
    return Bug("moment_kernels.h", right, wrong)


def of_log_odds(right: str, wrong: str) -> Bug:
    return Bug("log_odds.cpp", right, wrong)


def of_sweep(right: str, wrong: str) -> Bug:
    return Bug("sweep.cpp", right, wrong)


DOTS = "weight * part.dot + share * move"
SQUARES = "weight * part.square + share * off * off"
AT_LABEL = "by_d + by_logsumexp * p - expected(p, tilt * label_above_rest) + uniform"
TOTAL = "std::log(sum) + ((d > 0 ? d : 0.0) + std::log1p(tail_exp))"
CAPPED_EXPONENTIAL = "if constexpr (!kStored) e = e * slope;"

BUGS = {
    "the label is counted": of_moments("has_label ? count - 1 : count", "count"),
    "padding in the linear sum": of_moments(
        "for (int64_t k = count; k < padded; ++k) z[k] = max;", ";"
    ),
    "the label in the linear sum": of_moments("z[label.offset] = max;", ";"),
    "the linear sum does not move": of_moments("part.count * move", "0.0 * move"),
    "the sum of products does not move": of_moments(DOTS, "weight * part.dot"),
    "products of another scale": of_moments(DOTS, "part.dot + share * move"),
    "0 times infinity in a product": of_moments(
        "fma(e, above_underflow(s), dot_[i])", "fma(e, s, dot_[i])"
    ),
    "0 times infinity in a square": of_moments(
        "above_underflow(load(x + k) - broadcast(max))", "load(x + k) - broadcast(max)"
    ),
    "squares about 0": of_moments(
        "sum_squares(x, padded, finite_shift(moments.max), mean, exponentials)",
        "sum_squares(x, padded, finite_shift(moments.max), 0.0f, exponentials)",
    ),
    "nothing between parts": of_moments(SQUARES, "weight * part.square"),
    "means that do not move": of_moments(
        "static_cast<double>(part.dot) / part.sum + move - mean",
        "static_cast<double>(part.dot) / part.sum - mean",
    ),
    "squares of another scale": of_moments(SQUARES, "part.square + share * off * off"),
    "an empty part has a mean": of_moments("if (share == 0.0) return;", ";"),
    "the cap's slope of exponentials that are kept": of_moments(
        "exponentials != nullptr && transform.softcap != 0.0f", "false"
    ),
    "a mean of exponentials": of_moments("linear_[i] + s", "linear_[i] + e"),
    "logsumexp about the maximum": of_moments("shift + total", "total"),
    "no rest at all": of_moments(f"empty ? target : {TOTAL}", TOTAL),
    "derivative of the square": of_moments(
        "2.0 * terms.squared_logsumexp * logsumexp", "terms.squared_logsumexp * logsumexp"
    ),
    "infinity times no tail": of_moments(
        "(size < kSaturated ? size : kSaturated) * tail", "size * tail"
    ),
    "the label is not in the mean": of_moments("rest.linear + label_excess", "rest.linear"),
    "the label is not in the softmax's mean": of_moments(
        "expected(p, label_excess) + q * rest_mean", "q * rest_mean"
    ),
    "nothing times minus infinity": of_moments(
        "probability == 0.0 ? 0.0 : probability * x", "probability * x"
    ),
    "the label's share of the entropy": of_moments(AT_LABEL, "by_d + by_logsumexp * p + uniform"),
    "the label has no constant": of_moments(AT_LABEL, AT_LABEL.removesuffix(" + uniform")),
    "the label's share of the logsumexp": of_moments(
        AT_LABEL, "by_d - expected(p, tilt * label_above_rest) + uniform"
    ),
    "0 times infinity in a row": of_moments(
        "fma(tilt, above_underflow(load(x + k) - shift), rest)",
        "fma(tilt, load(x + k) - shift, rest)",
    ),
    "a tilt that is left out": of_moments("factors.tilt != 0.0f", "factors.tilt == 0.0f"),
    "the cap's slope of the constant": of_moments("uniform = uniform * slope;", ";"),
    "the cap's slope of the exponential": of_moments(CAPPED_EXPONENTIAL, ";"),
    "the cap's slope twice": of_moments(CAPPED_EXPONENTIAL, "e = e * slope;"),
    "moments so far": of_log_odds("earlier.*moment = value;", ";"),
    "a row of more than zeros": of_log_odds("which < slope_rows_", "which < 3"),
    "a sum of nothing": of_log_odds("sum == 0.0f ? 1.0 : sum", "sum"),
    "a maximum of nothing": of_log_odds("finite_shift(max)", "max"),
    "the constant's scale": of_log_odds("slope(kUniform, row) * scale", "slope(kUniform, row)"),
    "the tilt's scale": of_log_odds("slope(kTilt, row) * scale", "slope(kTilt, row)"),
    "the cap's slope at the runner-up": of_log_odds(
        "cap_slope == nullptr ? 1.0f : cap_slope[offset]", "1.0f"
    ),
    "the cap's slope at the label": of_log_odds("label = staged.label;", ";"),
    "the weight of a block's tilt": of_sweep("weight * pending.tilt", "pending.tilt"),
    "the maximum of the row": of_sweep("pending.shift = finite_shift(rest.max);", ";"),
    "the constant under a cap": of_sweep("(capped() && pending.constant != 0.0f)", "false"),
    "the constant twice": of_sweep(
        "if (!is_unfinished(pending)) writer.constant = pending.constant;",
        "writer.constant = pending.constant;",
    ),
    "the constant of a segment": of_sweep(
        "segment.writer = writer_of(segment, first * kBlock);",
        "segment.writer = make_writer(*out_, rows[k], first * kBlock, stream_);",
    ),
    "the constant has no weight": of_sweep(
        "static_cast<float>(scale * result.uniform)",
        "static_cast<float>(transform_.scale * result.uniform)",
    ),
    "a row of weights without a rest": of_sweep("rest.sum == 0.0f ? 1.0 : rest.sum", "rest.sum"),
    "a mean that nobody adds up": of_sweep("terms.uniform != 0.0 ? kUnilogitMean : 0", "0"),
    "one by one without the constant": Bug(
        "row_kernels.h",
        "gradient_value<kConstant>(block.exponentials[k], block.factor, writer.constant)",
        "gradient_value<kConstant>(block.exponentials[k], block.factor, 0.0f)",
    ),
}

CHOICE = "unilogit_seeded_bug"
"""A variable of the library: the number of the bug that it has, or -1."""

DECLARATION = f'extern "C" int {CHOICE};\n'
OTHER_INSTRUCTION_SETS = f"""
#include "rows.h"
{DECLARATION}
int {CHOICE} = -1;
namespace unilogit {{
const Kernels kAvx2Kernels{{"left out"}}, kAvx512Kernels{{"left out"}};
const Kernels kAvx512Bf16Kernels{{"left out"}};
}}
"""
LEFT_OUT = re.compile(r"(isa|moments)_avx\w+\.cpp")


def seed(text: str, file: str) -> str:
    """Let the variable choose between what is right and the bugs that are put there."""
    wrongs: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for number, bug in enumerate(BUGS.values()):
        if bug.file == file:
            wrongs[bug.right].append((number, bug.wrong))
    for right, bugs in wrongs.items():
        assert text.count(right) == 1, f"{file} has changed: {right!r}"
        is_statement = right.endswith(";")
        seeded = f"{{ {right} }}" if is_statement else f"({right})"
        for number, wrong in bugs:
            chosen = f"{CHOICE} == {number}"
            if is_statement:
                seeded = f"{{ if ({chosen}) {{ {wrong} }} else {seeded} }}"
            else:
                seeded = f"({chosen} ? ({wrong}) : {seeded})"
        text = text.replace(right, seeded)
    return text


@pytest.fixture
def choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.c_int]:
    """Chooses the bug of the library that calls go to, which has all of them."""
    sources = shutil.copytree(SOURCES, tmp_path / "sources")
    for file in {bug.file for bug in BUGS.values()}:
        path = sources / file
        path.write_text(seed(path.read_text(), file))
    (sources / "seeded.h").write_text(DECLARATION)
    (sources / "others.cpp").write_text(OTHER_INSTRUCTION_SETS)
    units = [unit for unit in sources.glob("*.cpp") if not LEFT_OUT.fullmatch(unit.name)]

    def compile_unit(unit: Path) -> Path:
        to = unit.with_suffix(".o")
        command = [*FLAGS, "-include", str(sources / "seeded.h"), "-c", str(unit), "-o", str(to)]
        subprocess.run([str(COMPILER), *command], check=True)
        return to

    path = tmp_path / "kernels.so"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(each) for each in pool.map(compile_unit, units)]
    subprocess.run([str(COMPILER), "-shared", "-fopenmp", *objects, "-o", str(path)], check=True)
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(path))
    monkeypatch.setenv(library.INSTRUCTION_SET_VARIABLE, "baseline")
    library.load_library.cache_clear()
    yield ctypes.c_int.in_dll(library.load_library(), CHOICE)
    monkeypatch.undo()
    library.load_library.cache_clear()


def run_tests() -> None:
    """Those of what the bugs are in, a few of each; what takes longest comes last."""
    isa, everything, float32 = "baseline", shared.EVERYTHING, torch.float32
    for name, transform in shared.TRANSFORMS.items():
        for at in ((), (1, 100, 480)):
            shared.test_statistics(KERNELS, float32, "everything", name, at)
            shared.test_gradient_in_place(KERNELS, float32, transform, everything, at)
    shared.test_shards_merge(KERNELS, float32)
    shared.test_common_offsets(KERNELS, 1e8)
    shared.test_variance_below_one_peak(KERNELS, 12.0)
    shared.test_hard_rows(KERNELS, (100, 300))
    shared.test_gradient_of_hard_rows(KERNELS)
    general.test_rows_of_one_coefficient(isa)
    for name in ("all", "smoothing", "entropy alone"):
        weighted.test_sweep(isa, weighted.WEIGHTS[name], float32)
        weighted.test_hard_rows(isa, float32, weighted.WEIGHTS[name], 40)
        for transform in (shared.PLAIN, CAPPED):
            weighted.test_in_place_in_any_layout_on_any_threads(
                isa, weighted.WEIGHTS[name], transform, float32
            )


def is_caught() -> bool:
    torch.manual_seed(0)
    try:
        run_tests()
    except AssertionError:
        return True
    return False


def test_bugs_are_caught(choice: ctypes.c_int) -> None:
    """One test, since all of them are compiled at once."""
    assert not is_caught(), "without a bug"
    survivors = []
    for number, name in enumerate(BUGS):
        choice.value = number
        if not is_caught():
            survivors.append(name)
    assert not survivors
