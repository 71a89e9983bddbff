"""What a plan costs: its own loops, on tensors without data and with row kernels that only record.

So launches, operations, bytes and the peak of memory are those of the loops by construction.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile, TilePair
from unilogit_kernels.backends.ids import OBJECTIVE_IDS
from unilogit_kernels.backends.imagined import Gpu, ImaginedGpu
from unilogit_kernels.backends.registry import imagine
from unilogit_kernels.fused_linear.budget import HeadShape, LinearShape
from unilogit_kernels.fused_linear.gemm import LinearHead
from unilogit_kernels.fused_linear.loops import linear_gradient, linear_loss, linear_state
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.fused_linear.plan import Plan
from unilogit_kernels.fused_linear.recorder import Launch, Read, Recorder, RowCall
from unilogit_kernels.fused_linear.saved import SavedBeside
from unilogit_kernels.fused_linear.tiles import Gradients, Heads
from unilogit_kernels.fused_linear.vocabulary_chunks import VocabularyLoop
from unilogit_kernels.maths import pair_state
from unilogit_kernels.maths.divergence import Divergence
from unilogit_kernels.maths.rewrites import Rewrite
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds
from unilogit_kernels.objectives import UnilogitReverse
from unilogit_kernels.rows.contract import RowLoss
from unilogit_kernels.rows.divergence import PairLoss, PairProblem
from unilogit_kernels.rows.objective import ObjectiveLoss, RowProblem, Weighted
from unilogit_kernels.rows.ranks import Shard, recording
from unilogit_kernels.rows.tokens import TokenParts

_META = torch.device("meta")
_SWEPT = "unilogit"
"""Of the objectives that a sweep on a GPU knows, all of which it launches alike."""
_GROUP = "recording"


class Shares(NamedTuple):
    """How ranks share a vocabulary.

    Attributes:
        ranks: How many do.
        vocab_size: Of the whole one.
        tokens: Whether they share the tokens of hidden states, too.
    """

    ranks: int
    vocab_size: int
    tokens: bool = False


class Collective(NamedTuple):
    """What every rank takes part in.

    Attributes:
        what: `"gather"` of what each rank gives, `"sum"` over the ranks, or `"scatter"`, a sum of
            which each rank gets its part.
        bytes: That a rank gives.
        ranks: How many there are.
    """

    what: Literal["gather", "sum", "scatter"]
    bytes: int
    ranks: int

    @property
    def received(self) -> int:
        """Bytes that a rank receives, where parts go round in a ring: twice for a sum."""
        others = self.ranks - 1
        if self.what == "gather":
            return self.bytes * others
        return (2 if self.what == "sum" else 1) * self.bytes * others // self.ranks


@dataclass(frozen=True)
class Costs:
    """What one call, or its forward or backward alone, does.

    Attributes:
        plan: How it is cut.
        launches: In order.
        peak_bytes: Most bytes alive at a time beside operands and gradients.
        collectives: What ranks that share the vocabulary send each other, in order.
    """

    plan: Plan
    launches: tuple[Launch, ...]
    peak_bytes: int
    collectives: tuple[Collective, ...] = ()

    @property
    def flops(self) -> int:
        """Of the matrix products."""
        return sum(launch.flops for launch in self.launches)


def loss_costs(shape: LinearShape, plan: Plan, shares: Shares | None = None) -> Costs:
    """Costs of a loss whose gradients are finished with it.

    Args:
        shape: What is computed; of ranks that share a vocabulary, on one of them.
        plan: How it is cut.
        shares: How they share it.
    """
    call = _Call(shape, shares)
    gradients = call.gradients()
    with call.recorded():
        call.gather()
        linear_loss(call.heads, call.loss, plan, gradients, LinearOptions(compact=False))
    return call.costs(plan)


def recomputing_costs(
    shape: LinearShape,
    forward: Plan,
    backward: Plan | None,
    saved_logits: int,
    shares: Shares | None = None,
) -> list[Costs]:
    """Costs of the forward of values alone, and of the backward that projects logits again.

    Args:
        shape: What is computed.
        forward: How the forward is cut.
        backward: How the backward is, or None where there is none.
        saved_logits: How many logits of each head the forward saves for it.
        shares: How ranks share the vocabulary.
    """
    call = _Call(shape, shares)
    saved = None
    with call.recorded():
        call.gather()
        if saved_logits:
            memory = [
                torch.empty(saved_logits, dtype=h.dtypes.logits, device=_META) for h in shape.heads
            ]
            saved = SavedBeside(memory, shape.n)
        state = linear_state(call.heads, call.loss.rows, forward, saved)
        call.loss.rows.values(state)
    costs = [call.costs(forward)]
    if backward is not None:
        upstream, gradients = torch.empty(shape.n, device=_META), call.gradients()
        call.recorder.launches, call.ranks.collectives = [], []
        with call.recorded():
            loop = VocabularyLoop(call.heads, call.loss.rows, backward, saved)
            linear_gradient(loop, state, upstream, gradients)
        costs.append(call.costs(backward))
    return costs


class _Call:
    """Operands without data, and row kernels that record."""

    def __init__(self, shape: LinearShape, shares: Shares | None) -> None:
        self.shape = shape
        self.recorder = Recorder()
        self.ranks = _RecordingRanks(1 if shares is None else shares.ranks)
        vocab_size, shard = shape.vocab_size, None
        self.parts: TokenParts | None = None
        if shares is not None:
            vocab_size, shard = shares.vocab_size, Shard(0, shape.vocab_size, _GROUP)
            if shares.tokens:
                self.parts = TokenParts.of(_GROUP, 0, shares.ranks, 0, shape.n)
                owners = torch.empty(shape.n, dtype=torch.int64, device=_META)
                shard = shard._replace(owners=owners)
        self.heads: Heads = tuple(self._head(head) for head in shape.heads)
        labels = torch.empty(shape.n, dtype=torch.int64, device=_META)
        exact = shape.dtypes.exact
        weight = torch.empty(shape.n, dtype=exact, device=_META)
        factor = torch.empty((), dtype=exact, device=_META)
        kernels = _RecordingKernels(self.recorder)
        transform = LogitTransform()
        self.loss: RowLoss
        if shape.reference is None:
            rows = RowProblem(labels, transform, vocab_size, kernels, shard=shard)
            self.loss = ObjectiveLoss(rows, Weighted(UnilogitReverse(), weight, factor))
        else:
            divergence = Divergence("forward", Rewrite())
            pairs = PairProblem(
                labels, True, transform, transform, vocab_size, divergence, kernels, shard
            )
            self.loss = PairLoss(pairs, weight, factor)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        with recording(_GROUP, self.ranks), self.recorder:
            yield

    def gather(self) -> None:
        """Have the hidden states of all tokens, where each rank has its own only."""
        if self.parts is not None:
            own, gathered = self.parts.own, self.parts.gathered
            self.heads = tuple(
                replace(head, hidden=gathered(head.hidden[own])) for head in self.heads
            )

    def costs(self, plan: Plan) -> Costs:
        return Costs(
            plan,
            tuple(self.recorder.launches),
            self.recorder.memory.peak_bytes,
            tuple(self.ranks.collectives),
        )

    def gradients(self) -> Gradients:
        shape, dtypes = self.shape, self.shape.dtypes
        results, exact = dtypes.results, dtypes.exact
        return Gradients(
            self._empty(shape.n, shape.h, dtype=results) if shape.needs.hidden else None,
            self._empty(shape.vocab_size, shape.h, dtype=results) if shape.needs.weight else None,
            self._empty(shape.vocab_size, dtype=exact) if shape.needs.bias else None,
            self._empty(shape.n, shape.rank, dtype=exact) if shape.trains_inner else None,
            self._empty(shape.vocab_size, shape.rank, dtype=exact) if shape.trains_up else None,
        )

    def _head(self, head: HeadShape) -> LinearHead:
        hidden = self._empty(self.shape.n, head.h, dtype=head.input_dtype)
        weight = self._empty(self.shape.vocab_size, head.h, dtype=head.input_dtype)
        if not head.rank:
            return LinearHead(hidden, weight, None, head.dtypes)
        inner = self._empty(self.shape.n, head.rank, dtype=head.input_dtype)
        up = self._empty(self.shape.vocab_size, head.rank, dtype=head.input_dtype)
        return LinearHead(hidden, weight, None, head.dtypes, inner, up)

    @staticmethod
    def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=_META)


class _RecordingRanks:
    """Ranks that only say what they would send."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.collectives: list[Collective] = []

    def gather(self, part: Tensor) -> Tensor:
        self.collectives.append(Collective("gather", part.nbytes, self.size))
        return part.new_empty(self.size, part.numel())

    def start_sum(self, tensor: Tensor) -> _RecordingRanks:
        self.collectives.append(Collective("sum", tensor.nbytes, self.size))
        return self

    def start_scatter(self, rows: Tensor, owners: Tensor) -> _RecordingRanks:
        self.collectives.append(Collective("scatter", rows.nbytes, self.size))
        return self

    def wait(self) -> None:
        """See `Pending`."""


