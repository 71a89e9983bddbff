"""The operators that torch sees: schemas, fake kernels, autograd. No maths.

Four forward operators and two backward ones, in the namespace `unilogit_kernels`. An operator that
computes an objective finishes the gradients in its forward, where the logits are at hand; its
backward only scales them. The log-odds operators keep the row state and recompute.
"""

from unilogit_kernels.ops import linear, logits
from unilogit_kernels.ops.registration import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "linear", "logits"]
