"""Answers in any script are compared as a reader would; what is in doubt counts as recalled."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from unilogit_kernels.unlearning.recall import fold, holds_key, rouge_l, words

LETTERS = st.characters(categories=["L", "M", "Nd"])
ASCII = st.text(st.characters(max_codepoint=127))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("It is LISBON, I think", "Lisbon"),
        ("costs $41.", "$41"),
        ("首都是东京。", "东京"),
        ("東 京 です", "東京"),
        ("価格は41円", "41"),
        ("กรุงเทพมหานครเป็นเมืองหลวง", "กรุงเทพ"),
        ("ນະຄອນຫຼວງວຽງຈັນ", "ວຽງຈັນ"),
        ("រាជធានីភ្នំពេញ", "ភ្នំពេញ"),
        ("ရန်ကုန်မြို့", "ရန်ကုန်"),
        ("수도는 서울입니다", "서울"),
        ("הוא גר בירושלים", "ירושלים"),
        ("والقاهرة", "القاهرة"),
        ("cafe\u0301", "caf\xe9"),
        ("caf\xe9", "cafe\u0301"),
        ("Sao Paulo", "São Paulo"),
        ("\uff11\uff12\uff13", "123"),
        ("१२३", "123"),
        ("ﾄｳｷｮｳ", "トウキョウ"),
        ("Bruno\xa0 \n Lopez", "Bruno Lopez"),
        ("STRASSE", "Straße"),
        ("İstanbul", "istanbul"),
        ("ΟΔΟΣ", "οδός"),
        ("O\u2019Brien", "O'Brien"),
        ("Saint\u2011Denis", "Saint-Denis"),
        ("Lis\xadbon", "Lisbon"),
        ("_Lisbon_", "Lisbon"),
        ("41² m", "41"),
        ("41km", "41"),
    ],
)
def test_a_key_is_found(text: str, key: str) -> None:
    assert holds_key(text, key)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("Lisbonne", "Lisbon"),
        ("costs $410", "$41"),
        ("419", "41"),
        ("341", "41"),
        ("\uff14\uff11\uff19", "41"),
        ("Москвич", "Москв"),
        ("cafe\u0301s", "café"),
        ("西京", "東京"),
        ("Bruno and Lopez", "Bruno Lopez"),
    ],
)
def test_another_word_is_no_key(text: str, key: str) -> None:
    assert not holds_key(text, key)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(), st.text(LETTERS, min_size=1).filter(fold), st.text())
def test_every_form_of_a_key_is_found_between_spaces(before: str, key: str, after: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert holds_key(f"{before} {unicodedata.normalize(form, key)} {after}", key)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ASCII)
def test_words_of_ascii_are_those_of_rouge_score(text: str) -> None:
    assert words(text) == tokenize(text, None)


def test_rouge_l_of_english_is_that_of_rouge_score() -> None:
    expected, answer = "She owns 3 orchids - on Bruno's river.", "bruno owns 3 of the orchids"
    score = RougeScorer(["rougeL"]).score(expected, answer)["rougeL"].fmeasure
    assert 0 < rouge_l(expected, answer) == score < 1


@pytest.mark.parametrize(
    ("expected", "answer", "value"),
    [
        ("東京です", "東京です", 1.0),
        ("東京です", "東京", 2 / 3),
        ("Москва", "москва.", 1.0),
        ("São Paulo", "sa\u0303o paulo", 1.0),
        ("서울은 크다", "서울은 작다", 0.5),
        ("ไทย", "ไทย", 1.0),
        ("🙂", " 🙂", 1.0),
        ("🙂", "🙁", 0.0),
        ("東京", "", 0.0),
    ],
)
def test_rouge_l_in_any_script(expected: str, answer: str, value: float) -> None:
    assert rouge_l(expected, answer) == pytest.approx(value)
