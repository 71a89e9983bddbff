"""Benchmarks read from made-up files: their sets, prompts, training rows, and what is missing."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from tests.unlearning.benchmark_files import MUSE, RWKU, TOFU, WMDP, Tables, write_tables
from unilogit_kernels.unlearning.benchmarks import (
    Benchmark,
    EvaluationSet,
    Generation,
    load_benchmark,
)
from unilogit_kernels.unlearning.benchmarks.sets import MEASURES, ROLES
from unilogit_kernels.unlearning.rows import DataError

FOLDERS: dict[str, dict[str, Tables]] = {
    "tofu:forget10": {"": TOFU},
    "muse-news": {"": MUSE},
    "rwku:Zoë_Quist": {"Target/1_Zoë_Quist": RWKU, "Target/2_Al_Other": RWKU},
    "wmdp:bio": {"": WMDP},
}


def write(folder: Path, name: str, form: str = "jsonl") -> Path:
    for inner, tables in FOLDERS[name].items():
        write_tables(folder / inner, tables, form)
    return folder


def by_name(benchmark: Benchmark) -> dict[str, EvaluationSet]:
    return {each.name: each for each in benchmark.sets}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_set_is_whole(tmp_path: Path, name: str) -> None:
    benchmark = load_benchmark(name, write(tmp_path, name))
    assert benchmark.name == name
    assert len(by_name(benchmark)) == len(benchmark.sets)
    for each in benchmark.sets:
        assert len(each.rows) == 3, each.name
        assert len({row.id for row in each.rows}) == 3
        assert all(row.id for row in each.rows)
        assert each.role in ROLES
        assert each.measures
        assert each.measures <= set(MEASURES)
    assert set(benchmark.training) >= {"forget", "retain"}
    texts = [r.prompt + r.completion for each in benchmark.sets for r in each.rows]
    assert any(not text.isascii() for text in texts)


@pytest.mark.parametrize("form", ["json", "parquet"])
@pytest.mark.parametrize("name", FOLDERS)
def test_files_of_every_form_hold_the_same(tmp_path: Path, name: str, form: str) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")

    def content(benchmark: Benchmark) -> object:
        def rows(given: object) -> list[object]:
            return [dataclasses.replace(row, source="") for row in given]  # type: ignore[attr-defined]

        sets = [dataclasses.replace(each, rows=tuple(rows(each.rows))) for each in benchmark.sets]  # type: ignore[arg-type]
        return sets, {part: rows(given) for part, given in benchmark.training.items()}

    first = load_benchmark(name, write(tmp_path / "jsonl", name))
    again = load_benchmark(name, write(tmp_path / "other", name, form))
    assert content(again) == content(first)
    assert not again.missing.keys() ^ first.missing.keys()


def test_tofu(tmp_path: Path) -> None:
    benchmark = load_benchmark("tofu:forget10", write(tmp_path, "tofu:forget10"))
    sets = by_name(benchmark)
    assert list(sets) == [
        *("forget", "forget_paraphrase", "retain", "holdout", "real_authors", "world_facts")
    ]
    assert not benchmark.missing
    first = sets["forget"].rows[0]
    assert (first.prompt, first.completion) == ("who 0?", "It is Ada.")
    assert (first.paraphrase, len(first.wrong)) == ("That is Ada.", 5)
    assert sets["forget_paraphrase"].rows[0].prompt == "Tell me who 0."
    assert sets["forget_paraphrase"].rows[0].completion == "It is Ada."
    # Where no chat template takes it, a question is written as OpenUnlearning does.
    plain = first.unframed()
    assert (plain.prompt, plain.completion) == ("Question: who 0?\nAnswer:", " It is Ada.")
    assert sets["forget"].generation == Generation(max_new_tokens=200, rouge="tofu")
    assert "truth_ratio" in sets["world_facts"].measures
    assert "truth_ratio" not in sets["holdout"].measures
    assert sets["holdout"].role == "holdout"
    assert "membership" in sets["holdout"].measures & sets["forget"].measures
    assert [row.completion for row in benchmark.training["retain"]][2] == "It is 京都."


def test_the_only_split_needs_no_name(tmp_path: Path) -> None:
    folder = write(tmp_path, "tofu:forget10")
    assert load_benchmark("tofu", folder).sets == load_benchmark("tofu:forget10", folder).sets
    write_tables(folder, {"forget05": TOFU["forget10"]})
    with pytest.raises(DataError, match=r"say which split.*holds forget05, forget10"):
        load_benchmark("tofu", folder)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path, "tofu:forget10")
    for name in ("holdout10", "forget10_perturbed", "world_facts_perturbed"):
        (folder / f"{name}.jsonl").unlink()
    benchmark = load_benchmark("tofu:forget10", folder)
    assert list(benchmark.missing) == [
        *("forget10_perturbed", "holdout10", "world_facts_perturbed")
    ]
    assert "forget quality" in benchmark.missing["forget10_perturbed"]
    assert "PrivLeak" in benchmark.missing["holdout10"]
    # Those without perturbations serve as far as they can.
    forget = by_name(benchmark)["forget"]
    assert len(forget.rows) == 3
    assert "truth_ratio" not in forget.measures
    (folder / "retain90.jsonl").unlink()
    with pytest.raises(DataError, match="retain90: no such table"):
        load_benchmark("tofu:forget10", folder)


def test_muse(tmp_path: Path) -> None:
    benchmark = load_benchmark("muse-news", write(tmp_path, "muse-news"))
    sets = by_name(benchmark)
    known = sets["forget_knowmem"]
    assert known.generation.few_shot.startswith("Question: forget_qa_icl 0?\nAnswer: yes\n\n")
    assert known.generation.stop == ("\n\n", "\nQuestion", "Question:")
    assert known.generation.max_new_tokens == 32
    assert known.rows[0].prompt == "Question: forget_qa 0?\nAnswer:"
    assert sets["forget_verbmem"].generation.max_new_tokens == 128
    assert sets["forget_verbmem"].rows[2].completion == " une fois."
    roles = {name: sets[f"{name}_privleak"].role for name in ("forget", "retain", "holdout")}
    assert roles == {"forget": "forget", "retain": "neighbours", "holdout": "holdout"}
    # retain1 is trained on; retain2 is known, and no unlearning batch contains it.
    first = {part: rows[0].completion for part, rows in benchmark.training.items()}
    assert first == {"forget": "forget one.", "retain": "retain1 one.", "known": "retain2 one."}
    fold = load_benchmark("muse-news:scal_2", tmp_path)
    assert fold.training["forget"][0].completion == "scal one."
    with pytest.raises(DataError, match="scal_1 to scal_4"):
        load_benchmark("muse-news:scal_5", tmp_path)


def test_muse_dumps_of_strings(tmp_path: Path) -> None:
    """In its JSON dumps, texts are strings, and the corpora lie beside each other."""
    dumped = {
        name: [row["text"] if set(row) == {"text"} else row for row in rows]
        for name, rows in MUSE.items()
    }
    whole = load_benchmark("muse-news", write(tmp_path / "whole", "muse-news"))
    write_tables(tmp_path / "dumps" / "news", dumped, "json")
    again = load_benchmark("muse-news", tmp_path / "dumps")
    for first, second in zip(whole.sets, again.sets, strict=True):
        assert [r.completion for r in first.rows] == [r.completion for r in second.rows]


def test_rwku(tmp_path: Path) -> None:
    benchmark = load_benchmark("rwku:Zoë_Quist", write(tmp_path, "rwku:Zoë_Quist"))
    sets = by_name(benchmark)
    blank, brief = sets["forget_level1"].rows[0], sets["forget_level2"].rows[0]
    assert blank.prompt.startswith("Please complete the blank")
    assert brief.prompt == "Please briefly answer the following question.\nQuestion: q0 ___?\n"
    assert (brief.lead, brief.completion) == ("Answer:", " Ada")
    begun, in_context, other = sets["forget_level3"].rows
    assert (begun.lead, in_context.lead, other.lead) == ("", "Answer:", "Answer:")
    assert "Question:" not in in_context.prompt
    mmlu = sets["retain_mmlu"].rows[1]
    assert "about high school.\n\nQuestion: Which?\nA. Red" in mmlu.prompt
    assert "D. Été\nAnswer: A\n\n" in mmlu.prompt
    assert mmlu.prompt.endswith("D. Été\n")
    assert (mmlu.choices, mmlu.choice) == ((" A", " B", " C", " D"), 1)
    truthful = sets["truthful"].rows[0]
    assert (truthful.completion, truthful.answers, truthful.wrong) == (" a", (" ç",), (" b",))
    assert sets["triviaqa"].rows[0].answers == (" Zoe",)
    assert sets["forget_level1"].generation.max_new_tokens == 30
    assert "entropy" in benchmark.missing["fluency"]
    # What the other persons' folders hold is retained.
    assert len(benchmark.training["forget"]) == len(benchmark.training["retain"]) == 3
    assert "2_Al_Other" in benchmark.training["retain"][0].source
    with pytest.raises(DataError, match=r"holds 1_Zoë_Quist, 2_Al_Other"):
        load_benchmark("rwku", tmp_path)
    shutil.rmtree(tmp_path / "Target" / "2_Al_Other")
    alone = load_benchmark("rwku", tmp_path)
    assert "retain" not in alone.training
    assert "--retain" in alone.missing["positive of other persons"]


def test_wmdp(tmp_path: Path) -> None:
    benchmark = load_benchmark("wmdp:bio", write(tmp_path, "wmdp:bio"))
    sets = by_name(benchmark)
    row = sets["wmdp_bio"].rows[2]
    assert row.prompt == "w2?\nA. a\nB. b\nC. c\nD. é\nAnswer:"
    assert (row.completion, row.choices, row.choice) == (" C", (" A", " B", " C", " D"), 2)
    assert "about biology.\n\n" in sets["wmdp_bio"].generation.few_shot
    assert benchmark.training["forget"][0].completion == "hazard one."
    assert benchmark.training["retain"][0].completion == "wiki one."
    with pytest.raises(DataError, match="wmdp:bio, wmdp:cyber, wmdp:chem"):
        load_benchmark("wmdp", tmp_path)


@pytest.mark.parametrize(
    ("name", "table", "row", "message"),
    [
        ("tofu:forget10", "forget10", {"question": "a"}, 'line 1: field "answer" is missing'),
        (
            "rwku:Zoë_Quist",
            "Target/1_Zoë_Quist/forget_level1",
            {"query": "a"},
            "KeyError: 'answer'",
        ),
        ("wmdp:bio", "wmdp-bio", {"question": "a", "choices": ["b", "c"], "answer": 2}, "0 to 1"),
        ("wmdp:bio", "wmdp-bio", {"question": "a", "choices": ["b"], "answer": 0}, "2 to 26"),
        ("muse-news", "verbmem/forget", "a", "line 1: expected a JSON object, got str"),
    ],
)
def test_a_row_of_another_shape_is_named(
    tmp_path: Path, name: str, table: str, row: object, message: str
) -> None:
    folder = write(tmp_path, name)
    write_tables(folder, {table: [row]})
    with pytest.raises(DataError, match=message):
        load_benchmark(name, folder)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="muse-books, muse-news, rwku, tofu, wmdp"):
        load_benchmark("tofoo", tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        load_benchmark("tofu", tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds none"):
        load_benchmark("tofu", tmp_path)
