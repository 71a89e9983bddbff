"""The public names: what `import unilogit_kernels` gives, at the first use of one of them."""

from unilogit_kernels.backends.registry import available_backends
from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.calls.vocab_parallel import VocabParallel
from unilogit_kernels.functional import (
    linear_objective_loss,
    linear_target_log_odds,
    linear_unilogit_loss,
    objective_loss,
    shift_labels,
    target_log_odds,
    unilogit_loss,
)
from unilogit_kernels.functional.cross_entropy import (
    CrossEntropyResult,
    cross_entropy_loss,
    linear_cross_entropy_loss,
)
from unilogit_kernels.functional.explain import explain_plan
from unilogit_kernels.functional.kl import kl_loss, linear_kl_loss
from unilogit_kernels.functional.mixed import MixedLoss, linear_mixed_loss, mixed_loss
from unilogit_kernels.functional.modules import LinearUnilogitLoss, UnilogitLoss
from unilogit_kernels.functional.runner_up import (
    TargetAndRunnerUp,
    linear_target_and_runner_up,
    target_and_runner_up,
)
from unilogit_kernels.functional.sequences import linear_sequence_log_probs, sequence_log_probs
from unilogit_kernels.functional.token_statistics import (
    TokenStatistics,
    linear_token_statistics,
    token_statistics,
)
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.maths.rewrites import Mask, Shift, Uniform

__all__ = [
    "CrossEntropyResult",
    "LinearOptions",
    "LinearUnilogitLoss",
    "LowRank",
    "Mask",
    "MixedLoss",
    "Shift",
    "TargetAndRunnerUp",
    "TokenStatistics",
    "Uniform",
    "UnilogitLoss",
    "VocabParallel",
    "available_backends",
    "cross_entropy_loss",
    "explain_plan",
    "kl_loss",
    "linear_cross_entropy_loss",
    "linear_kl_loss",
    "linear_mixed_loss",
    "linear_objective_loss",
    "linear_sequence_log_probs",
    "linear_target_and_runner_up",
    "linear_target_log_odds",
    "linear_token_statistics",
    "linear_unilogit_loss",
    "mixed_loss",
    "objective_loss",
    "sequence_log_probs",
    "shift_labels",
    "target_and_runner_up",
    "target_log_odds",
    "token_statistics",
    "unilogit_loss",
]
