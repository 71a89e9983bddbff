"""How a fused linear call is cut into chunks: a function of shapes, dtypes and needs alone.

Two orders. *Token chunks* hold a few tokens' logits over the whole vocabulary, so a gradient row is
finished at once; they suit a frozen lm_head. *Vocabulary chunks* hold all tokens' logits over a few
columns and visit them twice, statistics first and gradients second; each piece of the weight's
gradient is then complete when it is written, so it needs no accumulator, and until it is written
its memory holds logits of the first visit, which spares the second visit their GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from unilogit_kernels.projection import GemmDtypes, Needs

MEMORY_BUDGET = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Bytes that the buffers of one fused linear call may take, by device type."""

TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Bytes of one tile of logits in the vocabulary order; on CPU it should stay in the last cache."""

MIN_TILE_COLUMNS = 512
"""Below this many columns, a tile is cut along the tokens instead: thin GEMMs are slow."""

ALIGNED_COLUMNS = 64
"""Tiles are a multiple of this many columns wide, so that their rows start aligned."""

MIN_CHUNK_TOKENS = 16
"""Below this many tokens, token chunks would read the whole weight for too little work."""


@dataclass(frozen=True)
class Plan:
    """How a fused linear call is cut; a function of shapes, dtypes and needs alone.

    Attributes:
        order: Which loop runs.
        tokens: Tokens per chunk or tile.
        columns: Vocabulary columns per chunk or tile.
        kept_tokens: How many leading tokens keep their logits in the weight's gradient between the
            two visits of the vocabulary order.
    """

    order: Literal["token_chunks", "vocabulary_chunks"]
    tokens: int
    columns: int
    kept_tokens: int = 0


def plan_linear(
    n: int,
    h: int,
    vocab_size: int,
    dtypes: GemmDtypes,
    input_dtype: torch.dtype,
    device_type: str,
    needs: Needs,
    *,
    visits: int,
) -> Plan:
    """Choose the order and the chunk sizes.

    Args:
        n: Tokens that count.
        h: Hidden size.
        vocab_size: Columns.
        dtypes: Of the GEMMs.
        input_dtype: Of hidden states and weight.
        device_type: `"cpu"`, `"cuda"`, ...
        needs: Which gradients this call computes.
        visits: 2 if statistics and gradients are computed in one call, else 1.
    """
    budget = MEMORY_BUDGET.get(device_type, MEMORY_BUDGET["cuda"])
    logits_bytes = dtypes.logits.itemsize
    row_bytes = logits_bytes + (0 if dtypes.operands == dtypes.logits else dtypes.operands.itemsize)
    fitting = budget // (vocab_size * row_bytes)
    casts_weight = input_dtype != dtypes.operands
    # At least two chunks either way: no call ever holds n * V elements.
    token_chunk = min((n + 1) // 2, fitting)
    if needs.any() and not needs.weight and not casts_weight and token_chunk >= MIN_CHUNK_TOKENS:
        return Plan("token_chunks", token_chunk, vocab_size)
    tile_elements = TILE_BYTES.get(device_type, TILE_BYTES["cuda"]) // row_bytes
    kept = 0
    # A row of the gradient must hold a whole number of logits.
    if visits == 2 and needs.weight and h * dtypes.results.itemsize % logits_bytes == 0:
        kept = min(n, h * dtypes.results.itemsize // logits_bytes)
    tokens = min(n, max(1, tile_elements // MIN_TILE_COLUMNS))
    columns = min((vocab_size + 1) // 2, max(1, tile_elements // tokens))
    if columns > ALIGNED_COLUMNS:
        columns -= columns % ALIGNED_COLUMNS
    return Plan("vocabulary_chunks", tokens, columns, kept)


def token_tiles(n: int, plan: Plan) -> list[slice]:
    """Tiles that do not straddle the border between kept and recomputed tokens."""
    kept = [*slices(plan.kept_tokens, plan.tokens)]
    return [*kept, *slices(n, plan.tokens, start=plan.kept_tokens)]


def slices(total: int, size: int, start: int = 0) -> Iterator[slice]:
    """Slices of at most `size` that cover `[start, total)`."""
    for first in range(start, total, size):
        yield slice(first, min(first + size, total))
