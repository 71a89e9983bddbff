"""Broken kernels, each of which some check must catch: a check that cannot fail proves nothing."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ptxsim import KernelFaultError, Schedule
from ptxsim.triton_device import triton_device
from tests.backends import test_layouts
from tests.backends.triton.battery import (
    CAPPED,
    PLAIN,
    SCALED,
    Case,
    check_bad_labels,
    check_chunks,
    check_distant_rows,
    check_magnitudes,
    check_runner_up,
    check_statistics,
    check_sweep,
)
from tests.backends.triton.small_problems import SHARES, small_problems
from unilogit_kernels.backends.triton import divergence, geometry, kernels, log_odds
from unilogit_kernels.backends.triton.geometry import options_of

# That checks can fail is no matter of the compiler.
pytestmark = [pytest.mark.pinned_triton, pytest.mark.prove]

WHOLE, SPLIT = SHARES
PACKAGE = kernels.__name__


@dataclass(frozen=True)
class Mutant:
    """A change of one place in the source of the kernels.

    Attributes:
        file: Of the kernels.
        before: What the file says, exactly once.
        after: What it says in the mutant.
        check: That must fail.
        case: What it is given.
        share: How rows are shared.
    """

    file: str
    before: str
    after: str
    check: Callable[[Case], None] = check_sweep
    case: Case = Case()  # noqa: RUF009 (frozen)
    share: str = WHOLE


def _of_parts(before: str, after: str, case: Case = Case(v=6000)) -> Mutant:  # noqa: B008 (frozen)
    """A change of what is computed of rows beside their log-odds."""
    return Mutant("row_parts.py", before, after, check_statistics, case, SPLIT)


def _of_rows(before: str, after: str, case: Case = Case()) -> Mutant:  # noqa: B008 (frozen)
    """A change of gradient rows of five slopes."""
    return Mutant("log_odds_tiles.py", before, after, check_statistics, case)


BF16 = Case(torch.bfloat16)
MUTANTS = {
    "mask of the tail": Mutant(
        "row_walk.py",
        "return columns, vectors < share.tail_vectors",
        "return columns, vectors < share.tail_vectors + 1",
    ),
    "mask of the ends": Mutant(
        "row_walk.py", "lane < share.ends\n", "lane < share.ends + 1\n", case=BF16
    ),
    "ends that are forgotten": Mutant(
        "row_walk.py",
        "columns, inside = end_columns(share, WALK)\n        parts = FOLD(",
        "columns, inside = end_columns(share, WALK)\n        FOLD(",
        case=Case(objective="cross_entropy"),
    ),
    "64 bits of offsets": Mutant(
        "row_walk.py",
        "offset + row_index * row_stride",
        "offset + row_index.to(tl.int32) * row_stride",
        check_distant_rows,
        BF16,
    ),
    "masked lanes in the sum": Mutant(
        "log_odds_tiles.py",
        "            z = tl.where(inside, z, NEGATIVE_INFINITY)\n",
        "            z = z\n",
        case=Case(transform=CAPPED),
    ),
    "plain masked lanes in the sum": Mutant(
        "log_odds_tiles.py",
        "WALK.strided, NEGATIVE_INFINITY)",
        "WALK.strided)",
    ),
    "label in the rest": Mutant(
        "log_odds_tiles.py", "z = tl.where(columns == label, NEGATIVE_INFINITY, z)", "z = z + 0.0"
    ),
    "label in the wrong tile": Mutant(
        "row_walk.py",
        "        is_near = label_in_body // BLOCK == block\n        columns",
        "        is_near = label_in_body // BLOCK == block + 1\n        columns",
        case=Case(v=6000, n=4, layout="contiguous"),
    ),
    "first boundary": Mutant(
        "row_walk.py",
        "peeled = tl.minimum((WALK.alignment - beyond) % WALK.alignment, v)",
        "peeled = tl.minimum(beyond, v)",
        case=BF16,
    ),
    "one part alone owns the tail": Mutant(
        "row_walk.py",
        "is_last = part == parts - 1",
        "is_last = part >= 0",
        share=SPLIT,
        case=Case(in_place=True),
    ),
    "rescaling of the sum": Mutant(
        "row_parts.py",
        "        row_sum = part.row_sum * weight + tile_sum\n",
        "        row_sum = part.row_sum + tile_sum\n",
        case=Case(v=6000),
    ),
    "rescaling of the sum, scaled": Mutant(
        "row_parts.py",
        "    row_sum = part.row_sum * weight + tile_sum\n    if",
        "    row_sum = part.row_sum + tile_sum\n    if",
        case=Case(v=6000, transform=SCALED),
    ),
    "maximum of halves of words": Mutant(
        "row_parts.py",
        "max.bf16x2 $0, $1, $2;",
        "min.bf16x2 $0, $1, $2;",
        check_runner_up,
        Case(torch.bfloat16, v=12_000),
    ),
    "merge of threads": Mutant(
        "row_parts.py",
        "tl.exp2(rounded_product(part.row_max, factor) + shift)\n        binary_sum",
        "1.0\n        binary_sum",
    ),
    "merge of threads, scaled": Mutant(
        "row_parts.py",
        "shares = part.row_sum * weight\n",
        "shares = part.row_sum\n",
        case=Case(transform=SCALED),
    ),
    "excess": Mutant(
        "row_maths.py",
        "excess = SIGN * tl.fma(row_max, factor, shift)",
        "excess = SIGN * 0.0 * row_max",
        check_magnitudes,
    ),
    "small excess": Mutant(
        "row_maths.py",
        "tl.fma(row_sum, excess * LN_2, row_sum)",
        "tl.fma(row_sum, excess * LOG2_E, row_sum)",
        check_magnitudes,
    ),
    "product that overflows": Mutant(
        "row_maths.py",
        "tl.where(tl.abs(row_max) < ALL_OR_NOTHING, LOG2_E, 1.0)",
        "tl.where(tl.abs(row_max) < 3.5e38, LOG2_E, 1.0)",
        check_magnitudes,
    ),
    "state so far": Mutant(
        "log_odds.py",
        "merged = merge_two(so_far, merged, LOGITS)",
        "merged = merged",
        check_chunks,
    ),
    "state so far, split": Mutant(
        "log_odds.py",
        "where_part(i == count, so_far, known)",
        "known",
        check_chunks,
        share=SPLIT,
    ),
    "parts that do not exist": Mutant(
        "row_parts.py",
        "tl.load(pointer, mask=mask, other=other)",
        "tl.load(pointer)",
        check_chunks,
        Case(v=4500),
        share=SPLIT,
    ),
    "natural exponential": Mutant(
        "log_odds_tiles.py", "tl.exp2(s * LOG2_E)", "tl.exp2(s)", case=Case(transform=SCALED)
    ),
    "natural exponential of a plain logit": Mutant(
        "log_odds_tiles.py", "tl.exp2(exponent(z, factor, shift))", "tl.exp2(z - row.row_max)"
    ),
    "derivative of the scale": Mutant(
        "log_odds_tiles.py",
        "rest = slopes.rest * derivative",
        "rest = slopes.rest",
        case=Case(transform=SCALED),
    ),
    "derivative of the cap": Mutant(
        "log_odds_tiles.py",
        "        values = values * slope\n",
        "        values = values * 1.0\n",
        case=Case(transform=CAPPED),
    ),
    "rows of weight 0": Mutant(
        "log_odds_tiles.py", "    if size == 0.0:\n", "    if size == 2e30:\n"
    ),
    "of equal logits the last": Mutant(
        "row_parts.py",
        "first = tl.where(tile_max == row_max, tl.minimum(first, column), first)",
        "first = first + 0",
        check_runner_up,
        Case(v=6000),
    ),
    "merge of columns": Mutant(
        "row_parts.py",
        "tl.min(tl.where(part_max == row_max, part_column, NO_COLUMN), 0)",
        "tl.min(part_column, 0)",
        check_runner_up,
    ),
    "column so far, split": Mutant(
        "row_parts.py",
        "tl.where(condition, a.column, b.column)",
        "b.column",
        check_runner_up,
        share=SPLIT,
    ),
    "label among the runners-up": Mutant(
        "log_odds_tiles.py",
        "z = tl.where(columns == label, NEGATIVE_INFINITY, z)",
        "z = z + 0.0",
        check_runner_up,
    ),
    "runner-up counted from the boundary": Mutant(
        "log_odds_tiles.py",
        "runner_up_in_body = slopes.runner_up - share.peeled",
        "runner_up_in_body = slopes.runner_up",
        check_runner_up,
    ),
    "columns of -inf in the count": _of_parts(
        "is_there = z != NEGATIVE_INFINITY", "is_there = z == z"
    ),
    "columns of a tile": _of_parts(
        "count = known.count + columns", "count = known.count + 1 + columns"
    ),
    "columns so far": _of_parts("count = known.count + columns", "count = 0.0 + columns"),
    "a sum without its column of -inf": _of_parts(
        "tl.where(part.count < count, NEGATIVE_INFINITY, linear)", "linear"
    ),
    "count of a part": _of_parts(
        "tl.where(condition, a.count, b.count)", "tl.where(condition, 0.0, b.count)"
    ),
    "move of a sum": _of_parts(
        "linear += count * (finite_shift(part.row_max) - shift)", "linear += 0.0"
    ),
    "move of a sum between parts": _of_parts(
        "part.linear + part.count * (finite_shift(part.row_max) - shift)", "part.linear"
    ),
    "move of a dot product": Mutant(
        "row_maths.py",
        "weight * (dot + row_sum * (move - other_move))",
        "weight * dot",
        check_statistics,
    ),
    "weight of a dot product": Mutant(
        "row_maths.py",
        "dot = weight * (dot + row_sum * (move - other_move))",
        "dot = dot + row_sum * (move - other_move)",
        check_statistics,
    ),
    "a dot product of no weight": Mutant(
        "row_maths.py", "tl.where(weight == 0.0, 0.0, dot)", "dot", check_statistics
    ),
    "ratio of nothing": Mutant(
        "row_maths.py", "a / tl.where(b == 0.0, 1.0, b)", "a / b", check_statistics
    ),
    "0 * inf in a dot product": _of_parts("s = tl.maximum(s, LOWEST)\n", "s = s + 0.0\n"),
    "squares about 0": _of_parts(
        "gap = s - tile_mean[None, :, None]", "gap = s - 0.0 * tile_mean[None, :, None]"
    ),
    "squares between tiles": _of_parts(
        "square += ratio(old_share * tile_sum, row_sum) * (between * between)", "square += 0.0"
    ),
    "weight of squares": _of_parts("square = square * weight + tl.sum", "square = square + tl.sum"),
    "squares between parts": _of_parts(
        "weight * part.square + shares * (between * between)", "weight * part.square"
    ),
    "weight of the squares of parts": _of_parts(
        "weight * part.square + shares * (between * between)",
        "part.square + shares * (between * between)",
    ),
    "tilt": _of_rows("slopes.rest + slopes.tilt * tl.maximum(s, LOWEST)", "slopes.rest"),
    "0 * inf in a gradient": _of_rows("slopes.tilt * tl.maximum(s, LOWEST)", "slopes.tilt * s"),
    "sum of the tilt": _of_rows(
        "tilt = -slopes.tilt * derivative / row_sum", "tilt = -slopes.tilt * derivative"
    ),
    "derivative of the tilt": _of_rows(
        "tilt = -slopes.tilt * derivative / row_sum",
        "tilt = -slopes.tilt / row_sum",
        Case(transform=SCALED),
    ),
    "uniform": _of_rows("slopes.uniform + terms * tilted", "terms * tilted"),
    "derivative of the uniform": _of_rows(
        "uniform = slopes.uniform * derivative", "uniform = slopes.uniform", Case(transform=SCALED)
    ),
    "cap of the uniform": _of_rows(
        "        values = values * slope\n",
        "        values = slopes.uniform + (values - slopes.uniform) * slope\n",
        Case(transform=CAPPED),
    ),
    "runner-up of a general row": _of_rows(
        "        values = tl.where(columns == slopes.runner_up, slopes.at_runner_up, values)\n",
        "        values = values + 0.0\n",
    ),
    "size of a row with a tilt alone": _of_rows(
        "size = size + tl.abs(slopes.tilt) + tl.abs(slopes.uniform)",
        "size = size + tl.abs(slopes.uniform)",
    ),
    "size of a row that is uniform": _of_rows(
        "size = size + tl.abs(slopes.tilt) + tl.abs(slopes.uniform)",
        "size = size + tl.abs(slopes.tilt)",
    ),
    "sum of a row of nothing": _of_rows("tl.where(row_sum == 0.0, 1.0, row_sum)", "row_sum"),
    "maximum of a row of nothing": _of_rows(
        "row_max, row_sum = finite_shift(row_max), ", "row_max, row_sum = row_max, "
    ),
    "label as a pointer": Mutant(
        "row_walk.py",
        "return tl.where((column >= 0) & (column < v), column, -1).to(tl.int32)",
        "return tl.where(column >= 0, column, -1).to(tl.int32)",
        check_bad_labels,
        Case(n=6),
    ),
}


def mutated(mutant: Mutant, folder: Path, name: str) -> ModuleType:
    """The log-odds kernels of a copy of the package with the mutation in it."""
    copy = folder / name
    shutil.copytree(Path(str(kernels.__file__)).parent, copy)
    text = (copy / mutant.file).read_text()
    assert text.count(mutant.before) == 1, (
        f"{mutant.before!r} is there {text.count(mutant.before)}x"
    )
    (copy / mutant.file).write_text(text.replace(mutant.before, mutant.after))
    for file in copy.glob("*.py"):
        file.write_text(file.read_text().replace(PACKAGE, name))
    return importlib.import_module(f"{name}.log_odds")


@pytest.fixture
def _importable(tmp_path: Path) -> Iterator[None]:
    before = set(sys.modules)
    sys.path.insert(0, str(tmp_path))
    yield
    sys.path.remove(str(tmp_path))
    for name in set(sys.modules) - before:
        if name.startswith("mutant_"):
            del sys.modules[name]


@pytest.mark.usefixtures("_importable")
@pytest.mark.parametrize("name", MUTANTS)
def test_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    module = mutated(mutant, tmp_path, f"mutant_{list(MUTANTS).index(name)}")
    for kernel in dir(log_odds):
        if kernel.endswith("_kernel"):
            monkeypatch.setattr(log_odds, kernel, getattr(module, kernel))
    with (
        small_problems(mutant.share),
        # Looking for races would take memory for every element between distant rows.
        triton_device(90, schedule=Schedule(check_races=mutant.check is not check_distant_rows)),
        pytest.raises((KernelFaultError, AssertionError)),
    ):
        mutant.check(mutant.case)


ONE_MODEL, TWO_MODELS = test_layouts.test_logits_and_output, test_layouts.test_two_models_and_output
NARROW, WIDE = torch.bfloat16, torch.float32
ALIGNMENTS: dict[str, tuple[str, str, Callable[..., None], tuple[object, ...]]] = {
    "strides of two matrices of three": (
        "if self.strided:",
        "if place.column_stride != 1 or self.leading.column_stride != 1:",
        TWO_MODELS,
        ("contiguous", WIDE, WIDE),
    ),
    "strides of the leading matrix alone": (
        "in (self.leading, *self.others)",
        "in (self.leading,)",
        ONE_MODEL,
        ("inner stride", WIDE, WIDE),
    ),
    "rows that begin elsewhere": (
        "further % elements or longer",
        "longer",
        ONE_MODEL,
        ("unaligned", NARROW, NARROW),
    ),
    "rows at another distance": (
        "further % elements or longer",
        "further",
        ONE_MODEL,
        ("padded rows", NARROW, NARROW),
    ),
    "boundaries of a narrower dtype": (
        "min(vector_of(place.dtype), vector_of(self.leading.dtype))",
        "vector_of(place.dtype)",
        TWO_MODELS,
        ("contiguous", WIDE, NARROW),
    ),
}
"""Changes of `Matrices`, a test of mixed layouts that each must fail, and its layout and dtypes."""


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_wrong_alignment_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, test, case = ALIGNMENTS[name]
    source = Path(str(geometry.__file__)).read_text()
    assert source.count(before) == 1, f"{before!r} is there {source.count(before)}x"
    mutant = ModuleType(geometry.__name__)
    exec(source.replace(before, after), mutant.__dict__)
    for launches in (log_odds, divergence):
        monkeypatch.setattr(launches, "Matrices", mutant.Matrices)
    with (
        small_problems(WHOLE),
        triton_device(90),
        pytest.raises((KernelFaultError, AssertionError)),
    ):
        test("triton", *case)


@pytest.mark.parametrize("warps", [2, 4])
def test_two_warps_that_merge_race(warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `merge_parts_kernel` has one warp: a barrier is missing between others."""
    monkeypatch.setattr(log_odds, "options_of", lambda chosen, **_: options_of(chosen, warps))
    with (
        small_problems(SPLIT),
        triton_device(90, schedule=Schedule()),
        pytest.raises(KernelFaultError, match="data race"),
    ):
        check_chunks(Case(transform=PLAIN))
