"""How a fused linear call is cut into chunks: a function of shapes, dtypes and needs alone.

Three orders. *Token chunks* hold a few tokens' logits over the whole vocabulary, so a gradient row
is finished at once; they suit a frozen lm_head. *Online* does without that many logits where a
chunk's sums are cheap, on a CPU: a frozen lm_head's columns come chunk by chunk and never again
(`online.py`). *Vocabulary chunks* hold all tokens' logits over a few columns and pass them
twice, statistics first and gradients second; each piece of the weight's gradient is then complete
when it is written, so it needs no accumulator, and until it is written its memory saves what the
first pass found, which spares the second pass a GEMM.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

from unilogit_kernels.fused_linear.budget import (
    CHUNK_BYTES,
    FLOPS_PER_BYTE,
    TILE_BYTES,
    LinearShape,
    _weight_bytes,
    aligned_size,
    budget_of,
    hidden_copy_bytes,
    hidden_sum_bytes,
    per_device,
    row_bytes,
    saved_token_count,
    vector_bytes,
    weight_sum_bytes,
)
from unilogit_kernels.fused_linear.gemm import EVERYTHING, Needs
from unilogit_kernels.fused_linear.options import LinearOptions

MIN_TILE_COLUMNS = 512
"""Below this many columns, a tile is cut along the tokens instead: thin GEMMs are slow. Groups of
tokens are no smaller either."""

ALIGNED_COLUMNS = {"cpu": 64, "cuda": 256}
"""Chunks are a multiple of this many columns wide: rows start aligned, and on GPUs no tile of a
GEMM (up to 256 wide) is cut."""

ALIGNED_TOKENS = {"cpu": 1, "cuda": 64}
"""Token chunks are a multiple of this many tokens, the smallest tile of a tensor-core GEMM."""

CPU_ROW_TILE_COLUMNS = 2048
"""Columns of a token chunk that one float32 GEMM on a CPU projects: MKL packs as much of the weight
for itself as a GEMM reads, 24 MiB of it over a whole vocabulary and 4 MiB so."""

LIBRARY_SHARE = 5
"""1 / this of a CPU's budget is left to what the GEMM library takes for itself."""

MIN_CHUNK_TOKENS = 16
"""Below this many tokens, token chunks would read the whole weight for too little work."""

SAVED_PARTS = 8
"""Chunks of columns, at least, where some are saved for a recomputing backward."""

ONLINE_COLUMNS = 2048
"""Columns that a chunk of the order "one pass" has at least: the GEMM into the hidden states'
gradient reads and writes its sums once a chunk."""

UNCUT_LOGITS = 1 << 16
"""Up to this many logits, 256 KiB, over at most `ONLINE_COLUMNS`, are held all at once: calls with
so little work are bound by the number of operations."""

MIN_REPROJECTED = 1.125
"""Tokens, as a multiple of those that can be saved, from which on the vocabulary order projects so
many of them twice that adding the weight's gradient up over token chunks is cheaper."""

ROWS_WORKING_SHARE = 4
"""Where gradient rows wait beside the weight's gradient too, 1 / this of the budget is left to the
chunks that finish them, and later to those that are read back."""

MAX_SHARE = 2
"""At most 1 / this of the room for buffers goes to float32 sums of the weight's gradient over token
chunks, to a chunk of one pass, or to a copy of the hidden states in the GEMMs' dtype. Instead of a
larger copy there are copies of groups of tokens, up to half as large, anew for each chunk."""

MIN_BUFFER_SHARE = {"cpu": 4, "cuda": 2}
"""Float32 sums of the hidden states' gradient, which grow with the tokens, may leave 1 / this of
the budget to logits. Where even that is not left, logits get half, and the call takes more than its
budget."""


@dataclass(frozen=True)
class Plan:
    """How a fused linear call is cut.

    Attributes:
        order: Which loop runs.
        tokens: Tokens per chunk.
        columns: Vocabulary columns per chunk: the width of the GEMMs of the gradients.
        tile_columns: Columns per tile: logits are projected, and read, this many at a time.
        saved_tokens: How many leading tokens keep something in the memory of the weight's gradient
            between the two passes over the vocabulary order.
        saved_beside: How many of these, the last ones, do so in memory of their own instead.
        saves_rows: Whether what is saved are finished gradient rows, not logits.
        row_tokens: Tokens per chunk of the pass that finishes these rows.
        row_columns: Columns per tile of that pass.
    """

    order: Literal["token_chunks", "online", "vocabulary_chunks"]
    tokens: int
    columns: int
    tile_columns: int = 0
    saved_tokens: int = 0
    saved_beside: int = 0
    saves_rows: bool = False
    row_tokens: int = 0
    row_columns: int = 0

    def __post_init__(self) -> None:
        if not self.tile_columns:
            object.__setattr__(self, "tile_columns", self.columns)
        if not self.row_columns:
            object.__setattr__(self, "row_columns", self.tile_columns)

    @property
    def saved_inside(self) -> int:
        """How many leading tokens keep something in the memory of the weight's gradient."""
        return self.saved_tokens - self.saved_beside


