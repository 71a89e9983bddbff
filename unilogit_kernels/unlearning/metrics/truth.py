"""Whether a model prefers true answers to wrong ones, and how it compares with a golden model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

_TINY = 1e-10
"""What TOFU adds to a denominator that could be 0."""


def truth_ratio(right_loss: float, wrong_losses: Sequence[float]) -> float:
    """How likely wrong answers are beside the right one: `R = exp(-mean l_wrong) / exp(-l_right)`.

    TOFU (arXiv 2401.06121), equation 1, with the geometric mean of the wrong answers, as
    OpenUnlearning and TOFU's later code have it (the paper's text has the arithmetic one). To the
    denominator 1e-10 is added.

    Args:
        right_loss: mean loss of the right answer; of its paraphrase where there is one, since the
            answer itself may be known by heart.
        wrong_losses: mean loss of each wrong answer.

    Returns:
        Below 1 where the model prefers the truth.

    Example:
        >>> import numpy as np
        >>> round(truth_ratio(-np.log(0.5), -np.log([0.5, 0.125])), 6)
        0.5
    """
    return float(np.exp(-np.mean(wrong_losses)) / (np.exp(-right_loss) + _TINY))


def truth_balance(ratios: ArrayLike) -> NDArray[np.float64]:
    """`min(R, 1 / (R + 1e-10))`: 1 where truth and untruth are equally likely.

    What is averaged over rows to forget (OpenUnlearning's `closer_to_1_better`).

    Args:
        ratios: truth ratios, of any shape.

    Example:
        >>> truth_balance([0.5, 4.0]).round(6).tolist()
        [0.5, 0.25]
    """
    given = np.asarray(ratios, dtype=np.float64)
    return np.minimum(given, 1 / (given + _TINY))


def truth_preference(ratios: ArrayLike) -> NDArray[np.float64]:
    """`max(0, 1 - R)`: 1 where only the truth is likely.

    What is averaged over all other rows (OpenUnlearning's `true_better`).

    Args:
        ratios: truth ratios, of any shape.

    Example:
        >>> truth_preference([0.25, 4.0]).tolist()
        [0.75, 0.0]
    """
    return np.maximum(0.0, 1.0 - np.asarray(ratios, dtype=np.float64))


def forget_quality(ratios: ArrayLike, golden: ArrayLike) -> float:
    """Whether truth ratios could be the golden model's: the p-value of a Kolmogorov-Smirnov test.

    TOFU (arXiv 2401.06121), section 2.2.3: two samples, two sides. OpenUnlearning tests `1 / R`,
    which is the same test. The p-value depends on the number of rows: compare equal numbers only.

    Args:
        ratios: `[rows]`, of the rows to forget.
        golden: the same of a model that never saw them.

    Returns:
        1 where the two are the same sample; below 0.05 they are told apart.

    Example:
        >>> forget_quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
        1.0
    """
    return float(stats.ks_2samp(np.asarray(ratios), np.asarray(golden)).pvalue)


def forget_qualities(ratios: ArrayLike, golden: ArrayLike) -> NDArray[np.float64]:
    """`forget_quality` of many pairs of samples at once, such as a bootstrap draws.

    Of samples of given sizes the p-value depends on the distance of their distributions alone,
    which takes few values: SciPy is asked once for each.

    Args:
        ratios: `[draws, rows]`.
        golden: `[draws, other rows]`.

    Returns:
        `[draws]`.

    Example:
        >>> forget_qualities([[0.1, 0.2], [0.1, 0.2]], [[0.1, 0.2], [0.3, 0.4]]).round(4).tolist()
        [1.0, 0.3333]
    """
    known: dict[int, float] = {}
    pairs = zip(np.asarray(ratios), np.asarray(golden), strict=True)
    return np.array([_known_quality(known, *pair) for pair in pairs])


def _known_quality(
    known: dict[int, float], first: NDArray[np.float64], second: NDArray[np.float64]
) -> float:
    both = np.concatenate([first, second])
    below = (np.searchsorted(np.sort(each), both, side="right") for each in (first, second))
    counts = next(below) * len(second) - next(below) * len(first)
    distance = int(np.abs(counts).max())  # Times both sizes: a whole number.
    if distance not in known:
        known[distance] = forget_quality(first, second)
    return known[distance]


def model_utility(values: ArrayLike) -> NDArray[np.float64]:
    """The harmonic mean of what is good to be high: one bad value spoils it.

    TOFU (arXiv 2401.06121), section 2.2.2: over probability, ROUGE and truth ratio on retain set,
    real authors and world facts.

    Args:
        values: `[..., n]`, none negative.

    Returns:
        `[...]`; 0 where a value is 0.

    Example:
        >>> float(model_utility([0.5, 1.0]).round(6))
        0.666667
    """
    return np.asarray(stats.hmean(np.asarray(values, dtype=np.float64), axis=-1))
