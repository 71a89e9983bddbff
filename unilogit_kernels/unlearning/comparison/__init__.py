"""Methods beside each other on one data set: a plan, its cells on disk, and a report of them."""

from unilogit_kernels.unlearning.comparison.plan import Plan, read_plan
from unilogit_kernels.unlearning.comparison.run import compare

__all__ = ["Plan", "compare", "read_plan"]