@functools.lru_cache(maxsize=256)
def plan_linear(
    shape: LinearShape,
    options: LinearOptions | None = None,
    *,
    passes: int,
    coupled: bool = False,
    adds_up: bool = True,
    shared: bool = False,
) -> Plan:
    """Choose the order and the chunk sizes.

    Args:
        shape: What is computed.
        options: How it may run.
        passes: 2 if statistics and gradients are computed in one call, else 1.
        coupled: Whether a slope takes the statistics of all tokens, which token chunks never have.
        adds_up: See `RowLoss`; one pass finds the rest too late.
        shared: Whether other ranks hold other columns: a row is known when all have been asked, of
            all tokens at once. The order `online` then scales its sums.
    """
    if passes == 2 and not (coupled or shared) and _is_small(shape):
        return Plan("token_chunks", shape.n, shape.vocab_size)
    given = budget_of(shape, options or LinearOptions())
    library = given // LIBRARY_SHARE if shape.device_type == "cpu" else 0
    # What grows with the tokens; logits get their share of the budget all the same.
    budget = _left(given, library + vector_bytes(shape), shape)
    skips = options is not None and options.skip_below > 0
    if passes == 2 and adds_up and not (coupled or skips) and _suits_online(shape, shared=shared):
        online = _online(shape, budget)
        if online is not None:
            return online
    coupled = coupled or shared
    by_rows = None
    if passes == 2 and shape.needs.weight and not coupled and _suits_rows(shape):
        by_rows = _finished_rows(shape, budget)
    if not coupled and _suits_tokens(shape, budget, by_rows, passes=passes):
        tokens = _adding_tokens(shape, budget)
        if tokens >= MIN_CHUNK_TOKENS:
            # A row kernel reads a chunk whole, too late for a GPU's cache to hold tiles of it.
            cut = shape.device_type == "cpu"
            tile_columns = _row_tile(shape, tokens) if cut else shape.vocab_size
            return Plan("token_chunks", tokens, shape.vocab_size, tile_columns)
    if by_rows is not None:
        return by_rows
    saved = saved_token_count(shape, rows=False) if passes == 2 and shape.needs.weight else 0
    tokens, columns, tile_columns = _vocabulary_chunk(shape, budget, shape.n)
    return Plan("vocabulary_chunks", tokens, columns, tile_columns, saved)


def _is_small(shape: LinearShape) -> bool:
    """Whether nothing is worth cutting, and nothing else grows by it: no copy of the weight."""
    few = shape.n * shape.vocab_size <= UNCUT_LOGITS and shape.vocab_size <= ONLINE_COLUMNS
    return few and shape.needs.any() and not (shape.casts_weight or weight_sum_bytes(shape))


def _finished_rows(shape: LinearShape, budget: int) -> Plan | None:
    """Token chunks finish rows, which wait for one GEMM of full depth to the weight's gradient.

    They wait in its memory, which is not written yet, and as far as the budget goes beside it.
    """
    inside = saved_token_count(shape, rows=True)
    waits = shape.n > inside and shape.device_type != "cpu"
    working = budget // ROWS_WORKING_SHARE if waits else budget
    row_tokens = min(_token_chunk(shape, working, shape.logit_bytes), inside)
    if row_tokens < MIN_CHUNK_TOKENS:
        return None
    beside = 0
    if waits:
        room = (budget - working) // (shape.vocab_size * shape.dtypes.operands.itemsize)
        aligned = per_device(ALIGNED_TOKENS, shape.device_type)
        beside = min(shape.n - inside, room - room % aligned)
    saved = inside + beside
    tokens, columns, tile_columns = _vocabulary_chunk(shape, working, max(1, shape.n - saved))
    return Plan(
        "vocabulary_chunks",
        tokens,
        columns,
        tile_columns,
        saved,
        beside,
        saves_rows=True,
        row_tokens=row_tokens,
        row_columns=_row_tile(shape, row_tokens),
    )


def _adding_tokens(shape: LinearShape, budget: int) -> int:
    """Tokens of a chunk, where the weight's gradient adds up over token chunks."""
    return _token_chunk(shape, _left(budget, weight_sum_bytes(shape), shape), row_bytes(shape))


