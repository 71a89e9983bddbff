"""A whole evaluation on models of one seed: columns, files, what is missing, and going on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.support.tiny_models import make_tokenizer, one_thread
from tests.unlearning.metrics import literal
from tests.unlearning.test_evaluation import trained_model
from unilogit_kernels.unlearning import metrics
from unilogit_kernels.unlearning.benchmarks import EvaluationSet, Generation
from unilogit_kernels.unlearning.data import Row
from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.measuring import Report, Request, measure, run, sets_of_rows
from unilogit_kernels.unlearning.measuring.audit import STATEMENT
from unilogit_kernels.unlearning.measuring.openunlearning import read_logs
from unilogit_kernels.unlearning.measuring.store import load_records
from unilogit_kernels.unlearning.record import digests

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

PLACES = ["rome", "oslo", "lima", "bern", "kyiv", "riga", "bonn", "東京", "cairo"]
NAMES = ["ada", "bo", "cyd", "dee", "eve", "fay", "gus", "hal", "ida"]


def fact(name: str, place: str) -> Row:
    wrong = [other for other in PLACES if other != place][:3]
    return Row(
        f"where is {name}?",
        f" {place}",
        place,
        "",
        paraphrase=f" in {place}",
        wrong=tuple(f" in {other}" for other in wrong),
    )


FACTS = [fact(*pair) for pair in zip(NAMES, PLACES, strict=True)]
FORGET, RETAIN, HOLDOUT = FACTS[:3], FACTS[3:6], FACTS[6:]
TEXTS = [Row("", "a text of some length", None, ""), Row("", "another one", None, "")]
QUIZ = [
    Row("which? A. x B. y Answer:", " A", None, "", choices=(" A", " B"), choice=0),
    Row("which? A. y B. x Answer:", " B", None, "", choices=(" A", " B"), choice=1),
]
ROWS = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT, "texts": TEXTS, "quiz": QUIZ}


class Silent:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def begin(self, what: str, total: int) -> None:
        self.stages.append(what)

    def advance(self, done: int) -> None:
        pass

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`start` knows what is to be forgotten, `golden` does not."""
    folder = tmp_path_factory.mktemp("models")
    for name, rows in (("start", [*FORGET, *RETAIN]), ("golden", RETAIN)):
        trained_model(rows, steps=80).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def request(models: Path, output: Path, **options: Any) -> Request:
    given: dict[str, Any] = {"sets": sets_of_rows(ROWS), "golden": str(models / "golden")}
    return Request(model=str(models / "start"), output=output, **{**given, **options})


