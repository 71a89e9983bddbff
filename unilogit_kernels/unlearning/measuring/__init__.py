"""Measuring models on sets of rows: from one pass over the tokens to files that others can read."""

from unilogit_kernels.unlearning.measuring.request import Request
from unilogit_kernels.unlearning.measuring.run import Report, measure
from unilogit_kernels.unlearning.measuring.sets import sets_of_rows

__all__ = ["Report", "Request", "measure", "sets_of_rows"]
