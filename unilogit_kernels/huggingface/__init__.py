"""A fused loss in the place of a Hugging Face causal LM's logits.

It imports neither transformers nor accelerate: whoever has a model has what it is made of.
"""

from unilogit_kernels.huggingface.head import (
    HeadCall,
    HeadTransform,
    UnsupportedHeadError,
    fused_log_odds,
    fused_loss,
    fused_token_statistics,
    observe_logit_transform,
    run_head,
    run_head_with_auxiliary_loss,
    verify_head,
)
from unilogit_kernels.huggingface.trl_head import restore_trl, use_in_trl
from unilogit_kernels.huggingface.two_heads import (
    WithoutAdapters,
    frozen_copy,
    fused_kl_loss,
    heads_kl_loss,
    run_two_heads,
    run_two_heads_with_auxiliary_loss,
)

__all__ = [
    "HeadCall",
    "HeadTransform",
    "UnsupportedHeadError",
    "WithoutAdapters",
    "frozen_copy",
    "fused_kl_loss",
    "fused_log_odds",
    "fused_loss",
    "fused_token_statistics",
    "heads_kl_loss",
    "observe_logit_transform",
    "restore_trl",
    "run_head",
    "run_head_with_auxiliary_loss",
    "run_two_heads",
    "run_two_heads_with_auxiliary_loss",
    "use_in_trl",
    "verify_head",
]
