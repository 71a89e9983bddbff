"""Bugs that are put into the C++ sources of moments and general rows, each of which must be caught.

Only what a bug touches is compiled anew, for the instruction set that every machine has.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
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
    """Text that is in a file once, and what replaces it; which source must be compiled for it."""

    file: str
    before: str
    after: str
    compiled: str


def of_moments(before: str, after: str) -> Bug:
    return Bug("moment_kernels.h", before, after, "moments_baseline")


def of_log_odds(before: str, after: str) -> Bug:
    return Bug("log_odds.cpp", before, after, "log_odds")


def of_sweep(before: str, after: str) -> Bug:
    return Bug("sweep.cpp", before, after, "sweep")


BUGS = {
    "the label is counted": of_moments("has_label ? count - 1 : count", "count"),
    "padding in the linear sum": of_moments("k < padded; ++k) z[k] = max;", "k < padded; ++k) {}"),
    "the label in the linear sum": of_moments("z[label.offset] = max;", "{}"),
    "the linear sum does not move": of_moments("part.count * move", "0.0 * move"),
    "the sum of products does not move": of_moments(
        "weight * part.dot + share * move", "weight * part.dot"
    ),
    "products of another scale": of_moments("weight * part.dot + share", "part.dot + share"),
    "0 times infinity in a product": of_moments(
        "fma(e, above_underflow(s), dot_[i])", "fma(e, s, dot_[i])"
    ),
    "0 times infinity in a square": of_moments(
        "= above_underflow(load(x + k) - broadcast(max))", "= (load(x + k) - broadcast(max))"
    ),
    "squares about 0": of_moments(
        "finite_shift(moments.max), mean, exponentials",
        "finite_shift(moments.max), 0.0f, exponentials",
    ),
    "nothing between parts": of_moments(" + share * off * off", ""),
    "means that do not move": of_moments("/ part.sum + move - mean", "/ part.sum - mean"),
    "squares of another scale": of_moments("weight * part.square", "part.square"),
    "an empty part has a mean": of_moments("if (share == 0.0) return;", ""),
    "the cap's slope of exponentials that are kept": of_moments(
        "exponentials != nullptr && transform", "false && transform"
    ),
    "a mean of exponentials": of_moments("linear_[i] + s;", "linear_[i] + e;"),
    "logsumexp about the maximum": of_moments("logsumexp = shift + total", "logsumexp = total"),
    "no rest at all": of_moments("empty ? target : std::log(sum)", "std::log(sum)"),
    "derivative of the square": of_moments(
        "2.0 * terms.squared_logsumexp", "terms.squared_logsumexp"
    ),
    "infinity times no tail": of_moments(
        "(size < kSaturated ? size : kSaturated) * tail", "size * tail"
    ),
    "the label is not in the mean": of_moments("(rest.linear + label_excess)", "rest.linear"),
    "the label is not in the softmax's mean": of_moments("expected(p, label_excess) + q", "q"),
    "nothing times minus infinity": of_moments(
        "probability == 0.0 ? 0.0 : probability * x", "probability * x"
    ),
    "the label's share of the entropy": of_moments(" - expected(p, tilt * label_above_rest)", ""),
    "the label has no constant": of_moments("label_above_rest) + uniform,", "label_above_rest),"),
    "the label's share of the logsumexp": of_moments("by_d + by_logsumexp * p", "by_d"),
    "0 times infinity in a row": of_moments(
        "fma(tilt, above_underflow(load(x + k) - shift), rest)",
        "fma(tilt, load(x + k) - shift, rest)",
    ),
    "a tilt that is left out": of_moments("factors.tilt != 0.0f;", "factors.tilt == 0.0f;"),
    "the cap's slope of the constant": of_moments("uniform = uniform * slope;", ""),
    "the cap's slope of the exponential": of_moments("e = e * slope;", "e = e;"),
    "the cap's slope twice": of_moments("if constexpr (!kStored) e = e * slope;", "e = e * slope;"),
    "moments so far": of_log_odds("earlier.*moment = value;", ""),
    "a row of more than zeros": of_log_odds("which < slope_rows_; ++which", "which < 3; ++which"),
    "a sum of nothing": of_log_odds("sum == 0.0f ? 1.0 : sum", "sum"),
    "a maximum of nothing": of_log_odds("finite_shift(max), static_cast", "max, static_cast"),
    "the constant's scale": of_log_odds("slope(kUniform, row) * scale", "slope(kUniform, row)"),
    "the tilt's scale": of_log_odds("slope(kTilt, row) * scale", "slope(kTilt, row)"),
    "the cap's slope at the runner-up": of_log_odds(
        "cap_slope == nullptr ? 1.0f : cap_slope[offset]", "1.0f"
    ),
    "the cap's slope at the label": of_log_odds("    label = staged.label;\n", ""),
    "the weight of a block's tilt": of_sweep("weight * pending.tilt", "pending.tilt"),
    "the maximum of the row": of_sweep("pending.shift = finite_shift(rest.max);", ""),
    "the constant under a cap": of_sweep("(capped() && pending.constant != 0.0f)", "false"),
    "the constant twice": of_sweep("if (!is_unfinished(pending)) writer", "writer"),
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
        "exponentials[k], block.factor, writer.constant)",
        "exponentials[k], block.factor, 0.0f)",
        "moments_baseline",
    ),
}


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sources, compiled as they are."""
    folder = tmp_path_factory.mktemp("objects")
    for source in SOURCES.glob("*.cpp"):
        compile_object(source, folder / f"{source.stem}.o")
    return folder


def compile_object(source: Path, to: Path) -> None:
    subprocess.run([str(COMPILER), *FLAGS, "-c", str(source), "-o", str(to)], check=True)


def build(bug: Bug | None, objects: Path, folder: Path) -> Path:
    """The library, with a bug in it or without."""
    found = {path.stem: path for path in objects.glob("*.o")}
    if bug is not None:
        sources = shutil.copytree(SOURCES, folder / "sources")
        text = (sources / bug.file).read_text()
        assert text.count(bug.before) == 1, f"{bug.file} has changed: {bug.before!r}"
        (sources / bug.file).write_text(text.replace(bug.before, bug.after))
        found[bug.compiled] = folder / "bug.o"
        compile_object(sources / f"{bug.compiled}.cpp", found[bug.compiled])
    path = folder / "kernels.so"
    parts = [str(part) for part in found.values()]
    subprocess.run([str(COMPILER), "-shared", "-fopenmp", *parts, "-o", str(path)], check=True)
    return path


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    monkeypatch.undo()
    library.load_library.cache_clear()


def run_tests() -> None:
    """Those of what the bugs are in, a few of each."""
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


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("bug", [None, *BUGS.values()], ids=["none", *BUGS])
def test_bugs_are_caught(
    bug: Bug | None,
    objects: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(build(bug, objects, tmp_path)))
    monkeypatch.setenv(library.INSTRUCTION_SET_VARIABLE, "baseline")
    library.load_library.cache_clear()
    if bug is None:
        run_tests()
        return
    with pytest.raises(AssertionError):
        run_tests()
