"""What the tests of the C++ row kernels share: problems, the oracle, and a sweep held to it.

The bar is the error budget of `unilogit_kernels.testing`: twice what plain torch makes in float32,
cast once to the dtype of the output, plus one rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile
from unilogit_kernels.backends.cpu.kernels import WEIGHTED_STATISTICS, CpuKernels
from unilogit_kernels.backends.ids import OBJECTIVE_IDS
from unilogit_kernels.maths import row_state
from unilogit_kernels.testing import assert_within_budget

KERNELS: RowKernels = CpuKernels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = LogitTransform()
CAPPED = LogitTransform(scale=0.7, softcap=5.0)
TRANSFORMS = (PLAIN, LogitTransform(scale=-1.5), LogitTransform(softcap=30.0), CAPPED)
OBJECTIVES = sorted(set(OBJECTIVE_IDS) - {WEIGHTED_STATISTICS})
"""Those of the log-odds."""

STREAM_BYTES = 4 << 20
"""Outputs from this size on bypass the cache: `kStreamBytes` of `csrc/cpu/rows.h`."""

INF, NAN = math.inf, math.nan
SMALLEST = 2.0**-100
"""Rows below this need not be accurate: the next products of a training step underflow."""

# Enough rows each that plain torch's error is not a matter of luck.
SHAPES = [(16, 2), (17, 7), (16, 63), (16, 1000), (16, 2048), (16, 2049), (16, 4097), (19, 300)]


# ---- the oracle -------------------------------------------------------------------------------


class Oracle:
    """The definitions in torch: in float64 the truth, in float32 what plain torch makes of it."""

    def __init__(
        self, logits: Tensor, labels: Tensor, transform: LogitTransform, dtype: torch.dtype
    ) -> None:
        z = logits.to(dtype) * transform.scale
        self.cap_slope = torch.ones_like(z)
        if transform.softcap:
            tanh = torch.tanh(z / transform.softcap)
            z, self.cap_slope = transform.softcap * tanh, 1 - tanh.square()
        self.transform = transform
        self.v = logits.shape[1]
        exists = (labels >= 0) & (labels < self.v)
        column = labels.clamp(0, self.v - 1)[:, None]
        self.is_label = torch.zeros_like(z, dtype=torch.bool).scatter_(1, column, exists[:, None])
        self.rest = z.masked_fill(self.is_label, -math.inf)
        self.target = z.gather(1, column)[:, 0].masked_fill(~exists, -math.inf)
        self.rest_max = self.rest.amax(1)
        shift = self.rest_max.masked_fill(self.rest_max == -math.inf, 0.0)
        self.rest_sum = torch.exp(self.rest - shift[:, None]).sum(1)
        bad = z.isnan().any(1) | (z == math.inf).any(1) | ~exists | (z == -math.inf).all(1)
        log_odds = (self.target - shift) - torch.log(self.rest_sum)
        self.log_odds = torch.where(bad, math.nan, log_odds)
        softmax = torch.exp(self.rest - shift[:, None]) / self.rest_sum[:, None]
        self.softmax = softmax.masked_fill(self.is_label, 0.0)

    def gradient(self, slope: Tensor) -> Tensor:
        """The rows `slope * (onehot - softmax of the rest) * dz/dx`; zero where slope is zero."""
        row = self.is_label.to(self.softmax.dtype) - self.softmax
        row = row * self.cap_slope * (self.transform.scale * slope.to(row.dtype))[:, None]
        return row.masked_fill((slope == 0)[:, None], 0.0)


def oracles(logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Oracle, Oracle]:
    """The truth, and plain torch."""
    return (
        Oracle(logits, labels, transform, torch.float64),
        Oracle(logits, labels, transform, torch.float32),
    )


def assert_rows_within_budget(
    actual: Tensor, exact: Tensor, plain: Tensor, what: str, terms: Tensor | None = None
) -> None:
    """NaN is where the oracle has it; rows without are within the budget. `plain` is cast here.

    `terms` is the size, row by row, of the terms whose difference is the row's slope: no slope can
    be more accurate than they are.
    """
    assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaN lost or invented"
    whole = ~exact.isnan().any(1)
    actual, exact, plain = actual[whole], exact[whole], plain[whole].to(actual.dtype)
    if terms is None:
        assert_within_budget(actual, exact, plain, what, smallest_scale=SMALLEST)
        return
    # Division by a power of two is exact.
    scale = torch.exp2(torch.floor(torch.log2(terms[whole].clamp(min=SMALLEST))))[:, None]
    units = [(rows.double() / scale).to(rows.dtype) for rows in (actual, exact, plain)]
    assert_within_budget(units[0], units[1], units[2], what, smallest_scale=1.0)


# ---- problems -----------------------------------------------------------------------------------


def problem(n: int, v: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and slopes, peaked enough that rows differ in kind."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator) * 4
    labels = torch.randint(0, v, (n,), generator=generator)
    logits[::3].scatter_add_(1, labels[::3, None], torch.full((len(labels[::3]), 1), 12.0))
    slope = torch.randn(n, generator=generator)
    return logits.to(dtype), labels, slope


def folded_state(logits: Tensor, labels: Tensor, transform: LogitTransform, chunk: int) -> Tensor:
    state = row_state.empty_state(logits.shape[0], torch.device("cpu"))
    for first in range(0, logits.shape[1], chunk):
        columns = logits[:, first : first + chunk]
        KERNELS.log_odds_update(Tile(columns, labels, first, transform), state)
    return state


def slope_terms(objective: str, log_odds: Tensor, v: int) -> Tensor:
    """Size of the terms whose difference is the slope of an objective."""
    p, q = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    if objective == "unilogit":
        return p * q * (log_odds.abs().clamp(max=1e5) + math.log(v))
    return p + 1 / v if objective == "unilogit_forward" else q


def check_sweep(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    objective: str,
    transform: LogitTransform,
    out: Tensor | None,
) -> None:
    """One sweep against the oracle; `logits` may be `out`.

    Ordinary rows of plain torch's join the comparison, so that its error is no matter of luck.
    """
    n, v = logits.shape
    more, more_labels, more_weight = problem(32, v, logits.dtype, seed=1)
    all_weight = torch.cat((row_weight, more_weight))
    exact, plain = oracles(torch.cat((logits, more)), torch.cat((labels, more_labels)), transform)
    losses, slopes = [], []
    for oracle in (exact, plain):
        f = objectives.REGISTRY[objective]()
        skipped = all_weight == 0
        losses.append(f.value(oracle.log_odds, v).masked_fill(skipped, 0.0))
        slope = f.slope(oracle.log_odds, v) * all_weight.to(oracle.log_odds.dtype)
        slopes.append(slope.masked_fill(skipped, 0.0))
    loss = KERNELS.log_odds_sweep(
        Tile(logits, labels, transform=transform), row_weight, objective, v, out
    )
    loss = torch.cat((loss, losses[1][n:]))
    assert torch.equal(loss.isnan(), losses[0].isnan()), "loss: NaN lost or invented"
    unbounded = losses[0].isinf()
    assert torch.equal(loss[unbounded].double(), losses[0][unbounded])
    finite = losses[0].isfinite()
    assert_within_budget(
        loss[finite], losses[0][finite], losses[1][finite], "loss", smallest_scale=1.0
    )
    if out is not None:
        terms = slope_terms(objective, exact.log_odds, v) * all_weight.double().abs()
        terms = terms.masked_fill(all_weight == 0, 0.0)
        expected = plain.gradient(slopes[1])
        actual = torch.cat((out, expected[n:].to(out.dtype)))
        assert_rows_within_budget(actual, exact.gradient(slopes[0]), expected, objective, terms)


def hard_rows(v: int) -> dict[str, tuple[list[tuple[int, float]], int]]:
    """By name: entries that replace those of a random row, and the label."""
    return {
        "certain": ([(3, 1e4)], 3),
        "impossible": ([(3, -1e4)], 3),
        "label -inf": ([(3, -INF)], 3),
        "label +inf": ([(3, INF)], 3),
        "label NaN": ([(3, NAN)], 3),
        "other +inf": ([(v - 1, INF)], 3),
        "other NaN": ([(v - 1, NAN)], 3),
        "first NaN": ([(0, NAN)], 3),
        "label only": ([(j, -INF) for j in range(v) if j != 3], 3),
        "one other": ([(j, -INF) for j in range(v) if j != 4], 3),
        "nothing": ([(j, -INF) for j in range(v)], 3),
        "rest NaN": ([(j, NAN) for j in range(v) if j != 3], 3),
        "label below": ([], -1),
        "label ignored": ([], -100),
        "label above": ([], v),
        "label far above": ([], 2**40),
        "empty blocks": ([(j, -INF) for j in range(v // 3, v)], 3),
        "empty blocks before": ([(j, -INF) for j in range(v // 2)], v - 1),
        "shifted": ([(j, 1e4 + j % 7) for j in range(v)], 3),
        "far shifted": ([(j, 1e8 + 8 * (j % 7)) for j in range(v)], 3),
        "subnormal": ([(j, -90.0 - j % 14) for j in range(1, v)], 0),
    }


def hard_problem(v: int, dtype: torch.dtype) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """The names of all hard rows; their logits, labels and weights."""
    rows = hard_rows(v)
    logits = torch.randn(len(rows), v)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    for i, (entries, label) in enumerate(rows.values()):
        for column, value in entries:
            logits[i, column] = value
        labels[i] = label
    logits = logits.to(dtype)
    weight = torch.ones(len(rows))
    weight[list(rows).index("label ignored")] = 0.0
    return list(rows), logits, labels, weight