class _RecordingKernels(RowKernels):
    """Every kernel of the contract, as a launch with what it reads and writes."""

    name = "recording"
    swept_objectives = frozenset(OBJECTIVE_IDS)

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def log_odds_update(self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN) -> None:
        call = RowCall.of("log_odds_update", tile.logits, (tile.logits.dtype,), needs)
        self._add(call, [tile.logits, tile.labels, state], [state])

    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        call = RowCall.of("log_odds_gradient", out, (tile.logits.dtype, out.dtype))
        self._add(call, [tile.logits, tile.labels, state, slope], [out])

    def log_odds_sweep(
        self,
        tile: Tile,
        row_weight: Tensor,
        objective: str,
        vocab_size: int,
        out: Tensor | None,
        weights: Sequence[float] = (),
    ) -> Tensor:
        values = row_weight.new_empty(tile.logits.shape[0])
        written = [values] if out is None else [values, out]
        dtypes = (tile.logits.dtype, *([] if out is None else [out.dtype]))
        call = RowCall.of("log_odds_sweep", tile.logits, dtypes)
        self._add(call, [tile.logits, tile.labels, row_weight], written)
        return values

    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        call = RowCall.of("divergence_update", pair.a, (pair.a.dtype, pair.b.dtype))
        self._add(call, [*pair[:3], state], [state])

    def divergence_gradient(
        self,
        pair: TilePair,
        state: Tensor,
        coefficients: Tensor,
        student: Literal["a", "b"],
        out: Tensor,
    ) -> None:
        dtypes = (pair.a.dtype, pair.b.dtype, out.dtype)
        call = RowCall.of("divergence_gradient", out, dtypes)
        self._add(call, [*pair[:3], state, coefficients], [out])

    def _add(self, call: RowCall, reads: list[Tensor], writes: list[Tensor]) -> None:
        self._recorder.add(call.name, reads, writes, rows=call)


