"""Labels that are none: where looking for them costs nothing, and where somebody asks for it."""

from __future__ import annotations

import os

from torch import Tensor

CHECK_LABELS_VARIABLE = "UNILOGIT_KERNELS_CHECK_LABELS"
"""Set to 1 to check labels on accelerators too, at the price of a synchronisation per call."""


def check_label_range(labels: Tensor, ignore_index: int, vocab_size: int) -> None:
    """On CPU, where it costs nothing; on accelerators a bad label gives NaN for its row instead.

    Raises:
        IndexError: A label is neither in `[0, vocab_size)` nor `ignore_index`.
    """
    if labels.numel() == 0:
        return
    if labels.device.type != "cpu" and os.environ.get(CHECK_LABELS_VARIABLE) != "1":
        return
    least, largest = labels.aminmax()
    if least.item() >= 0 and largest.item() < vocab_size:
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bad.any():
        position = int(bad.nonzero()[0])
        raise IndexError(
            f"labels must be in [0, {vocab_size}) or ignore_index, "
            f"got {int(labels[position])} at flat position {position}"
        )
