"""States of rows whose vocabulary is shared among processes: gathered, and merged by each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.processes import run_ranks
from tests.support.row_statistics import found_statistics, literal_statistics
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import Tile
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.testing import assert_within_budget

N, V, BORDER = 24, 4099, 1700
NEEDS = RowNeeds(*[True] * len(RowNeeds._fields))


def _problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(N, V, generator=generator) + 1e4
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[:2] = torch.tensor([BORDER - 1, BORDER])
    logits[2, :BORDER] = -torch.inf  # one process has no logit at all
    labels[2] = V - 1
    return logits, labels


def _worker() -> None:
    logits, labels = _problem()
    own = slice(0, BORDER) if dist.get_rank() == 0 else slice(BORDER, V)
    state = row_state.empty_state(N, logits.device, needs=NEEDS)
    tile = Tile(logits[:, own].contiguous(), labels, own.start)
    registry.load("cpu").log_odds_update(tile, state, NEEDS)
    gathered = [torch.empty_like(state) for _ in range(2)]
    dist.all_gather(gathered, state)
    merged = row_state.merge_parts(torch.stack(gathered))
    others = [torch.empty_like(merged) for _ in range(2)]
    dist.all_gather(others, merged)
    assert torch.equal(*(each.view(torch.int32) for each in others))
    _check(merged, logits, labels)


def _check(state: Tensor, logits: Tensor, labels: Tensor) -> None:
    exact, plain = (literal_statistics(z, labels) for z in (logits.double(), logits))
    finite = torch.arange(N) != 2
    for name, value in found_statistics(state, labels, V, NEEDS).items():
        if name in ("uniform_cross_entropy", "mean_logit"):
            assert value[2].abs() == torch.inf
            value, exact[name], plain[name] = (x[finite] for x in (value, exact[name], plain[name]))
        assert_within_budget(value, exact[name], plain[name], name, smallest_scale=1.0)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    assert torch.equal(row_state.runner_up(state, labels), others.argmax(1))


def test_two_processes_merge_to_the_same_statistics() -> None:
    """Bitwise equal in both, and those of the whole rows."""
    run_ranks(_worker)