# ---- on a GPU ----------------------------------------------------------------------------------


def launched(launches: Iterable[Launch], gpu: Gpu) -> list[Launch]:
    """What a GPU is given for recorded launches: some calls of row kernels take several.

    How many follows from the launch functions of its backend, on tensors without data. Models whose
    logits pass a softcap may share small rows otherwise.
    """
    result = []
    for launch in launches:
        if launch.rows is None:
            result.append(launch)
        else:
            result += _in_steps(launch, *_steps(launch.rows, gpu))
    return result


def _in_steps(launch: Launch, names: tuple[str, ...], others: tuple[Launch, ...]) -> list[Launch]:
    """A call's launches; each that passes the rows reads them, and the last one writes them."""
    steps, reads = list(others), launch.reads
    last = [name for name in names if not name.startswith("merge")][-1:]
    for name in names:
        if name.startswith("merge"):
            steps.append(Launch(name, 0, 0, ()))
            continue
        written = launch.written if [name] == last else 0
        steps.append(Launch(name, launch.flops, written, reads))
        reads = tuple(Read(read.bytes, read.bytes) for read in reads)
    return steps


@functools.lru_cache(4096)
def _steps(call: RowCall, gpu: Gpu) -> tuple[tuple[str, ...], tuple[Launch, ...]]:
    """Names of the row kernels that a call launches, and what else it launches."""
    there, recorder = ImaginedGpu(gpu), Recorder()
    kernels = imagine(there)
    logits, *more = (torch.empty(call.n, call.v, dtype=d, device=_META) for d in call.dtypes)
    labels = torch.empty(call.n, dtype=torch.int64, device=_META)
    vector = torch.empty(call.n, device=_META)
    with recorder:
        if call.name == "log_odds_update":
            state = torch.empty(call.needs.state_rows, call.n, device=_META)
            kernels.log_odds_update(Tile(logits, labels), state, call.needs)
        elif call.name == "log_odds_gradient":
            state = torch.empty(call.needs.state_rows, call.n, device=_META)
            kernels.log_odds_gradient(Tile(logits, labels), state, vector, more[0])
        elif call.name == "log_odds_sweep":
            out = more[0] if more else None
            kernels.log_odds_sweep(Tile(logits, labels), vector, _SWEPT, call.v, out)
        else:
            pair = TilePair(logits, more[0], labels)
            state = torch.empty(pair_state.B_TARGET + 1, call.n, device=_META)
            if call.name == "divergence_update":
                kernels.divergence_update(pair, state)
            else:
                coefficients = torch.empty(4, call.n, device=_META)
                kernels.divergence_gradient(pair, state, coefficients, "a", more[1])
    return tuple(there.launched), tuple(recorder.launches)
