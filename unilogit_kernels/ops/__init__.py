"""The operators that torch sees: schemas, fake kernels, derivatives. No maths.

They are of two kinds, for logits and for an lm_head each, in the namespace `unilogit_kernels`. One
gives values of rows (log-odds, divergences), keeps the rows' state, and reads the logits again for
a gradient; the other gives a reduced loss and finishes the gradients in its forward, where the
logits are at hand, so that its backward only scales them. `divergence` makes both of them for two
models' rows.
"""

from unilogit_kernels.ops import divergence, linear, logits
from unilogit_kernels.ops.registration import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "divergence", "linear", "logits"]
