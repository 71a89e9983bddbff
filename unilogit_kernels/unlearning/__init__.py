"""Unlearning with the Hugging Face Trainer: data, methods, runs, evaluation.

Needs the extra `unlearn`; the fused head in `unilogit_kernels.huggingface` does not.
"""

from unilogit_kernels.unlearning.requirements import check_requirements

check_requirements()
