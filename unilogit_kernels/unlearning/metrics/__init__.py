"""What the field measures of unlearning: one small function for each metric.

They take what `measuring.passes` records of each labelled token, texts, or other metrics; no model
and no logits. Each says which convention it follows; OpenUnlearning's is to be had where it is
another one.
"""

from unilogit_kernels.unlearning.metrics.intervals import (
    Estimate,
    bootstrap,
    mean_estimate,
    share_estimate,
)
from unilogit_kernels.unlearning.metrics.membership import (
    auc,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    privacy_leak,
    reference_score,
    zlib_score,
)
from unilogit_kernels.unlearning.metrics.memorization import (
    exact_memorization,
    extraction_strength,
)
from unilogit_kernels.unlearning.metrics.probability import (
    chosen,
    mean_loss,
    normalised_probability,
    perplexity,
    probability,
    right_share,
)
from unilogit_kernels.unlearning.metrics.rouge import RougeScores, rouge_scores
from unilogit_kernels.unlearning.metrics.tokens import TokenRecord
from unilogit_kernels.unlearning.metrics.truth import (
    forget_qualities,
    forget_quality,
    model_utility,
    truth_balance,
    truth_preference,
    truth_ratio,
)

__all__ = [
    "Estimate",
    "RougeScores",
    "TokenRecord",
    "auc",
    "bootstrap",
    "chosen",
    "exact_memorization",
    "extraction_strength",
    "forget_qualities",
    "forget_quality",
    "loss_score",
    "mean_estimate",
    "mean_loss",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_utility",
    "normalised_probability",
    "perplexity",
    "privacy_leak",
    "probability",
    "reference_score",
    "right_share",
    "rouge_scores",
    "share_estimate",
    "truth_balance",
    "truth_preference",
    "truth_ratio",
    "zlib_score",
]
