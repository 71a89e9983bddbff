"""What the Triton kernels and their peers cost, read from compiled code and counted as it runs.

`benchmarks.static` prints these numbers; `test_static.py` and `test_traffic.py` hold the project's
own kernels to their budgets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ptxsim import Launch as ExecutedLaunch
from ptxsim import Schedule, collect
from ptxsim.triton_device import triton_device
from tests.backends.triton.aot import Launch, Resources, compiling_for, resources
from tests.support.caches import forget_layouts
from unilogit_kernels import unilogit_loss
from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, Tile, TilePair
from unilogit_kernels.backends.registry import load
from unilogit_kernels.backends.triton import settings
from unilogit_kernels.backends.triton.launch import TritonKernels
from unilogit_kernels.backends.triton.settings import Settings
from unilogit_kernels.maths import pair_state, row_state
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.testing import force_backend

MANY_ROWS = 4096
"""More rows than any GPU of the targets runs programs at a time."""

FEW_ROWS = 2
"""So few that each is split over programs."""


# ---- compiled ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one target.

    Attributes:
        owner: `ours`, or the name of a peer.
        use: What it was launched for.
        launch: The launch that compiled it.
        resources: What it takes.
    """

    owner: str
    use: str
    launch: Launch
    resources: Resources


def _logits(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits that nobody reads, so that memory is reserved but never touched; and labels."""
    return torch.empty(n, v, dtype=dtype, requires_grad=True), torch.zeros(n, dtype=torch.long)


def _loss_of_many_rows(v: int, dtype: torch.dtype, softcap: float | None) -> None:
    logits, labels = _logits(MANY_ROWS, v, dtype)
    unilogit_loss(logits, labels, softcap=softcap).backward()


def _loss_of_few_rows(v: int, dtype: torch.dtype, softcap: float | None) -> None:
    logits, labels = _logits(FEW_ROWS, v, dtype)
    unilogit_loss(logits, labels, softcap=softcap).backward()


def _rows_of_a_chunk(v: int, dtype: torch.dtype, softcap: float | None) -> None:
    """What fused linear losses launch for each chunk of logits."""
    logits, labels = _logits(MANY_ROWS, v, dtype)
    logits = logits.detach()
    transform = LogitTransform(1.0, softcap or 0.0)
    state = row_state.empty_state(MANY_ROWS, logits.device)
    kernels = load("triton")
    kernels.log_odds_update(Tile(logits, labels, transform=transform), state)
    slope = torch.ones(MANY_ROWS)
    kernels.log_odds_gradient(Tile(logits, labels, transform=transform), state, slope, logits)


def _statistics(needs: RowNeeds, v: int, dtype: torch.dtype, softcap: float | None) -> None:
    """Statistics beside the log-odds, in one stage and two, and gradients with their entries."""
    transform, kernels = LogitTransform(1.0, softcap or 0.0), load("triton")
    for n in (MANY_ROWS, FEW_ROWS):
        logits, labels = _logits(n, v, dtype)
        tile = Tile(logits.detach(), labels, transform=transform)
        state = row_state.empty_state(n, logits.device, needs=needs)
        kernels.log_odds_update(tile, state, needs)
        slope = torch.ones(5 if needs.general else 3, n)
        kernels.log_odds_gradient(tile, state, slope, tile.logits)


Use = Callable[[int, torch.dtype, float | None], None]
"""What is launched on logits of such a vocabulary, dtype and softcap."""

EVERYTHING = RowNeeds(*[True] * len(RowNeeds._fields))
USES: dict[str, Use] = {
    "loss, many rows": _loss_of_many_rows,
    "loss, few rows": _loss_of_few_rows,
    "chunk of many rows": _rows_of_a_chunk,
    "runner-up": functools.partial(_statistics, RowNeeds(runner_up=True)),
    "every statistic": functools.partial(_statistics, EVERYTHING),
}


def compile_ours(
    target: str,
    v: int,
    dtype: torch.dtype,
    softcap: float | None = None,
    uses: Iterable[str] = tuple(USES),
) -> list[Compiled]:
    """Every kernel of the project's that such uses of such logits launch, each once."""
    found: list[Compiled] = []
    for use in uses:
        with compiling_for(target) as launches, force_backend("triton"):
            USES[use](v, dtype, softcap)
        found += _distinct("ours", use, launches)
    return found


def _distinct(owner: str, use: str, launches: list[Launch]) -> list[Compiled]:
    """One entry for each compiled kernel."""
    kernels = {launch.kernel.hash: launch for launch in reversed(launches)}
    return [
        Compiled(owner, use, launch, resources(launch)) for launch in reversed(kernels.values())
    ]


def compile_liger(target: str, v: int, dtype: torch.dtype) -> list[Compiled]:
    """Liger's cross-entropy with its gradient, and the scale that its backward pass launches."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    logits, labels = _logits(MANY_ROWS, v, dtype)
    with compiling_for(target) as launches:
        loss = LigerCrossEntropyFunction.apply(logits, labels, None)[0]
        loss.backward(torch.tensor(2.0))
    return _distinct("Liger", "cross-entropy, many rows", launches)


CCE_DTYPES = (torch.bfloat16, torch.float16)
"""What its backward pass takes."""


def compile_cce(target: str, v: int, dtype: torch.dtype) -> list[Compiled]:
    """Cut Cross-Entropy, a fused linear loss: GEMM and rows in one kernel."""
    from cut_cross_entropy import linear_cross_entropy

    n, h = 128, 256  # its launch settings do not depend on them
    hidden = torch.zeros(n, h, dtype=dtype, requires_grad=True)
    weight = torch.zeros(v, h, dtype=dtype, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.long)
    with compiling_for(target) as launches:
        linear_cross_entropy(hidden, weight, labels, impl="cce").backward()
    return _distinct("CCE", "fused linear cross-entropy", launches)


# ---- executed ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a call did for each logit, summed over its launches.

    Attributes:
        bytes: Global memory that its warps asked for, in units of the logits: 1 is one
            read of all of them.
        sectors: The same in whole 32-byte sectors.
        instructions: Executed by its threads.
        special: Operations on the special function units.
        launches: Names of the kernels.
    """

    bytes: float
    sectors: float
    instructions: float
    special: float
    launches: tuple[str, ...]


@contextmanager
def _one_multiprocessor() -> Iterator[None]:
    """Let the launch code think of a GPU with one multiprocessor and its share of the cache.

    So few rows take the path, and the compiled kernels, of thousands on the whole GPU.
    """

    def sizes(tensor: Tensor, chosen: Settings) -> tuple[int, int]:
        return 1, chosen.cache_bytes // chosen.multiprocessors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "sizes", sizes)
        patch.setattr(gpu, "WAVES", 1)
        forget_layouts()
        yield
    forget_layouts()


Call = Callable[[Tensor, Tensor], object]
"""Something to do with logits and labels."""

ROWS = 8
"""As many programs as share a multiprocessor where each takes few warps."""
_ARCHITECTURE = 90


def execute(call: Call, v: int, dtype: torch.dtype) -> Cost:
    """Run a call on `[ROWS, v]` logits and labels, as compiled for sm_90."""
    return _sum(_launches(call, v, dtype), v, dtype)


def execute_each(call: Call, v: int, dtype: torch.dtype) -> list[Cost]:
    """The same, with the cost of each of its launches."""
    return [_sum([launch], v, dtype) for launch in _launches(call, v, dtype)]


def _launches(call: Call, v: int, dtype: torch.dtype) -> list[ExecutedLaunch]:
    torch.manual_seed(0)
    logits = torch.randn(ROWS, v).to(dtype)
    labels = torch.randint(0, v, (ROWS,))
    with (
        triton_device(_ARCHITECTURE, schedule=Schedule(check_races=False)),
        collect() as launches,
    ):
        call(logits, labels)
    return launches


def _sum(launches: list[ExecutedLaunch], v: int, dtype: torch.dtype) -> Cost:
    counters = [launch.counters for launch in launches]
    size = ROWS * v * dtype.itemsize
    sectors = sum(c.sectors_loaded + c.sectors_stored for c in counters)
    return Cost(
        bytes=sum(c.distinct_bytes for c in counters) / size,
        sectors=32 * sectors / size,
        instructions=sum(c.total_instructions for c in counters) / (ROWS * v),
        special=sum(c.special_function_operations for c in counters) / (ROWS * v),
        launches=tuple(launch.name for launch in launches),
    )


def our_forward(logits: Tensor, labels: Tensor) -> None:
    """The loss alone."""
    with _one_multiprocessor(), force_backend("triton"), torch.no_grad():
        unilogit_loss(logits, labels)


def our_step(logits: Tensor, labels: Tensor) -> None:
    """Loss and gradient."""
    with _one_multiprocessor(), force_backend("triton"):
        unilogit_loss(logits.requires_grad_(), labels).backward()


def our_pair(logits: Tensor, labels: Tensor) -> None:
    """Statistics of two rows, and the gradient of the reverse KL, which has the longer formula."""
    n, other = len(labels), torch.randn(logits.shape).to(logits.dtype)
    state, out = pair_state.empty_state(n, logits.device), torch.empty_like(logits)
    coefficients = torch.tensor([[0.1], [0.2], [0.0], [0.3]]).repeat(1, n)
    kernels = TritonKernels()
    with _one_multiprocessor():
        kernels.divergence_update(TilePair(logits, other, labels), state)
        kernels.divergence_gradient(TilePair(logits, other, labels), state, coefficients, "a", out)


def liger_forward(logits: Tensor, labels: Tensor) -> None:
    """The loss alone."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    LigerCrossEntropyFunction.apply(logits, labels, None)


def liger_step(logits: Tensor, labels: Tensor) -> None:
    """Loss and gradient, which replaces the logits."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    logits = logits.clone().requires_grad_()
    LigerCrossEntropyFunction.apply(logits, labels, None)[0].backward()
