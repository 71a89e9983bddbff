"""Comparing answers with what was to be answered, in any script.

To call something forgotten that is not is the worse mistake, so what is in doubt counts as
recalled: other forms of the same character, and keys inside a run of letters wherever a script
does not set its words apart.
"""

from __future__ import annotations

import unicodedata
from typing import Literal

import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

# Writing without spaces between words: each character counts as a word.
_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    r"\p{Tibetan}\p{Javanese}\p{Balinese}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}"
    "\u30fc"  # the mark of a long vowel, of no one script
)
_UNSPACED_CHARACTER = rf"[{_UNSPACED}&&[\p{{L}}\p{{N}}]]\p{{M}}*"
_WORDS = regex.compile(
    rf"{_UNSPACED_CHARACTER}|[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]+", regex.V1
)
_SPACE_INSIDE_UNSPACED = regex.compile(rf"(?<=[{_UNSPACED}]) (?=[{_UNSPACED}])", regex.V1)

# What must not go on beside a key that ends in the like. Scripts that are not named attach
# particles, articles and endings to their words, or have no spaces.
_RUNS = (r"[\p{Latin}\p{Greek}\p{Cyrillic}\p{Inherited}]", r"\p{Nd}")

_APOSTROPHES, _QUOTATIONS = "\u2018\u2019\u201b\u02bc\xb4`", "\u201c\u201d\u201e\u201f\xab\xbb"
_QUOTES = str.maketrans(dict.fromkeys(_APOSTROPHES, "'") | dict.fromkeys(_QUOTATIONS, '"'))
_DASHES = regex.compile(r"[\p{Pd}\u2212]")
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}|\p{Cf}")
_SPACES = regex.compile(r"\s+")
_DIGITS = regex.compile(r"\p{Nd}")
_ACCENTS = regex.compile(r"(?<=[\p{Latin}\p{Greek}]\p{M}*)\p{M}")


def fold(text: str, form: Literal["NFC", "NFKC"] = "NFKC") -> str:
    """A text without the differences that leave its meaning alone.

    Case, Unicode forms, digits of other scripts, curly quotes, dashes, invisible characters, and
    the kind and number of spaces.

    Args:
        text: any.
        form: a normal form of Unicode; NFKC makes full-width and other variants plain as well.
    """
    text = unicodedata.normalize(form, text.translate(_QUOTES))
    text = unicodedata.normalize(form, text.casefold()).translate(_QUOTES)
    text = _DIGITS.sub(lambda found: str(unicodedata.decimal(found[0], found[0])), text)
    text = _DASHES.sub("-", _INVISIBLE.sub("", text))
    text = _SPACES.sub(" ", text).strip()
    return str(_SPACE_INSIDE_UNSPACED.sub("", text))


def _without_accents(text: str) -> str:
    marked = unicodedata.normalize("NFKD", fold(text))
    return unicodedata.normalize("NFC", _ACCENTS.sub("", marked))


def holds_key(text: str, key: str) -> bool:
    """Whether a text holds the key, by any spelling of it that says the same.

    A key that begins or ends in a letter of the Latin, Greek or Cyrillic script must not have
    another one there, nor a digit a digit; in other scripts it may stand inside a run of letters.

    Example:
        >>> holds_key("It costs $41, plus tax.", "$41"), holds_key("It costs $419.", "$41")
        (True, False)
        >>> holds_key("首都是东京。", "东京")
        True
    """
    # NFC besides, for what NFKC runs together: "41²" is no 412.
    forms = (fold, lambda given: fold(given, "NFC"), _without_accents)
    return any(_found(form(text), form(key)) for form in forms)


def _found(text: str, key: str) -> bool:
    pattern = _outside(key[:1], "(?<!{})") + regex.escape(key) + _outside(key[-1:], "(?!{})")
    return regex.search(pattern, text) is not None


def _outside(edge: str, look: str) -> str:
    """What must not be found beside a key with this first or last character."""
    return next((look.format(run) for run in _RUNS if regex.match(run, edge)), "")


def words(text: str) -> list[str]:
    """The words of a text, in order: folded runs of letters and digits.

    In scripts without spaces between words each character is one. Of ASCII text these are the
    words of `rouge_score`.

    Example:
        >>> words("Bruno's café: 東京 1")
        ['bruno', 's', 'café', '東', '京', '1']
    """
    return [str(word) for word in _WORDS.findall(fold(text))]


class Words:
    """`words`, as `RougeScorer` takes it.

    Args:
        stem: leave out the endings of English words, as `rouge_score` does if it is asked to.
    """

    def __init__(self, stem: bool = False) -> None:
        self._stemmer = PorterStemmer() if stem else None

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        found = words(text)
        stemmer = self._stemmer
        if stemmer is None:
            return found
        return [stemmer.stem(w) if len(w) > _UNSTEMMED and w.isascii() else w for w in found]


_UNSTEMMED = 3
"""Letters of the longest word that `rouge_score` does not stem."""
_SCORER = RougeScorer(["rougeL"], tokenizer=Words())


def rouge_l(expected: str, answer: str) -> float:
    """F-measure of the longest common subsequence of `words`, in `[0, 1]`.

    Where nothing is expected that is a word, 1 for the same signs and 0 for others.
    """
    if not words(expected):
        return float(fold(expected) == fold(answer))
    return float(_SCORER.score(expected, answer)["rougeL"].fmeasure)
