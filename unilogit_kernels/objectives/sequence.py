"""Losses of whole sequences, as functions of sums over their tokens.

Each is an `Objective` whose tokens are coupled: once the log-odds of all tokens are known, sums
over sequences and the slope of each token follow, without another look at a logit.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from unilogit_kernels.objectives.base import Objective, per_sequence, per_token, register
from unilogit_kernels.objectives.token import log_sigmoid


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SequenceObjective(Objective):
    """A loss `F` of the sums of one statistic over the labelled tokens of each sequence.

    Subclasses say which statistic (`tokens`; `log p` unless they differ) and how losses come of the
    sums (`losses`). Losses of `members` sequences each couple the first, second, ... part of the
    batch: chosen answers first, rejected ones after them.

    The fields of this class are filled in by the call (`placed`). How many sequences there are, and
    how long, are sizes of tensors: numbers would be constants to `torch.compile`.

    Attributes:
        positions: int64 per token: its place in `[sequences, length]`, or the place after the last
            if it does not count.
        counted: bool `[sequences, length]`: which tokens count.
    """

    members: ClassVar[int] = 1
    coupled: ClassVar[bool] = True

    positions: Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64), metadata=per_token().metadata
    )
    counted: Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool),
        metadata=per_sequence().metadata,
    )

    def losses(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The losses `[sequences / members]`, differentiable.

        Args:
            sums: float64 `[sequences]`, of the statistic over labelled tokens.
            counts: float64 `[sequences]`, how many these are.
        """
        raise NotImplementedError

    def derivatives(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The derivative of the sum of all losses by each of the sums, `[sequences]`."""
        raise NotImplementedError

    def tokens(self, log_odds: Tensor) -> Tensor:
        """The statistic of each token, `[n]`, differentiable: `log p`."""
        return log_sigmoid(log_odds)

    def token_slopes(self, log_odds: Tensor) -> Tensor:
        """Its derivative by the log-odds, `[n]`."""
        return torch.sigmoid(-log_odds)

    def placed(self, counted: Tensor) -> SequenceObjective:
        """The objective of a batch.

        Args:
            counted: bool `[..., T]`: which tokens count.

        Raises:
            ValueError: The number of sequences does not fit, or a tensor's shape.
        """
        sequences = math.prod(counted.shape[:-1])
        if sequences % self.members:
            raise ValueError(
                f"{self.name!r} takes {self.members} equally large parts of the batch, "
                f"got {sequences} sequences"
            )
        of_sequences = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.kw_only and isinstance(getattr(self, field.name), Tensor)
        }
        for name, value in of_sequences.items():
            self._check(name, value, counted)
        flat = counted.reshape(-1)
        place = torch.arange(flat.shape[0], device=counted.device)
        return dataclasses.replace(
            self,
            positions=torch.where(flat, place, flat.shape[0]),
            counted=counted.reshape(sequences, counted.shape[-1]),
            **{name: value.detach().reshape(-1) for name, value in of_sequences.items()},
        )

    def _check(self, name: str, value: Tensor, counted: Tensor) -> None:
        if value.shape != counted.shape[:-1]:
            raise ValueError(
                f"{name} must hold one number for each sequence, shape "
                f"{list(counted.shape[:-1])}, got {list(value.shape)}"
            )
        if value.device != counted.device:
            raise ValueError(
                f"{name} must be on the labels' device {counted.device}, got {value.device}"
            )

    def _grid(self, values: Tensor) -> Tensor:
        """Per-token values `[n]` in their places, `[sequences, length]`, and 0 elsewhere."""
        grid = values.new_zeros(self.counted.numel() + 1).scatter(0, self.positions, values)
        return grid[:-1].view(self.counted.shape)

    def _grouped(self) -> Tensor:
        """Which tokens of each group of sequences count, bool `[groups, members * length]`."""
        if self.members == 1:
            return self.counted
        sequences, length = self.counted.shape
        groups = sequences // self.members
        grouped = self.counted.reshape(self.members, groups, length).transpose(0, 1)
        return grouped.reshape(groups, self.members * length)

    def _sums(self, log_odds: Tensor) -> tuple[Tensor, Tensor]:
        """Sums and counts, `[sequences]` each; in a fixed order, without atomics."""
        sums = self._grid(self.tokens(log_odds.double())).sum(1)
        return sums, self.counted.sum(1).double()

    def per_sequence(self, log_odds: Tensor) -> Tensor:
        """The losses `[sequences / members]`, differentiable; 0 for one without a token.

        In float64: a long answer has hundreds of nats, of which float32 would lose digits that
        its exponential needs. These are a few numbers per token.
        """
        losses = self.losses(*self._sums(log_odds))
        return torch.where(self._grouped().any(1), losses, 0.0).to(log_odds.dtype)

    def groups(self) -> Tensor:
        """How many losses there are, 0-d: groups of sequences with a token that counts."""
        return self._grouped().any(1).sum()

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """The loss of each sequence (or pair) at its first token that counts, 0 at the others."""
        length, counted = self.counted.shape[1], self._grouped()
        groups, nowhere = counted.shape[0], self.counted.numel()
        if nowhere == 0:
            return torch.zeros_like(log_odds)
        first = counted.int().argmax(1)
        member, offset = first // length, first % length
        group = torch.arange(groups, device=first.device)
        places = torch.where(counted.any(1), (member * groups + group) * length + offset, nowhere)
        grid = log_odds.new_zeros(nowhere + 1)
        return grid.scatter(0, places, self.per_sequence(log_odds))[self.positions]

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """The derivative of the sum of all losses by each token's log-odds."""
        of_sums = self.derivatives(*self._sums(log_odds))[:, None]
        of_sums = of_sums.expand(self.counted.shape).reshape(-1)
        of_sums = torch.cat((of_sums, of_sums.new_zeros(1)))[self.positions]
        return (of_sums * self.token_slopes(log_odds.double())).to(log_odds.dtype)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class NPO(SequenceObjective):
    """Negative preference optimisation (arXiv 2404.05868).

    `-(2 / beta) log sigmoid(-beta (log p(y) - log p_ref(y)))`, both summed over the answer.

    Attributes:
        reference: `log p_ref(y)` of each sequence under the starting model.
        beta: Inverse temperature; the paper's 0.1.
    """

    name: ClassVar[str] = "npo"
    reference: Tensor = per_sequence()
    beta: float = 0.1

    def losses(self, sums: Tensor, counts: Tensor) -> Tensor:
        """See `SequenceObjective.losses`."""
        return -2 / self.beta * log_sigmoid(-self.beta * (sums - self.reference))

    def derivatives(self, sums: Tensor, counts: Tensor) -> Tensor:
        """`2 sigmoid(beta (log p(y) - log p_ref(y)))`."""
        return 2 * torch.sigmoid(self.beta * (sums - self.reference))


@register
@dataclasses.dataclass(frozen=True, eq=False)
class SimNPO(SequenceObjective):
    """SimNPO (arXiv 2410.07163): NPO without a reference, with the mean log-probability.

    `-(2 / beta) log sigmoid(-beta (log p(y) / |y| + delta))`, with `|y|` the labelled tokens. The
    paper writes its margin outside beta, `gamma = beta delta`; this is the authors' code and
    OpenUnlearning's, whose defaults these are.

    Attributes:
        beta: Inverse temperature.
        delta: Margin.
    """

    name: ClassVar[str] = "simnpo"
    beta: float = 1.0
    delta: float = 0.0

    def losses(self, sums: Tensor, counts: Tensor) -> Tensor:
        """See `SequenceObjective.losses`."""
        mean = sums / counts.clamp(min=1)
        return -2 / self.beta * log_sigmoid(-self.beta * (mean + self.delta))

    def derivatives(self, sums: Tensor, counts: Tensor) -> Tensor:
        """`2 sigmoid(beta (log p(y) / |y| + delta)) / |y|`."""
        lengths = counts.clamp(min=1)
        return 2 * torch.sigmoid(self.beta * (sums / lengths + self.delta)) / lengths


@register
@dataclasses.dataclass(frozen=True, eq=False)
class DPO(SequenceObjective):
    """Direct preference optimisation (arXiv 2305.18290).

    `-log sigmoid(beta (chosen - rejected))`, each the log-ratio of model and starting model, summed
    over the answer. The first half of the batch holds the chosen answers, the second the rejected.

    Attributes:
        reference: `log p_ref(y)` of each sequence of the batch, both halves.
        beta: Inverse temperature.
    """

    name: ClassVar[str] = "dpo"
    members: ClassVar[int] = 2
    reference: Tensor = per_sequence()
    beta: float = 0.1

    def losses(self, sums: Tensor, counts: Tensor) -> Tensor:
        """See `SequenceObjective.losses`."""
        chosen, rejected = (sums - self.reference).chunk(2)
        return -log_sigmoid(self.beta * (chosen - rejected))

    def derivatives(self, sums: Tensor, counts: Tensor) -> Tensor:
        """`-beta sigmoid(-beta (chosen - rejected))` for the chosen, minus that for the other."""
        chosen, rejected = (sums - self.reference).chunk(2)
        slope = self.beta * torch.sigmoid(-self.beta * (chosen - rejected))
        return torch.cat((-slope, slope))


@register
@dataclasses.dataclass(frozen=True, eq=False)
class IdkDPO(DPO):
    """DPO that prefers a refusal ("I don't know") to the answer to forget (TOFU, arXiv 2401.06121).

    `2 / beta` times DPO's loss, as in the code of NPO and OpenUnlearning. Refusals come first.
    """

    name: ClassVar[str] = "idk_dpo"

    def losses(self, sums: Tensor, counts: Tensor) -> Tensor:
        """See `SequenceObjective.losses`."""
        return 2 / self.beta * super().losses(sums, counts)

    def derivatives(self, sums: Tensor, counts: Tensor) -> Tensor:
        """`2 / beta` times DPO's."""
        return 2 / self.beta * super().derivatives(sums, counts)
