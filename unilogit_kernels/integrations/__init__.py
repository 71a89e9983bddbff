"""Into other people's code: a fused loss from `model(..., labels=)`, OpenUnlearning's trainers.

`open_unlearning` is imported by its own name.
"""

from unilogit_kernels.integrations.patching import FusedOutput, patch, unpatch

__all__ = ["FusedOutput", "patch", "unpatch"]
