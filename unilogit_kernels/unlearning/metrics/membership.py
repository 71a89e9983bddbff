"""Whether it shows that a model was trained on some rows: attacks, and what they reveal.

Every score is higher for a row that looks as if the model had not been trained on it.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from unilogit_kernels.unlearning.metrics.probability import mean_loss
from unilogit_kernels.unlearning.metrics.tokens import Floats

LOWEST_SHARE = 0.4
"""The share of the tokens that min-k looks at, by MUSE (arXiv 2407.06460) and OpenUnlearning."""
_LEAST_VARIANCE = 1e-6
_TINY = 1e-10


def loss_score(log_prob: Floats) -> float:
    """The mean loss (LOSS attack; Yeom et al., arXiv 1709.01604).

    Args:
        log_prob: `[n]` of the labelled tokens, at least one.

    Example:
        >>> import numpy as np
        >>> loss_score(np.array([-1.0, -3.0]))
        2.0
    """
    return mean_loss(log_prob)


def zlib_score(loss: float, text: str) -> float:
    """The mean loss over the length of the text's zlib stream, in nats a byte.

    Carlini et al. (arXiv 2012.07805): what compresses well is likely for every model.

    Args:
        loss: mean loss of the answer's tokens.
        text: the answer; it is encoded as UTF-8.

    Example:
        >>> zlib_score(2.0, "a" * 100) > zlib_score(2.0, "seven different words and then some")
        True
    """
    return loss / len(zlib.compress(text.encode("utf-8")))


def reference_score(loss: float, reference_loss: float) -> float:
    """The mean loss above that of a model which was not trained on the row.

    Carlini et al. (arXiv 2012.07805).

    Args:
        loss: mean loss of the row under the model.
        reference_loss: the same under the other one.

    Example:
        >>> reference_score(2.0, 2.5)
        -0.5
    """
    return loss - reference_loss


def min_k_score(log_prob: Floats, share: float = LOWEST_SHARE) -> float:
    """Minus the mean of the lowest `max(1, int(share * n))` log-probabilities (Min-K% Prob).

    Shi et al. (arXiv 2310.16789). Every labelled token counts; OpenUnlearning leaves out the last:
    `TokenRecord.without_last`.

    Args:
        log_prob: `[n]` of the labelled tokens, at least one.
        share: of the tokens.

    Example:
        >>> import numpy as np
        >>> min_k_score(np.array([-1.0, -4.0, -2.0, -0.5, -0.1]))
        3.0
    """
    number = max(1, int(len(log_prob) * share))
    return float(-np.mean(np.sort(np.asarray(log_prob, dtype=np.float64))[:number]))


def min_k_plus_plus_score(
    log_prob: Floats, mean: Floats, variance: Floats, share: float = LOWEST_SHARE
) -> float:
    """`min_k_score` of `(log p - mean) / sqrt(max(variance, 1e-6))` (Min-K%++).

    Zhang et al. (arXiv 2404.02936). Every labelled token counts; OpenUnlearning leaves out the
    last: `TokenRecord.without_last`.

    Args:
        log_prob: `[n]` of the labelled tokens, at least one.
        mean: `[n]`, the mean of `log p` under the model.
        variance: `[n]`, its variance under the model.
        share: of the tokens.

    Example:
        >>> import numpy as np
        >>> log_prob, mean, variance = np.array([[-3.0, -1.0], [-2.0, -1.0], [4.0, 1.0]])
        >>> min_k_plus_plus_score(log_prob, mean, variance)
        0.5
    """
    spread = np.sqrt(np.maximum(np.asarray(variance, dtype=np.float64), _LEAST_VARIANCE))
    surprise = np.asarray(log_prob, dtype=np.float64) - np.asarray(mean, dtype=np.float64)
    return min_k_score(surprise / spread, share)


def auc(forget: ArrayLike, holdout: ArrayLike) -> NDArray[np.float64]:
    """How well scores tell rows to forget from rows of the same kind that were never trained on.

    The area under the ROC curve, where holdout rows are the positive ones: the chance that a
    holdout row scores higher than a row to forget, ties counting half. As in OpenUnlearning, 1
    means that what was to be forgotten is still memorised, 0.5 that nothing shows, and 0 that it
    was pushed so far away that it shows again. MUSE's own code has it the other way round.

    Args:
        forget: `[..., rows]`, scores of the rows to forget.
        holdout: `[..., other rows]`.

    Returns:
        `[...]`, in `[0, 1]`.

    Example:
        >>> float(auc([0.1, 0.2], [0.2, 0.9]))
        0.875
    """
    first, second = np.asarray(forget, dtype=np.float64), np.asarray(holdout, dtype=np.float64)
    n, m = first.shape[-1], second.shape[-1]
    ranks = stats.rankdata(np.concatenate([first, second], axis=-1), axis=-1)
    above = ranks[..., n:].sum(axis=-1) - m * (m + 1) / 2
    return np.asarray(above / (n * m))


def privacy_leak(area: ArrayLike, golden: ArrayLike) -> NDArray[np.float64]:
    """PrivLeak: how far an attack's area is from the golden model's, in percent of the latter.

    MUSE (arXiv 2407.06460), section 3.3, in OpenUnlearning's signs: with `a = 1 - AUC` it is
    `100 (a - a_golden) / (a_golden + 1e-10)`. MUSE and OpenUnlearning take min-k's area.

    Args:
        area: `auc` of the model.
        golden: `auc` of the golden one.

    Returns:
        0 where both reveal the same; near -100 where the rows are still memorised, far above 0
        where they were over-forgotten.

    Example:
        >>> float(privacy_leak(1.0, 0.5).round(4)), float(privacy_leak(0.25, 0.5).round(4))
        (-100.0, 50.0)
    """
    a, a_golden = 1 - np.asarray(area, dtype=np.float64), 1 - np.asarray(golden, dtype=np.float64)
    return np.asarray(100 * (a - a_golden) / (a_golden + _TINY))