@pytest.fixture(scope="module")
def done(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """One evaluation of everything; its starting model is the model itself."""
    output = tmp_path_factory.mktemp("out") / "tofu"
    asked = request(models, output, starting=str(models / "start"), benchmark="tofu:forget33")
    return measure(asked, Silent()), output


def test_the_golden_column_is_right_by_construction(done: tuple[Report, Path]) -> None:
    golden, model = done[0].columns["golden"], done[0].columns["model"]
    assert golden["forget_quality"]["value"] == 1.0
    assert golden["privleak"]["value"] == 0.0
    assert golden["mia_reference"]["value"] == 0.5
    # What the model knows by heart, and the golden one never saw.
    assert model["mia_min_k"]["value"] == model["mia_reference"]["value"] == 1.0
    assert model["forget_Q_A_Prob"]["value"] > 10 * golden["forget_Q_A_Prob"]["value"]
    assert model["extraction_strength"]["value"] == model["exact_memorization"]["value"] == 1.0
    assert model["forget_Q_A_ROUGE"]["value"] == model["forget_key_recall"]["value"] == 1.0
    assert model["privleak"]["value"] < 0
    assert model["forget_kl_golden_to_model"]["value"] > model["retain_kl_golden_to_model"]["value"]
    assert done[0].columns["starting"] == model
    assert list(done[0].columns) == ["starting", "model", "golden"]
    assert done[0].missing == {}


def test_metrics_are_what_they_are_said_to_be(done: tuple[Report, Path]) -> None:
    """From the stored records, by the formulas of this test alone."""
    report, output = done
    found = report.columns["model"]

    def losses(folder: Path, number: int, name: str) -> dict[tuple[str, str], float]:
        records = load_records(folder / "tokens" / f"{number:02d}-{name}.safetensors")
        return {key: -float(np.mean(record.log_prob)) for key, record in records.items()}

    def ratios(folder: Path, number: int, name: str) -> list[float]:
        each = losses(folder, number, name)
        return [
            literal.truth_ratio(
                each[row, "paraphrase"], [each[row, f"wrong/{n}"] for n in range(3)]
            )
            for row in ("0", "1", "2")
        ]

    own, golden = ratios(output, 0, "forget"), ratios(output / "golden", 0, "forget")
    balance = np.mean([min(r, 1 / r) for r in own])
    assert found["forget_truth_ratio"]["value"] == pytest.approx(balance, rel=1e-5)
    quality = stats.ks_2samp(own, golden).pvalue
    assert found["forget_quality"]["value"] == pytest.approx(quality)
    retain = losses(output, 1, "retain")
    parts = [
        np.mean([np.exp(-retain[row, "answer"]) for row in ("0", "1", "2")]),
        found["retain_Q_A_ROUGE"]["value"],
        np.mean([max(0.0, 1 - r) for r in ratios(output, 1, "retain")]),
    ]
    assert found["retain_Truth_Ratio"]["value"] == pytest.approx(parts[2], rel=1e-5)
    assert found["model_utility"]["value"] == pytest.approx(stats.hmean(parts), rel=1e-5)
    sides = [
        np.array([loss for (_, kind), loss in losses(output, n, name).items() if kind == "answer"])
        for n, name in ((0, "forget"), (2, "holdout"))
    ]
    assert found["mia_loss"]["value"] == pytest.approx(literal.auc(*sides))
    texts = load_records(output / "tokens" / "03-texts.safetensors").values()
    mean = np.concatenate([record.log_prob for record in texts]).mean()
    assert found["texts_perplexity"]["value"] == pytest.approx(math.exp(-mean), rel=1e-5)
    assert found["quiz_accuracy"]["value"] in (0.0, 0.5, 1.0)
    for name, estimate in found.items():
        assert estimate["low"] <= estimate["high"], name
        if name not in ("forget_quality", "model_utility"):  # Neither is a mean of its draws.
            assert estimate["low"] <= estimate["value"] <= estimate["high"], name


def test_files_have_openunlearning_s_shape(done: tuple[Report, Path]) -> None:
    report, output = done
    text = (output / "TOFU_EVAL.json").read_text()
    logs = json.loads(text)
    assert text == json.dumps(logs, indent=4, sort_keys=True, ensure_ascii=False) + "\n"
    summary = json.loads((output / "TOFU_SUMMARY.json").read_text())
    assert summary == {name: entry["agg_value"] for name, entry in logs.items()}
    assert summary == {name: found["value"] for name, found in report.columns["model"].items()}
    assert set(logs["forget_Q_A_Prob"]["value_by_index"]) == {"0", "1", "2"}
    assert set(logs["forget_Q_A_Prob"]["value_by_index"]["0"]) == {"prob", "avg_loss"}
    assert len(logs["forget_Q_A_PERT_Prob"]["value_by_index"]["0"]["avg_loss"]) == 3
    assert set(logs["forget_truth_ratio"]["value_by_index"]["0"]) == {"score"}
    attack = logs["mia_min_k"]
    assert set(attack) == {"agg_value", "auc", "forget", "holdout"}
    assert attack["auc"] == attack["agg_value"]
    assert set(attack["holdout"]) == {"agg_value", "value_by_index"}
    answer = logs["forget_Q_A_ROUGE"]["value_by_index"]["0"]
    assert (answer["input"], answer["ground_truth"]) == ("where is ada?", "rome")
    assert {"rouge1_recall", "rougeL_f1", "rougeL_recall", "generation"} <= set(answer)


def test_the_audit_record_names_its_inputs(done: tuple[Report, Path], models: Path) -> None:
    report, output = done
    audit = json.loads((output / "audit.json").read_text())
    assert audit["statement"] == STATEMENT
    assert "no proof" in STATEMENT
    files = {path.name for path in (models / "start").iterdir()}
    assert set(audit["model_files_sha256"]) == files
    assert len(audit["inputs"]["forget rows"]) == len(audit["code"]["sha256"]) == 64
    assert audit["packages"]["scipy"]
    assert audit["metrics"]["privleak"] == report.columns["model"]["privleak"]
    results = json.loads((output / "results.json").read_text())
    assert results["rows"]["forget"] == ["0", "1", "2"]
    assert results["metrics"] == audit["metrics"]


def test_results_stand_for_a_golden_model(
    done: tuple[Report, Path], models: Path, tmp_path: Path
) -> None:
    """Ours, by file or folder; and OpenUnlearning's, which may know no rows of an attack."""
    report, output = done
    asked = request(models, tmp_path / "again", golden=str(output / "golden"))
    again = measure(asked, Silent())
    for name in ("forget_quality", "privleak", "mia_reference", "model_utility"):
        assert again.columns["model"][name] == report.columns["model"][name], name
    value = report.columns["golden"]["mia_zlib"]["value"]
    assert again.columns["golden"]["mia_zlib"] == {"value": value}
    assert set(again.missing) == {"kl_golden_to_model", "kl_model_to_golden"}

    logs = read_logs(output / "golden" / "TOFU_EVAL.json")
    theirs = {
        "forget_truth_ratio": logs["forget_truth_ratio"],
        "mia_min_k": {"agg_value": 0.4772, "auc": 0.4772},
        "mia_gradnorm": {"agg_value": None},
    }
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(theirs))
    other = measure(dataclasses.replace(asked, golden=str(path), output=tmp_path / "x"), Silent())
    area = report.columns["model"]["mia_min_k"]["value"]
    leak = other.columns["model"]["privleak"]["value"]
    assert leak == pytest.approx(100 * ((1 - area) - (1 - 0.4772)) / (1 - 0.4772))
    quality = report.columns["model"]["forget_quality"]["value"]
    assert other.columns["model"]["forget_quality"]["value"] == quality
    assert "mia_loss of each row" in other.missing["mia_reference"]


