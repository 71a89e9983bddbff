"""What kernels' states say of rows, and the rows as they were meant."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels import reference
from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.maths import statistics
from unilogit_kernels.maths.row_state import RowNeeds


def transformed(logits: Tensor, transform: LogitTransform, dtype: torch.dtype) -> Tensor:
    """Logits in `dtype`, as the model makes them of its raw ones."""
    return reference.transform_logits(
        logits.to(dtype), softcap=transform.softcap or None, logit_scale=transform.scale
    )


def found_statistics(state: Tensor, labels: Tensor, v: int, needs: RowNeeds) -> dict[str, Tensor]:
    """Everything that complete states tell, by name."""
    seen = statistics.statistics(state, labels, v, needs)
    found = {name: each for name, each in seen._asdict().items() if each is not None}
    if needs.mean:
        found["mean_logit"] = statistics.mean_logit(state, seen.log_odds, v)
    if needs.variance:
        found["variance"] = statistics.log_prob_variance(state, seen.log_odds, v)
    return found


def literal_statistics(z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The same by their definitions, in the dtype of the transformed logits."""
    return {
        "log_odds": reference.target_log_odds(z, labels),
        "runner_up_log_prob": reference.runner_up_log_prob(z, labels),
        "logsumexp": z.logsumexp(-1),
        "uniform_cross_entropy": reference.uniform_cross_entropy(z),
        "entropy": reference.entropy(z),
        "mean_logit": z.mean(-1),
        "variance": reference.log_prob_variance(z),
    }
