"""What a model says of the labelled tokens of one example: all that the metrics need of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TokenRecord:
    """The labelled tokens of one example in their order, `[n]` each.

    Attributes:
        log_prob: `log p` of the token, in nats.
        is_argmax: whether it is the token of the largest logit.
        mean: the mean of `log p` under the model: minus the entropy.
        variance: the variance of `log p` under the model.
    """

    log_prob: Floats
    is_argmax: Bools
    mean: Floats
    variance: Floats

    def __len__(self) -> int:
        return len(self.log_prob)

    @staticmethod
    def joined(parts: Sequence[TokenRecord]) -> TokenRecord:
        """One text that a model was shown in parts, at least one."""
        columns = (
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(TokenRecord)
        )
        return TokenRecord(*columns)

    def without_last(self) -> TokenRecord:
        """All tokens but the last one, which OpenUnlearning takes for the end of sequence."""
        return TokenRecord(
            self.log_prob[:-1], self.is_argmax[:-1], self.mean[:-1], self.variance[:-1]
        )
