"""How likely a model finds an answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unilogit_kernels.unlearning.metrics.tokens import Floats

_TINY = 1e-10
"""What TOFU adds to a denominator that could be 0."""


def mean_loss(log_prob: Floats) -> float:
    """Mean negative log-likelihood of an answer's tokens, in nats: `l = -mean(log p)`.

    TOFU's `avg_loss`. The end of sequence counts where it is labelled, here as in OpenUnlearning.

    Args:
        log_prob: `[n]` of the labelled tokens, at least one.

    Example:
        >>> import numpy as np
        >>> round(mean_loss(np.log([0.5, 0.125])), 4)
        1.3863
    """
    return float(-np.mean(log_prob, dtype=np.float64))


def probability(log_prob: Floats) -> float:
    """Geometric mean of the probabilities of an answer's tokens, `exp(-l)`, in `[0, 1]`.

    TOFU (arXiv 2401.06121), section 2.2.2; OpenUnlearning's `prob`.

    Args:
        log_prob: `[n]` of the labelled tokens, at least one.

    Example:
        >>> import numpy as np
        >>> round(probability(np.log([0.5, 0.125])), 4)
        0.25
    """
    return float(np.exp(-mean_loss(log_prob)))


def normalised_probability(right: float, wrong: Sequence[float]) -> float:
    """The share that a right answer has of all answers given: `p / (p + sum(p_wrong) + 1e-10)`.

    TOFU's probability on real authors and world facts; OpenUnlearning's `probability_w_options`.

    Args:
        right: probability of the right answer.
        wrong: probabilities of the wrong ones.

    Example:
        >>> round(normalised_probability(0.5, [0.25, 0.25]), 6)
        0.5
    """
    return right / (right + sum(wrong) + _TINY)


def perplexity(loss_sums: ArrayLike, tokens: ArrayLike) -> NDArray[np.float64]:
    """`exp` of the mean loss of all tokens of a text, or of several: each token weighs the same.

    Args:
        loss_sums: `[..., rows]`, the sum of the losses of each row, in nats.
        tokens: `[..., rows]`, how many there are in each.

    Returns:
        `[...]`, at least 1.

    Example:
        >>> import numpy as np
        >>> float(perplexity(np.log([4.0, 64.0]), [1, 3]))  # four tokens of probability 1/4
        4.0
    """
    total = np.sum(np.asarray(tokens, dtype=np.float64), axis=-1)
    return np.asarray(np.exp(np.sum(np.asarray(loss_sums, dtype=np.float64), axis=-1) / total))


def chosen(log_probs: Sequence[float]) -> int:
    """The answer of a question of multiple choice: the one of the largest log-probability.

    As the Language Model Evaluation Harness has it (its `acc`, not `acc_norm`): the sum over the
    tokens of the choice, without an end of sequence. Of equal ones the first.

    Args:
        log_probs: of each choice.

    Example:
        >>> chosen([-3.0, -1.0, -2.0])
        1
    """
    return int(np.argmax(log_probs))


def right_share(log_probs: Sequence[float], right: Collection[int]) -> float:
    """The probability of the right answers among all that are offered.

    TruthfulQA's MC2 (arXiv 2109.07958): `sum p_right / sum p`.

    Args:
        log_probs: of each answer, the sum over its tokens.
        right: the positions of the right ones.

    Example:
        >>> import numpy as np
        >>> round(right_share(np.log([0.3, 0.1, 0.1]), {0, 2}), 4)
        0.8
    """
    weights = np.exp(np.asarray(log_probs) - np.max(log_probs))
    return float(weights[list(right)].sum() / weights.sum())
