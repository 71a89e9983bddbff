"""What the lm_head was given in one forward, and the losses that can be computed from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.functional import (
    ObjectiveLike,
    linear_objective_loss,
    linear_target_log_odds,
    shift_labels,
)
from unilogit_kernels.functional.mixed import MixedLoss, linear_mixed_loss
from unilogit_kernels.functional.token_statistics import (
    FIELDS,
    TokenStatistics,
    linear_token_statistics,
)
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.huggingface.logit_transform import HeadTransform
from unilogit_kernels.huggingface.model_inputs import VirtualTokens
from unilogit_kernels.objectives import Objective


class _Positions(NamedTuple):
    """The hidden states that predict the tokens of some labels.

    Attributes:
        hidden: `[B, T, H]`; with virtual tokens `[B, T + 1, H]`, since the last of them predicts
            the first token.
        virtual: whether that is so.
        shift: whether values belong to tokens, and not to these positions already.
    """

    hidden: Tensor
    virtual: bool
    shift: bool

    def of_tokens(self, values: Tensor, fill: int = 0) -> Tensor:
        """What belongs to each token, `[..., T]`, at the position that predicts it.

        It goes to the device of the states: a model in parts on several has its head on the last.
        """
        values = values.to(self.hidden.device)
        if not self.shift:
            return values
        return F.pad(values, (0, 1), value=fill) if self.virtual else shift_labels(values, fill)

    def of_part(self, part: str | Objective) -> str | Objective:
        return part.map_tokens(self.of_tokens) if isinstance(part, Objective) else part

    def by_token(self, result: Tensor) -> Tensor:
        """A result `[B, positions]` as `[B, T]`, where position t is about token t + 1."""
        return result[:, 1:] if self.virtual and result.dim() == 2 else result


@dataclasses.dataclass(frozen=True)
class HeadCall:
    """The inputs of the lm_head during one forward, from which a loss can be computed.

    Labels, and whatever else belongs to a token, are `[B', T]` as Hugging Face takes them: not
    shifted. Virtual tokens that peft puts in front (prompt tuning, p-tuning) have none; the last of
    them predicts the first token, whose label counts there as in peft's own loss.

    Attributes:
        hidden: `[B, T, H]`, the last hidden states, those of virtual tokens included.
        weight: `[rows, H]`.
        bias: `[rows]` or None.
        transform: what happens to the logits after the head.
        virtual_tokens: what peft puts in front of each sequence.
        adapter: a low-rank term of the head, such as LoRA's, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: HeadTransform
    virtual_tokens: VirtualTokens = dataclasses.field(default_factory=VirtualTokens)
    adapter: LowRank | None = None

    def objective_loss(
        self,
        labels: Tensor,
        objective: ObjectiveLike,
        *,
        rows: slice = slice(None),
        shift: bool = True,
        ignore_index: int = -100,
        reduction: str = "mean",
        token_weights: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        backend: str | None = None,
        options: LinearOptions | None = None,
    ) -> Tensor:
        """`linear_objective_loss` of the sequences `rows`.

        Args:
            labels: int64 `[B', T]`, as Hugging Face takes them: not shifted.
            objective: see `linear_objective_loss`; its per-token tensors are aligned with `labels`.
            rows: which of the B sequences the labels belong to.
            shift: whether labels are those of Hugging Face, of each token itself; False for labels
                of the positions that predict them, as `shift_labels` makes them.
            ignore_index: label of tokens that do not count.
            reduction: `"mean"` over the counted tokens, `"sum"` or `"none"`.
            token_weights: `[B', T]`, weight of each token's loss, aligned with `labels`.
            num_items_in_batch: denominator of the mean, where it covers several batches.
            backend: name of a backend, or None for the best available.
            options: how the call may run.

        Returns:
            A scalar, or `[B', T]` for `reduction="none"`: position t is about token t + 1.

        Raises:
            UnsupportedHeadError: the labels do not belong to the model's positions.
        """
        at = self._positions(labels, rows, shift=shift)
        if isinstance(objective, Objective):
            objective = objective.map_tokens(at.of_tokens)
        losses = linear_objective_loss(
            at.hidden,
            self.weight,
            at.of_tokens(labels, ignore_index),
            objective,
            bias=self.bias,
            adapter=self.adapter,
            ignore_index=ignore_index,
            reduction=reduction,
            # A weight belongs to the token, as its label does, so it moves with it.
            token_weights=None if token_weights is None else at.of_tokens(token_weights),
            num_items_in_batch=num_items_in_batch,
            backend=backend,
            options=options,
            **dataclasses.asdict(self.transform),
        )
        return at.by_token(losses)

    def mixed_loss(
        self,
        labels: Tensor,
        parts: Sequence[str | Objective],
        rows: Tensor,
        *,
        weights: Sequence[float] | None = None,
        reduction: str = "mean",
        num_items_in_batch: Tensor | Sequence[int] | None = None,
        backend: str | None = None,
        options: LinearOptions | None = None,
    ) -> MixedLoss:
        """`linear_mixed_loss`: several objectives in one call, each for its own sequences.

        Args:
            labels: int64 `[B, T]`, as Hugging Face takes them: not shifted; -100 does not count.
            parts: see `mixed_loss`; what they hold per token is aligned with `labels`.
            rows: int64 `[B]`: which of the parts each sequence takes.
            weights: factors of the parts, 1 each by default.
            reduction: `"mean"`, of each part over its own tokens (or sequences), or `"sum"`.
            num_items_in_batch: denominators of the means, one for each part.
            backend: name of a backend, or None for the best available.
            options: how the call may run.

        Returns:
            The loss and its parts.

        Raises:
            UnsupportedHeadError: the labels do not belong to the model's positions.
        """
        at = self._positions(labels)
        return linear_mixed_loss(
            at.hidden,
            self.weight,
            at.of_tokens(labels, -100),
            [at.of_part(part) for part in parts],
            rows.to(at.hidden.device)[:, None].expand(at.hidden.shape[:2]),
            bias=self.bias,
            adapter=self.adapter,
            weights=weights,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            backend=backend,
            options=options,
            **dataclasses.asdict(self.transform),
        )

    def log_odds(
        self,
        labels: Tensor,
        *,
        shift: bool = True,
        backend: str | None = None,
        options: LinearOptions | None = None,
    ) -> Tensor:
        """`linear_target_log_odds`: float32 `[B, T]`, position t is about token t + 1."""
        at = self._positions(labels, shift=shift)
        found = linear_target_log_odds(
            at.hidden,
            self.weight,
            at.of_tokens(labels, -100),
            bias=self.bias,
            adapter=self.adapter,
            backend=backend,
            options=options,
            **dataclasses.asdict(self.transform),
        )
        return at.by_token(found)

    def token_statistics(
        self,
        labels: Tensor,
        *,
        shift: bool = True,
        fields: Sequence[str] = FIELDS,
        backend: str | None = None,
        options: LinearOptions | None = None,
    ) -> TokenStatistics:
        """`linear_token_statistics`: `[B, T]` each, position t is about token t + 1."""
        at = self._positions(labels, shift=shift)
        seen = linear_token_statistics(
            at.hidden,
            self.weight,
            at.of_tokens(labels, -100),
            bias=self.bias,
            adapter=self.adapter,
            fields=fields,
            backend=backend,
            options=options,
            **dataclasses.asdict(self.transform),
        )
        return TokenStatistics(*(None if x is None else at.by_token(x) for x in seen))

    def hidden_of(self, labels: Tensor, rows: slice = slice(None)) -> Tensor:
        """The hidden states of the labels' own positions, `[B', T, H]`.

        Raises:
            UnsupportedHeadError: the labels do not belong to the model's positions.
        """
        hidden = self.hidden[rows]
        return hidden[:, self.virtual_tokens.before(labels, hidden) :]

    def _positions(
        self, labels: Tensor, rows: slice = slice(None), *, shift: bool = True
    ) -> _Positions:
        if not shift:
            return _Positions(self.hidden_of(labels, rows), virtual=False, shift=False)
        hidden = self.hidden[rows]
        virtual = self.virtual_tokens.before(labels, hidden)
        return _Positions(hidden[:, max(virtual - 1, 0) :], virtual > 0, shift)
