"""How much of an answer a model would give away, word for word."""

from __future__ import annotations

import numpy as np

from unilogit_kernels.unlearning.metrics.tokens import Bools


def exact_memorization(is_argmax: Bools) -> float:
    """The share of an answer's tokens that the model predicts, each after the true ones before it.

    Tirumala et al. (arXiv 2205.10770). Every labelled token counts; OpenUnlearning leaves out the
    last: `TokenRecord.without_last`.

    Args:
        is_argmax: `[n]` of the labelled tokens, at least one.

    Example:
        >>> import numpy as np
        >>> exact_memorization(np.array([True, False, True, True]))
        0.75
    """
    return float(np.mean(is_argmax, dtype=np.float64))


def extraction_strength(is_argmax: Bools, *, least: bool = False) -> float:
    """How much of an answer follows by itself: `1 - k / n` after the shortest prefix k it takes.

    After k true tokens all others are argmaxes. Carlini et al. (arXiv 2012.07805), as
    OpenUnlearning has it but for two things: it leaves out the last labelled token
    (`TokenRecord.without_last`), and it does not go below `1 / n`, see `least`.

    Args:
        is_argmax: `[n]` of the labelled tokens, at least one.
        least: give `1 / n`, as OpenUnlearning, where not even the last token is predicted.
            Otherwise that is 0.

    Example:
        >>> import numpy as np
        >>> extraction_strength(np.array([True, False, True, True]))
        0.5
        >>> never = np.array([True, True, True, False])
        >>> extraction_strength(never), extraction_strength(never, least=True)
        (0.0, 0.25)
    """
    n = len(is_argmax)
    misses = np.flatnonzero(~np.asarray(is_argmax, dtype=bool))
    prefix = int(misses[-1]) + 1 if len(misses) else 0
    if least:
        prefix = min(prefix, n - 1)
    return 1.0 - prefix / n