def test_what_is_missing_is_said(models: Path, tmp_path: Path) -> None:
    sets = sets_of_rows({"forget": [Row("a?", " b", None, "")]})
    asked = request(models, tmp_path / "out", sets=sets, golden=None, lacking={"x.json": "y"})
    found = measure(asked, Silent())
    assert found.missing["forget_quality"] == "wrong answers to the rows to forget"
    assert "'holdout'" in found.missing["mia_min_k"]
    assert "--golden" in found.missing["kl_golden_to_model"]
    assert found.missing["x.json"] == "y"
    assert json.loads((tmp_path / "out/results.json").read_text())["not_computed"] == found.missing
    assert found.columns["model"]["forget_Q_A_Prob"]["low"] is None


def test_an_evaluation_goes_on_after_the_last_set(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(Silent):
        def begin(self, what: str, total: int) -> None:
            super().begin(what, total)
            if what == "model: tokens of holdout":
                raise KeyboardInterrupt

    asked = request(models, tmp_path / "out", golden=None)
    with pytest.raises(KeyboardInterrupt):
        measure(asked, Interrupting())
    before = json.loads((tmp_path / "out/ROWS_EVAL.json").read_text())
    assert "retain_Q_A_Prob" in before
    assert "holdout_Q_A_Prob" not in before
    rest = Silent()
    whole = measure(asked, rest)
    assert rest.stages[0] == "model: tokens of holdout"
    again = Silent()
    assert measure(asked, again) == whole
    assert again.stages == []
    assert set(before) < set(whole.columns["model"])

    other = dataclasses.replace(asked, convention="openunlearning")
    with pytest.raises(RunError, match=r"other settings: convention \(unilogit -> openunl"):
        measure(other, Silent())
    rows = {**ROWS, "forget": FORGET[::-1]}
    with pytest.raises(RunError, match="other inputs: forget rows"):
        measure(dataclasses.replace(asked, sets=sets_of_rows(rows)), Silent())
    with pytest.raises(RunError, match=r"other inputs: .*weights"):
        measure(dataclasses.replace(asked, model=str(models / "golden")), Silent())


def test_openunlearning_s_convention(models: Path, tmp_path: Path) -> None:
    """The last labelled token is left out, a strength is at least 1/n, words are Latin ones."""
    rows = [Row("where is ada?", " 東京", None, ""), Row("where is bo?", " x", None, "")]
    sets = sets_of_rows({"forget": rows, "holdout": HOLDOUT}, Generation(rouge="tofu"))
    columns = {
        convention: measure(
            request(models, tmp_path / convention, sets=sets, golden=None, convention=convention),
            Silent(),
        ).columns["model"]
        for convention in ("unilogit", "openunlearning")
    }
    records = load_records(tmp_path / "openunlearning/tokens/00-forget.safetensors").values()
    hits = [record.is_argmax for record in records]
    ours = [metrics.extraction_strength(each) for each in hits]
    theirs = [metrics.extraction_strength(each[:-1], least=True) for each in hits]
    found = {name: found["extraction_strength"]["value"] for name, found in columns.items()}
    assert found == {"unilogit": np.mean(ours), "openunlearning": np.mean(theirs)}
    assert found["unilogit"] != found["openunlearning"]
    exact = [float(np.mean(each[:-1])) for each in hits]
    assert columns["openunlearning"]["exact_memorization"]["value"] == np.mean(exact)
    scores = json.loads((tmp_path / "openunlearning/ROWS_EVAL.json").read_text())["mia_min_k"]
    for record, score in zip(records, scores["forget"]["value_by_index"].values(), strict=True):
        assert score["score"] == pytest.approx(metrics.min_k_score(record.log_prob[:-1]))


def test_few_shot_examples_stand_before_prompts(models: Path, tmp_path: Path) -> None:
    shown = Generation(max_new_tokens=6, few_shot="where is cyd? lima\n\n")
    plain = EvaluationSet("q", (RETAIN[0],), "general", frozenset(("probability", "rouge")))
    asked = request(models, tmp_path / "a", sets=(plain,), golden=None)
    first = measure(asked, Silent()).columns["model"]["q_Q_A_Prob"]["value"]
    sets = (dataclasses.replace(plain, generation=shown),)
    second = dataclasses.replace(asked, sets=sets, output=tmp_path / "b")
    assert measure(second, Silent()).columns["model"]["q_Q_A_Prob"]["value"] != first
    (answer,) = json.loads((tmp_path / "b/answers/00-q.json").read_text()).values()
    assert answer["prompt"].startswith("where is cyd? lima\n\nwhere is dee?")


def test_all_of_a_long_text_counts(models: Path, tmp_path: Path) -> None:
    """In blocks, each token once; by OpenUnlearning's convention a text is cut."""
    text = "one two three four five six seven eight nine ten"
    sets = sets_of_rows({"book": [Row("", text, None, "")]})
    asked = request(models, tmp_path / "out", sets=sets, max_length=16)
    watcher = Silent()
    found = measure(asked, watcher).columns["model"]
    other = dataclasses.replace(asked, output=tmp_path / "cut", convention="openunlearning")
    measure(other, watcher)
    whole, cut = (
        load_records(tmp_path / folder / "tokens/00-book.safetensors")["0", "answer"]
        for folder in ("out", "cut")
    )
    # A byte is a token; the end of sequence is one more, and the first token has no prediction.
    assert (len(whole), len(cut)) == (len(text), 15)
    np.testing.assert_allclose(whole.log_prob[:15], cut.log_prob, rtol=1e-4)
    perplexity = np.exp(-whole.log_prob.mean(dtype=np.float64))
    assert found["book_perplexity"]["value"] == pytest.approx(perplexity)
    assert found["book_kl_golden_to_model"]["value"] > 0
    assert watcher.notes == ["1 of 1 texts of book are cut to 16 tokens"] * 2  # Of both models.


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "no results"), ("{", "no results"), ('{"a": {"b": 1}}', "no metric with an agg_value")],
)
def test_a_file_of_no_results_is_named(
    models: Path, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "EVAL.json"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        measure(request(models, tmp_path / "out", golden=str(path)), Silent())
    with pytest.raises(RunError, match="neither a model nor results"):
        measure(request(models, tmp_path / "out", golden=str(tmp_path / "..")), Silent())


def test_two_rows_of_one_name_are_refused(models: Path, tmp_path: Path) -> None:
    rows = [dataclasses.replace(FORGET[0], id="1"), FORGET[1]]  # Its place is its name.
    with pytest.raises(RunError, match="2 rows of 'forget' have the id '1'"):
        measure(request(models, tmp_path / "out", sets=sets_of_rows({"forget": rows})), Silent())


def test_weights_are_read_once_for_each_model(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden model's digest is not made twice, however many models are compared with it."""
    seen: list[str] = []

    def counted(model: Any, *rest: Any) -> dict[str, str]:
        seen.append(model.config._name_or_path)
        return digests(model, *rest)

    monkeypatch.setattr(run, "digests", counted)
    sets = sets_of_rows({"forget": FORGET[:1]})
    measure(request(models, tmp_path / "out", sets=sets, generate=False), Silent())
    assert sorted(Path(name).name for name in seen) == ["golden", "start"]
