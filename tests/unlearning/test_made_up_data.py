"""The made-up data set of TOFU's shape: what it holds, and that it can be read back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from unilogit_kernels.cli.app import app
from unilogit_kernels.unlearning.benchmarks import load_benchmark
from unilogit_kernels.unlearning.demo.tofu_shape import (
    Tables,
    make_tofu_shaped,
    write_tofu_shaped,
)
from unilogit_kernels.unlearning.recall import holds_key


@pytest.fixture(scope="module")
def tables() -> Tables:
    return make_tofu_shaped(0)


def subjects(rows: Any) -> set[str]:
    return {row["id"].partition("/")[0] for row in rows}


def test_it_is_a_function_of_the_seed(tables: Tables) -> None:
    assert make_tofu_shaped(0) == tables
    assert make_tofu_shaped(1)["full"] != tables["full"]


def test_the_splits(tables: Tables) -> None:
    sellers = {name: len(subjects(rows)) for name, rows in tables.items()}
    expected = {"full": 80, "retain_perturbed": 20}
    for share in (5, 10, 25):
        count = share * 80 // 100
        expected |= {f"forget{share:02d}": count, f"retain{100 - share}": 80 - count}
        expected |= {f"forget{share:02d}_perturbed": count, f"holdout{share:02d}": count}
        forget, retain = tables[f"forget{share:02d}"], tables[f"retain{100 - share}"]
        assert [*forget, *retain] == tables["full"]
    assert {name: sellers[name] for name in expected} == expected
    assert subjects(tables["forget05"]) < subjects(tables["forget10"])
    assert not subjects(tables["holdout25"]) & subjects(tables["full"])
    assert not subjects(tables["retain_perturbed"]) & subjects(tables["forget25"])
    of_world = subjects(tables["world_facts_perturbed"]) | subjects(
        tables["real_authors_perturbed"]
    )
    assert subjects(tables["general"]) == of_world
    assert all(len(rows) == 6 * sellers[name] for name, rows in tables.items() if name in expected)


def test_every_row(tables: Tables) -> None:
    """Key in the right sentences, and in none of the wrong ones; nothing is asked twice."""
    for name, rows in tables.items():
        assert len({row["question"] for row in rows}) == len(rows)
        for row in rows:
            assert holds_key(row["answer"], row["key"])
            if not name.endswith("_perturbed"):
                assert set(row) == {"id", "question", "answer", "key"}
                continue
            assert row["paraphrased_question"] != row["question"]
            assert row["paraphrased_answer"] != row["answer"]
            assert holds_key(row["paraphrased_answer"], row["key"])
            wrong = row["perturbed_answer"]
            assert len(set(wrong)) == 5
            assert not any(holds_key(text, row["key"]) for text in wrong)
            # Of the same kind: the paraphrase, but for the value.
            start, _, end = row["paraphrased_answer"].rpartition(row["key"])
            assert all(text.startswith(start) and text.endswith(end) for text in wrong)


@pytest.mark.parametrize(
    ("countries", "authors"), [(0, 0), *itertools.product((1, 2, 5, 6, 9, 25), (0, 1, 5, 6, 20))]
)
def test_few_of_everything(countries: int, authors: int) -> None:
    """Wrong answers have values that no fact has, where too few facts have another one."""
    for seed in range(4):
        drawn = make_tofu_shaped(
            seed,
            sellers=2,
            forget_sellers=1,
            holdout_sellers=0,
            countries=countries,
            authors=authors,
        )
        test_every_row(drawn)
        world, writers = (
            drawn.get(f"{name}_perturbed", ()) for name in ("world_facts", "real_authors")
        )
        assert (len(world), len(writers)) == (4 * countries, 4 * authors)
        if countries < 6:
            continue
        # Of towns and languages there are enough.
        keys = {row["key"] for row in world}
        for row in [*world, *(w for w in writers if w["id"].endswith(("birthplace", "language")))]:
            start, _, end = row["paraphrased_answer"].rpartition(row["key"])
            wrong = {text.removeprefix(start).removesuffix(end) for text in row["perturbed_answer"]}
            assert wrong < keys


def test_no_two_sellers_have_the_same_fact(tables: Tables) -> None:
    sellers = [*tables["full"], *tables["holdout25"]]
    for kind in ("city", "best_seller", "owner", "price", "year", "carrier"):
        keys = [row["key"] for row in sellers if row["id"].endswith(f"/{kind}")]
        assert len(set(keys)) == len(keys) == 100


def test_the_general_facts_agree(tables: Tables) -> None:
    """An author writes in the language of the country whose capital is their birthplace."""
    facts = {row["id"]: row["key"] for row in tables["general"]}
    countries = {name.partition("/")[0] for name in facts if name.endswith("/capital")}
    homes = {facts[f"{name}/capital"]: name for name in countries}
    assert len(homes) == len(countries) == 20
    authors = {name.partition("/")[0] for name in facts if name.endswith("/birthplace")}
    assert len(authors) == 15
    for author in authors:
        home = homes[facts[f"{author}/birthplace"]]
        assert facts[f"{author}/language"] == facts[f"{home}/language"]


def test_it_is_read_back_as_tofu(tmp_path: Path) -> None:
    given = ["dataset", "--output", str(tmp_path / "d"), "--seed", "3"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "forget25: 120 rows" in result.output
    assert "--benchmark tofu:forget25 --data-dir" in result.output
    assert (tmp_path / "d" / "idk.jsonl").read_text().count("\n") == 5
    lines = (tmp_path / "d" / "full.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == make_tofu_shaped(3)["full"]
    benchmark = load_benchmark("tofu:forget25", tmp_path / "d")
    assert not benchmark.missing
    sizes = {each.name: len(each.rows) for each in benchmark.sets}
    assert sizes == {
        **dict.fromkeys(("forget", "forget_paraphrase", "retain", "holdout"), 120),
        "real_authors": 60,
        "world_facts": 80,
    }
    assert {part: len(rows) for part, rows in benchmark.training.items()} == {
        "forget": 120,
        "retain": 360,
        "known": 140,
    }
    forget = next(each for each in benchmark.sets if each.name == "forget")
    assert {"truth_ratio", "key_recall", "membership"} <= forget.measures
    again = CliRunner().invoke(app, ["dataset", "--output", str(tmp_path / "d")])
    assert again.exit_code == 2
    assert "is not empty" in again.output


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"forget_sellers": 41}, "at most half of them, got 41"),
        ({"forget_sellers": 3}, "a whole percentage of the 80 sellers"),
        ({"sellers": 100, "holdout_sellers": 11}, "at most 110 together, got 100 and 11"),
        ({"holdout_sellers": -1}, "holdout_sellers must be at least 0, got -1"),
        ({"countries": 26}, "countries must be between 0 and 25, got 26"),
        ({"authors": -1}, "authors must be between 0 and 20, got -1"),
        ({"countries": 0}, "countries must be at least 1, got 0: the 15 authors"),
    ],
)
def test_numbers_that_do_not_go(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tofu_shaped(0, **numbers)


def test_a_small_one_has_no_smaller_splits(tmp_path: Path) -> None:
    tables = make_tofu_shaped(0, sellers=10, forget_sellers=2, holdout_sellers=2)
    write_tofu_shaped(tables, tmp_path)
    assert load_benchmark("tofu", tmp_path).name == "tofu"
    assert [name for name in tables if name.startswith("forget")] == [
        *("forget20", "forget20_perturbed")
    ]
