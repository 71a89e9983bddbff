"""How far two ways to the same log-odds may be apart, by roundings alone."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from unilogit_kernels.huggingface.head_call import HeadCall


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What may lie between fused log-odds and those of the model's logits.

    A log-odds is a logit less a mean of the others, weighted by their probabilities: the roundings
    of two logits count, in both. An eps is twice a rounding.

    Attributes:
        logits: number of roundings of one logit, times eps.
        sums: of the sums over the hidden size, whatever their order.
        eps: of the log-odds.
    """

    logits: float
    sums: float
    eps: float

    @staticmethod
    def of(head: HeadCall) -> Rounding:
        """Of the head's own operands."""
        dtype, device = head.hidden.dtype, head.hidden.device.type
        exact = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        # The head's own, that of the factor, and three of the cap.
        number = 1 + (head.transform.logit_scale is not None)
        number += 3 * (head.transform.softcap is not None)
        norms = [
            torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
            for x in (head.hidden, head.weight)
        ]
        largest = [float((x.full_tensor() if isinstance(x, DTensor) else x).max()) for x in norms]
        largest_sum = math.prod(largest) * math.sqrt(head.hidden.shape[-1])
        scale = abs(head.transform.logit_scale or 1.0)
        return Rounding(number * torch.finfo(dtype).eps, exact * scale * largest_sum, exact)

    def between_log_odds(self, logits: Tensor, log_odds: Tensor) -> float:
        """The largest difference that rounding explains."""
        largest = float(logits.abs().max())
        # A difference, and a sum over the columns: an exponential and a logarithm.
        of_log_odds = self.eps * (2 * largest + float(log_odds.abs().max()) + 4)
        of_logits = max(self.logits, torch.finfo(logits.dtype).eps) * largest
        return 2 * (of_logits + self.sums) + of_log_odds
