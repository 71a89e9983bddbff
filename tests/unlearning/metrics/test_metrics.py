"""Each metric on made cases, against scipy, scikit-learn, `rouge`, or its formula written out."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn.metrics import roc_auc_score

from tests.unlearning.metrics import literal
from unilogit_kernels.unlearning import metrics
from unilogit_kernels.unlearning.benchmarks.sets import RougeConvention
from unilogit_kernels.unlearning.metrics.intervals import RESAMPLES

DRAW = np.random.default_rng(0)


def logits_and_labels(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(tokens, 11, generator=draw, dtype=torch.float64)
    labels = torch.randint(11, (tokens,), generator=draw)
    # Some labels are argmaxes, the last ones among them.
    known = torch.rand(tokens, generator=draw) < 0.5
    known[-tokens // 3 :] = True
    return logits.log_softmax(-1), torch.where(known, logits.argmax(-1), labels)


def record_of(log_p: torch.Tensor, labels: torch.Tensor) -> metrics.TokenRecord:
    p, own = log_p.exp(), log_p.gather(1, labels[:, None])[:, 0]
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean[:, None]).square()).sum(-1)
    hits = log_p.argmax(-1) == labels
    return metrics.TokenRecord(own.numpy(), hits.numpy(), mean.numpy(), variance.numpy())


@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
def test_scores_of_one_answer(tokens: int) -> None:
    log_p, labels = logits_and_labels(tokens, seed=tokens)
    seen = record_of(log_p, labels)
    own = log_p.gather(1, labels[:, None])[:, 0]
    assert metrics.mean_loss(seen.log_prob) == pytest.approx(literal.loss(log_p, labels))
    geometric = float(stats.gmean(own.exp().numpy()))
    assert metrics.probability(seen.log_prob) == pytest.approx(geometric)
    assert metrics.exact_memorization(seen.is_argmax) == pytest.approx(
        literal.exact_memorization(log_p, labels)
    )
    for least in (False, True):
        found = metrics.extraction_strength(seen.is_argmax, least=least)
        assert found == pytest.approx(literal.extraction_strength(log_p, labels, least=least))
    assert metrics.min_k_score(seen.log_prob) == pytest.approx(literal.min_k(log_p, labels))
    assert metrics.min_k_plus_plus_score(seen.log_prob, seen.mean, seen.variance) == pytest.approx(
        literal.min_k_plus_plus(log_p, labels)
    )


def test_extraction_strength_counts_from_the_last_miss() -> None:
    def strength(hits: str, least: bool = False) -> float:
        return metrics.extraction_strength(np.array([c == "x" for c in hits]), least=least)

    assert [strength(hits) for hits in ("xxxx", ".xxx", "x.xx", "...x", "xxx.")] == [
        1.0,
        0.75,
        0.5,
        0.25,
        0.0,
    ]
    assert strength("....", least=True) == strength("xxx.", least=True) == 0.25
    assert strength("...x", least=True) == 0.25


def test_the_last_token_can_be_left_out() -> None:
    seen = record_of(*logits_and_labels(5, seed=0))
    cut = seen.without_last()
    assert len(cut) == len(cut.mean) == len(cut.variance) == len(cut.is_argmax) == 4
    assert np.array_equal(cut.log_prob, seen.log_prob[:4])


def test_a_sure_prediction_has_no_spread_to_divide_by() -> None:
    """The variance is held at 1e-6, as in OpenUnlearning."""
    log_prob, mean, variance = np.array([[-1e-3], [0.0], [0.0]])
    assert metrics.min_k_plus_plus_score(log_prob, mean, variance) == pytest.approx(1.0)


def test_zlib_and_reference_scores() -> None:
    text = "東京 and Tokyo"
    assert metrics.zlib_score(3.0, text) == 3.0 / len(zlib.compress(text.encode()))
    assert metrics.reference_score(3.0, 1.0) == 2.0
    assert metrics.loss_score(np.array([-1.0, -2.0])) == 1.5


def test_truth_ratios() -> None:
    right, wrong = 0.7, [1.1, 3.0, 0.2]
    ratio = metrics.truth_ratio(right, wrong)
    assert ratio == pytest.approx(literal.truth_ratio(right, wrong))
    ratios = np.array([0.0, 0.3, 1.0, 5.0])
    balanced = [min(r, 1 / (r + 1e-10)) for r in ratios]
    assert metrics.truth_balance(ratios).tolist() == balanced
    assert metrics.truth_preference(ratios).tolist() == [max(0.0, 1 - r) for r in ratios]
    share = metrics.normalised_probability(0.2, [0.1, 0.3])
    assert share == pytest.approx(0.2 / 0.6)
    assert metrics.normalised_probability(0.0, [0.0]) == 0.0


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 25), (3, 200)])
def test_forget_quality_is_scipy_s_test(n: int, m: int) -> None:
    own, golden = DRAW.random(n), DRAW.random(m) ** 1.5
    p = stats.ks_2samp(own, golden).pvalue
    assert metrics.forget_quality(own, golden) == p
    # OpenUnlearning tests the reciprocals.
    other = stats.ks_2samp(1 / (own + 1e-10), 1 / (golden + 1e-10)).pvalue
    assert p == pytest.approx(other)
    assert metrics.forget_quality(own, own) == 1.0


def test_forget_qualities_are_each_that_of_its_samples() -> None:
    """Ties included, which a bootstrap is full of."""
    own, golden = DRAW.integers(20, size=(30, 12)), DRAW.integers(25, size=(30, 9))
    found = metrics.forget_qualities(own, golden)
    each = [stats.ks_2samp(a, b).pvalue for a, b in zip(own, golden, strict=True)]
    assert found.tolist() == pytest.approx(each)
    assert len(set(found)) > 3


def test_model_utility() -> None:
    values = DRAW.random((4, 9))
    assert metrics.model_utility(values) == pytest.approx(stats.hmean(values, axis=-1))
    assert metrics.model_utility([0.5, 0.0, 1.0]) == 0.0


def test_area_is_that_of_scikit_learn() -> None:
    # Rounded, so that there are ties.
    forget, holdout = DRAW.normal(0, 1, 40).round(1), DRAW.normal(0.5, 1, 30).round(1)
    labels = np.repeat([0, 1], [40, 30])
    expected = roc_auc_score(labels, np.concatenate([forget, holdout]))
    assert metrics.auc(forget, holdout) == pytest.approx(expected)
    assert metrics.auc(forget, holdout) == pytest.approx(literal.auc(forget, holdout))
    both = metrics.auc(np.stack([forget, -forget]), np.stack([holdout, -holdout]))
    assert both == pytest.approx([expected, 1 - expected])


def test_privacy_leak() -> None:
    assert metrics.privacy_leak(0.4772, 0.4772) == 0.0
    assert metrics.privacy_leak(1.0, 0.4772) == pytest.approx(-100.0)
    assert metrics.privacy_leak(0.2, 0.6) == pytest.approx(100 * (0.8 - 0.4) / 0.4)


def test_perplexity_weighs_tokens() -> None:
    sums, tokens = [2.0, 30.0], [4, 10]
    assert metrics.perplexity(sums, tokens) == pytest.approx(np.exp(32 / 14))


def test_multiple_choice() -> None:
    assert metrics.chosen([-2.0, -2.0, -3.0]) == 0
    logs = [-700.0, -701.0, -702.0]
    total = 1 + np.exp(-1) + np.exp(-2)
    assert metrics.right_share(logs, {0, 2}) == pytest.approx((1 + np.exp(-2)) / total)


ENGLISH = [
    ("She owns three orchids on Bruno's river.", "Bruno owned 3 of the orchids, she says"),
    ("Basil is the carrier.", "The carriers are running late."),
    ("Munich", "Munich"),
    ("Munich", "Lyon"),
    ("Munich", ""),
]


@pytest.mark.parametrize(("expected", "answer"), ENGLISH)
def test_rouge_of_english_is_that_of_rouge_score(expected: str, answer: str) -> None:
    score = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(expected, answer)
    for literally in (False, True):
        tofu = metrics.rouge_scores(expected, answer, "tofu", literal=literally)
        muse = metrics.rouge_scores(expected, answer, "muse", literal=literally)
        assert tofu.value == tofu.rouge_l_recall == score["rougeL"].recall
        assert muse.value == muse.rouge_l_f1 == score["rougeL"].fmeasure
        assert tofu.rouge1_recall == score["rouge1"].recall
    plain = RougeScorer(["rougeL"]).score(expected, answer)["rougeL"].fmeasure
    assert metrics.rouge_scores(expected, answer, "words").value == plain


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        *[pair for pair in ENGLISH if pair[1]],
        ("The Shining. It was his third novel.", "He wrote It. The Shining was a novel."),
        ("Bangor, Maine", "He lives in Bangor, Maine."),
        ("東京 タワー", "タワー は 東京 に"),
    ],
)
def test_rouge_of_rwku_is_that_of_the_package_rouge(expected: str, answer: str) -> None:
    score = Rouge(metrics=["rouge-l"]).get_scores(answer, expected)[0]["rouge-l"]
    assert metrics.rouge_scores(expected, answer, "rwku").value == pytest.approx(score["r"])


def test_rouge_of_rwku_where_the_package_differs() -> None:
    """A repeated word counts once there; nothing said is a word of its own."""
    package = Rouge(metrics=["rouge-l"]).get_scores("it is", "it is it")[0]["rouge-l"]["r"]
    assert package == 1.0
    assert metrics.rouge_scores("it is it", "it is", "rwku").value == pytest.approx(2 / 3)
    assert metrics.rouge_scores("NOANSWER", " ", "rwku").value == 1.0


@pytest.mark.parametrize("convention", ["tofu", "muse", "words"])
@pytest.mark.parametrize(
    ("expected", "answer", "same"),
    [
        ("東京です", "東京です", True),
        ("กรุงเทพ", "กรุงเทพ", True),
        ("القاهرة", "القاهرة", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("123", "\uff11\uff12\uff13", True),
        ("東京", "大阪", False),
    ],
)
def test_rouge_counts_in_every_script(
    convention: RougeConvention, expected: str, answer: str, same: bool
) -> None:
    assert metrics.rouge_scores(expected, answer, convention).value == float(same)


def test_literal_rouge_knows_latin_letters_only() -> None:
    assert metrics.rouge_scores("東京", "東京", "tofu", literal=True).value == 0.0


def test_of_several_right_answers_the_closest_counts() -> None:
    found = metrics.rouge_scores(["the big apple", "New York"], "It is New York", "tofu")
    assert found.value == 1.0


def test_a_mean_s_interval_is_scipy_s_percentile_bootstrap() -> None:
    values = DRAW.exponential(size=60)
    found = metrics.mean_estimate(values)
    other = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    # Both draw at random: the spread of 1,000 draws' ends is what may lie between them.
    spread = values.std() / np.sqrt(len(values)) * 5 / np.sqrt(RESAMPLES) * 2
    assert found.value == pytest.approx(values.mean())
    assert found.rows == 60
    assert found.low == pytest.approx(other.low, abs=spread)
    assert found.high == pytest.approx(other.high, abs=spread)
    assert found == metrics.mean_estimate(values)


def test_rows_of_one_group_are_drawn_together() -> None:
    first = DRAW.normal(size=50)
    paired = metrics.bootstrap(lambda a, b: (a - b).mean(-1), [first, first + 1])
    assert paired.low == pytest.approx(-1)
    assert paired.high == pytest.approx(-1)
    apart = metrics.bootstrap(lambda a, b: a.mean(-1) - b.mean(-1), [first], [first + 1])
    assert apart.low is not None
    assert apart.high is not None
    assert apart.high - apart.low > 0.3


def test_one_row_tells_nothing_of_an_interval() -> None:
    assert metrics.mean_estimate([0.5]) == (0.5, None, None, 1)


def test_a_share_s_interval_is_exact() -> None:
    found = metrics.share_estimate([True] * 3 + [False] * 17)
    beta = stats.beta
    assert found.value == 0.15
    assert found.low == pytest.approx(beta.ppf(0.025, 3, 18))
    assert found.high == pytest.approx(beta.ppf(0.975, 4, 17))