def plan_saving(shape: LinearShape, options: LinearOptions, m: int) -> Plan:
    """The cut of a forward of `shape.n` tokens that saves logits, and of its backward of `m`.

    Both must have one cut of the columns. It has at least `SAVED_PARTS` chunks, so that what is
    saved fills the room for it.
    """
    plan = plan_linear(shape._replace(needs=EVERYTHING), options, passes=1, coupled=True)
    part = -(-shape.vocab_size // SAVED_PARTS)
    columns = min(plan.columns, max(part, MIN_TILE_COLUMNS))
    columns = aligned_size(columns, per_device(ALIGNED_COLUMNS, shape.device_type))
    return replace(
        plan,
        tokens=min(plan.tokens, m),
        columns=columns,
        tile_columns=min(plan.tile_columns, columns),
        row_columns=0,
    )


def _left(budget: int, taken: int, shape: LinearShape) -> int:
    """What something that grows with the tokens leaves to logits; see `MIN_BUFFER_SHARE`."""
    left = budget - taken
    enough = budget // per_device(MIN_BUFFER_SHARE, shape.device_type)
    return left if left >= enough else budget // 2


def _token_chunk(shape: LinearShape, budget: int, logit_bytes: int) -> int:
    """Tokens whose logits over the whole vocabulary fit; at least two chunks: never n * V.

    The chunks are of about one size: a last one of a few tokens would read the weights for nothing.
    """
    aligned = per_device(ALIGNED_TOKENS, shape.device_type)
    fitting = min(
        (shape.n + 1) // 2, aligned_size(budget // (shape.vocab_size * logit_bytes), aligned)
    )
    if fitting < 1:
        return 0
    chunks = -(-shape.n // fitting)
    return min(fitting, -(-shape.n // (chunks * aligned)) * aligned)


def _row_tile(shape: LinearShape, tokens: int) -> int:
    """Columns of a token chunk that are projected at a time."""
    if shape.device_type == "cpu":
        if not shape.separate_rows:
            return min(shape.vocab_size, CPU_ROW_TILE_COLUMNS)
        return shape.vocab_size  # one GEMM: oneDNN prepares the weight once
    columns = per_device(TILE_BYTES, shape.device_type) // (tokens * shape.logit_bytes)
    return min(
        shape.vocab_size, aligned_size(columns, per_device(ALIGNED_COLUMNS, shape.device_type))
    )


def _suits_tokens(shape: LinearShape, budget: int, by_rows: Plan | None, *, passes: int) -> bool:
    """Whether token chunks are the better order: with them each logit is projected once.

    Args:
        shape: What is computed.
        budget: Bytes for buffers.
        by_rows: The plan of finished rows, if there is one.
        passes: 2 if statistics and gradients are computed in one call, else 1.
    """
    if not shape.needs.any() or shape.casts_weight:
        return False
    if not shape.needs.weight:
        return True
    # A weight gradient that adds up over the chunks must do so in float32.
    sums, least = weight_sum_bytes(shape), hidden_sum_bytes(shape)
    if passes != 2:
        return False
    if by_rows is not None and shape.device_type != "cpu":
        return sums <= max(budget, least) and _sums_pay(shape, by_rows, budget)
    if sums > max(budget // MAX_SHARE, least):
        return False
    if not shape.widens and _suits_rows(shape):
        # Finished rows would wait for nothing: sums in float32 are the gradient itself.
        return True
    return shape.n > MIN_REPROJECTED * saved_token_count(shape, rows=_suits_rows(shape))


def _sums_pay(shape: LinearShape, by_rows: Plan, budget: int) -> bool:
    """Whether sums of the weight's gradient cost a GPU less than rows that wait for it.

    Both in GEMMs of the whole call, by operations and bytes: logits that are projected again, and
    rows that are moved once more (4 bytes each); against a GEMM that waits for its sums (8 bytes
    each) and rows (2 bytes each), and sums that are narrowed in the end (6 bytes each).
    """
    again = 1 - by_rows.saved_tokens / shape.n
    moved = 2 * FLOPS_PER_BYTE / shape.h
    tokens = max(1, _adding_tokens(shape, budget))
    waiting = max(0.0, FLOPS_PER_BYTE * (4 / tokens + 1 / shape.h) - 1)
    narrowed = 3 * FLOPS_PER_BYTE / shape.n
    return again + moved > waiting + narrowed


def _suits_online(shape: LinearShape, *, shared: bool) -> bool:
    """Whether the hidden states' gradient is all there is, on a device where sums are cheap.

    A GPU would read and write its sums more often than a few token chunks do their logits; but a
    shard's rows are known too late for token chunks. The gradient against a reference model is a
    sum of two softmaxes whose shares come last: it would take a GEMM for each.
    """
    alone = shape.reference is None and shape.needs == Needs(True, False, False)
    return alone and not shape.rank and (shape.device_type == "cpu" or shared)


def _online(shape: LinearShape, budget: int) -> Plan | None:
    """As many tokens at a time as leave `ONLINE_COLUMNS` to a chunk, in groups of one size.

    On GPUs token chunks over all columns, which add to no sum.
    """
    if shape.device_type != "cpu":
        room = _left(budget, hidden_sum_bytes(shape), shape)
        tokens = _token_chunk(shape, room, row_bytes(shape))
        fits = tokens >= MIN_CHUNK_TOKENS and not shape.casts_weight
        return Plan("online", tokens, shape.vocab_size) if fits else None
    chunk = min(per_device(CHUNK_BYTES, shape.device_type), budget // MAX_SHARE)
    most = chunk // (ONLINE_COLUMNS * row_bytes(shape))
    token_bytes = hidden_sum_bytes(shape._replace(n=1)) + hidden_copy_bytes(shape, 1)
    if token_bytes:
        most = min(most, (budget - chunk) // token_bytes)
    groups = -(-shape.n // max(1, most))
    tokens = -(-shape.n // groups)
    columns = min((shape.vocab_size + 1) // 2, chunk // (tokens * row_bytes(shape)))
    weight_bytes = _weight_bytes(shape, adds_up=False)
    if weight_bytes:
        columns = min(columns, (budget - chunk - tokens * token_bytes) // weight_bytes)
    columns = aligned_size(max(1, columns), per_device(ALIGNED_COLUMNS, shape.device_type))
    return Plan("online", tokens, columns)


def _suits_rows(shape: LinearShape) -> bool:
    """Whether finished gradient rows are the better thing to keep: they are narrower than logits.

    They are finished token chunk by token chunk, over the whole vocabulary, of which no copy in
    another dtype may be made. Where the logits of all tokens fit too, two models' are saved: their
    GEMMs then take all tokens at once.
    """
    if shape.dtypes.operands.itemsize >= shape.logit_bytes or shape.casts_weight:
        return False
    return shape.reference is None or saved_token_count(shape, rows=False) < shape.n


def _vocabulary_chunk(shape: LinearShape, budget: int, projected: int) -> tuple[int, int, int]:
    """Tokens, columns and tile columns of a vocabulary chunk within the budget.

    Args:
        shape: What is computed.
        budget: Bytes for buffers.
        projected: How many of the tokens are projected in tiles; the others' rows are there.
    """
    dtypes, device = shape.dtypes, shape.device_type
    aligned, half = per_device(ALIGNED_COLUMNS, device), (shape.vocab_size + 1) // 2
    free = _left(budget, hidden_sum_bytes(shape), shape)
    # What a column costs beside its logits is left for the narrowest chunk, if that leaves half.
    rows_free = max(free // 2, free - MIN_TILE_COLUMNS * _weight_bytes(shape, adds_up=True))
    chunk = min(per_device(CHUNK_BYTES, device), rows_free)
    tokens = min(shape.n, max(1, chunk // (MIN_TILE_COLUMNS * row_bytes(shape))))
    copied = free // MAX_SHARE
    if hidden_copy_bytes(shape, shape.n) > copied:
        # As many tokens as columns: the fewer chunks, the fewer copies.
        square = math.isqrt(chunk // row_bytes(shape))
        group = min(square, copied // 2 // hidden_copy_bytes(shape, 1))
        tokens = min(tokens, max(MIN_TILE_COLUMNS, group))
    free -= hidden_copy_bytes(shape, tokens)
    weight_bytes = _weight_bytes(shape, adds_up=tokens < shape.n)
    if not shape.separate_rows:
        logit = tokens * row_bytes(shape)
        columns = min(half, chunk // logit, free // (logit + weight_bytes))
        columns = aligned_size(max(1, columns), aligned)
        return tokens, columns, columns
    # Logits pass through a small tile of their own into a chunk of gradient rows.
    tile_bytes = min(per_device(TILE_BYTES, device), chunk)
    together = min(tokens, projected)
    tile_columns = min(half, tile_bytes // (together * shape.logit_bytes))
    tile_columns = aligned_size(max(1, tile_columns), aligned)
    left = free - together * tile_columns * shape.logit_bytes
    column_bytes = tokens * dtypes.operands.itemsize + weight_bytes
    columns = max(tile_columns, min(half, left // column_bytes))
    return tokens, aligned_size(columns, tile_columns), tile_columns
