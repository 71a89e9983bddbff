"""What a public function was asked for beside its operands: built once, passed down whole."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unilogit_kernels.calls.vocab_parallel import VocabParallel
from unilogit_kernels.maths.rewrites import Rewrite


class CallOptions(NamedTuple):
    """Options of a loss of rows, as the user gave them; `functional.documented` says what they are.

    The defaults are those of a function that returns a number for each row. What the user did not
    give, but the layout of DTensors says, is `owners`: see `Shard`.
    """

    ignore_index: int = -100
    softcap: float | None = None
    logit_scale: float | None = None
    vocab_size: int | None = None
    backend: str | None = None
    reduction: str = "none"
    token_weights: Tensor | None = None
    num_items_in_batch: int | Tensor | None = None
    vocab_parallel: VocabParallel | None = None
    owners: Tensor | None = None


class TeacherOptions(NamedTuple):
    """Options of a divergence from a teacher, beside those of the student's rows.

    Attributes:
        rewrite: Of the teacher's label entry, or None.
        direction: `"forward"` or `"reverse"`.
        temperature: Divides both models' logits.
        softcap: The teacher's cap.
        logit_scale: The teacher's factor.
    """

    rewrite: Rewrite | None
    direction: str
    temperature: float
    softcap: float | None
    logit_scale: float | None
