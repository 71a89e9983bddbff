"""ROUGE, by the conventions of the benchmarks.

| convention | value | words |
|---|---|---|
| `"tofu"` | L, recall | stemmed |
| `"muse"` | L, F-measure | stemmed, as in OpenUnlearning; MUSE's own code does not stem |
| `"rwku"` | L of whole texts, recall | between spaces, as they are |
| `"words"` | L, F-measure | as they are |

All but RWKU's words are `recall.words`: in ASCII text those of `rouge_score`, in any other they
count, where `rouge_score` knows a to z and 0 to 9 only and gives every answer in Chinese 0.
`literal=True` takes `rouge_score` as it is, which is OpenUnlearning's convention.

RWKU uses the package `rouge`. Its L is `rouge_score`'s rougeLsum with sentences that end in a full
stop, wherever no word occurs twice in a text; the package counts a word that does only once. An
empty answer is taken for "NOANSWER".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rouge_score.rouge_scorer import RougeScorer

from unilogit_kernels.unlearning.benchmarks.sets import RougeConvention
from unilogit_kernels.unlearning.recall import Words, fold


class RougeScores(NamedTuple):
    """The scores of an answer, in `[0, 1]`.

    Attributes:
        rouge1_recall: share of the expected words that the answer holds.
        rouge_l_recall: share of the expected words in the longest common subsequence.
        rouge_l_f1: its F-measure.
        value: the one of them that the convention takes.
    """

    rouge1_recall: float
    rouge_l_recall: float
    rouge_l_f1: float
    value: float


class _BetweenSpaces:
    """Words as the package `rouge` has them, for `RougeScorer`."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


_KINDS = ["rouge1", "rougeL"]
_STEMMED = RougeScorer(_KINDS, tokenizer=Words(stem=True))
_PLAIN = RougeScorer(_KINDS, tokenizer=Words())
_LITERAL = RougeScorer(_KINDS, use_stemmer=True)
_SENTENCES = RougeScorer(["rouge1", "rougeLsum"], tokenizer=_BetweenSpaces())
_NO_ANSWER = "NOANSWER"


def rouge_scores(
    expected: str | Sequence[str],
    answer: str,
    convention: RougeConvention = "words",
    *,
    literal: bool = False,
) -> RougeScores:
    """Compare an answer with the expected one, or with the closest of several.

    Args:
        expected: what was to be said.
        answer: what was said.
        convention: see the module.
        literal: words as `rouge_score` has them, not those of any script; nothing to `"rwku"`.

    Returns:
        Where nothing is expected that is a word: 1 for the same signs, 0 for others.

    Example:
        >>> scores = rouge_scores("Her parcels went by ship.", "The parcel went by ship", "tofu")
        >>> round(scores.value, 3), round(scores.rouge_l_f1, 3)
        (0.8, 0.8)
    """
    if not isinstance(expected, str):
        found = [rouge_scores(each, answer, convention, literal=literal) for each in expected]
        return max(found, key=lambda scores: scores.value)
    if convention == "rwku":
        return _of_sentences(expected, answer.strip() or _NO_ANSWER)
    if not literal and not Words().tokenize(expected):
        same = float(fold(expected) == fold(answer))
        return RougeScores(same, same, same, same)
    scorer = _LITERAL if literal else _PLAIN if convention == "words" else _STEMMED
    seen = scorer.score(expected, answer)
    longest = seen["rougeL"]
    value = longest.recall if convention == "tofu" else longest.fmeasure
    return RougeScores(
        *map(float, (seen["rouge1"].recall, longest.recall, longest.fmeasure, value))
    )


def _of_sentences(expected: str, answer: str) -> RougeScores:
    lines = (text.replace("\n", " ").replace(".", "\n") for text in (expected, answer))
    seen = _SENTENCES.score(*lines)
    longest = seen["rougeLsum"]
    return RougeScores(
        *map(float, (seen["rouge1"].recall, longest.recall, longest.fmeasure, longest.recall))
    )
