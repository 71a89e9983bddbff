"""`--lora` and `--merge`: what they say, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.cli.test_cli import UNLEARN, Run, run
from tests.support.tiny_models import FORGET, encoded, make_model, one_thread
from tests.unlearning.test_runs import refused
from tests.unlearning.test_trainer import settings
from unilogit_kernels.unlearning.lora import add_lora, lora_config
from unilogit_kernels.unlearning.run import RunError

__all__ = ["run", "settings"]
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

LORA = "r=4,alpha=12,targets=all-linear+lm_head"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r=8", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.0}),
        (
            "r=4, alpha=12, dropout=0.05, rslora, targets=q_proj+lm_head",
            {
                "r": 4,
                "lora_alpha": 12,
                "lora_dropout": 0.05,
                "use_rslora": True,
                "target_modules": {"q_proj", "lm_head"},
            },
        ),
        (
            "alpha=8,rslora=false,modules_to_save=lm_head+embed_tokens",
            {
                "r": 16,
                "lora_alpha": 8,
                "use_rslora": False,
                "modules_to_save": ["lm_head", "embed_tokens"],
            },
        ),
    ],
    ids=["rank", "every part", "whole modules"],  # the order of a set is each process's own
)
def test_what_a_text_asks_for(text: str, expected: dict[str, Any]) -> None:
    config = lora_config(text)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank=8", r"takes r, alpha, .* as in 'r=16,alpha=32,targets=all-linear', got 'rank=8'"),
        ("r", "got 'r' in 'r'"),
        ("r=2,r=4", "r is given twice"),
        ("r=many", "r must be an integer, got 'many'"),
        ("r=0", "r must be an integer of at least 1, got 0"),
        ("alpha=nan", "alpha must be a positive number, got nan"),
        ("dropout=1", r"dropout must be in \[0, 1\), got 1"),
        ("rslora=perhaps", "rslora must be true or false, got perhaps"),
    ],
)
def test_texts_that_say_nothing(text: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        lora_config(text)


def test_all_linear_and_the_head_by_name() -> None:
    def adapted(text: str) -> set[str]:
        model = add_lora(make_model(), text, seed=0, merge=False)
        learning = [n for n, p in model.named_parameters() if p.requires_grad]
        return {name.split(".lora_")[0].rpartition(".")[2] for name in learning}

    linear = {f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")}
    assert adapted("r=4") == linear
    assert adapted("r=4,targets=all-linear+lm_head") == {*linear, "lm_head"}
    assert adapted("r=4,targets=q_proj+lm_head") == {"q_proj", "lm_head"}


def test_it_is_the_same_in_every_process() -> None:
    def parameters(seed: int) -> dict[str, Tensor]:
        return dict(add_lora(make_model(), LORA, seed=seed, merge=False).named_parameters())

    first = parameters(3)
    torch.manual_seed(7)
    assert all(map(torch.equal, first.values(), parameters(3).values()))
    assert not all(map(torch.equal, first.values(), parameters(4).values()))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(encoded(FORGET)[0]["input_ids"][None]).logits
    return logits


@pytest.mark.parametrize("lora", ["r=4,alpha=12", LORA, "r=4,modules_to_save=lm_head"])
def test_an_adapter_is_written_or_merged(run: Run, lora: str) -> None:
    """Both are the same model to the roundings of a merge; the merged one needs no peft."""
    line = UNLEARN.replace(" --output out", "") + f" --lora {lora} --lr 1e-2"
    assert run(f"{line} --output adapter").exit_code == 0
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model"
    assert not Path("adapter/model.safetensors").exists()
    written = load_file("adapter/adapter_model.safetensors")
    assert all("lora_" in name for name in written) == ("modules_to_save" not in lora)
    assert Path("adapter/tokenizer.json").exists()
    base = AutoModelForCausalLM.from_pretrained("model")
    before = logits_of(base)
    adapted = logits_of(peft.PeftModel.from_pretrained(base, "adapter"))
    assert not torch.equal(adapted, before)

    assert run(f"{line} --output merged --merge").exit_code == 0
    assert not Path("merged/adapter_config.json").exists()
    whole = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits_of(whole), adapted, rtol=1e-4, atol=1e-5)
    for folder in ("adapter", "merged"):
        result = run(f"evaluate --model {folder} --data a=forget.jsonl")
        assert result.exit_code == 0, result.output


def test_rows_are_learned_by_an_adapter(run: Run) -> None:
    line = f"finetune --model model --data forget.jsonl --output out --lora {LORA} --merge"
    assert run(f"{line} --epochs 2 --lr 1e-2").exit_code == 0
    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in ("model", "out"))
    assert not torch.equal(logits_of(before), logits_of(after))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--merge", "--merge is about the adapter of --lora, which is not given"),
        ("--lora r=4 --train-layers 1", "both say what is trained"),
        ("--lora r=4 --method task_vector", "negates weights, which --lora does not train"),
        ("--lora r=4,targets=query", "'r=4,targets=query' does not fit the model"),
        ("--lora rank=4", "got 'rank=4'"),
    ],
)
def test_what_does_not_go_together(run: Run, options: str, message: str) -> None:
    line = UNLEARN
    if "task_vector" in options:
        line = line.replace(" --retain retain.jsonl", "") + " --retain-loss none"
    refused(run(f"{line} {options}"), message)


def test_an_adapter_of_a_tied_head_is_not_merged() -> None:
    model = make_model(tie_word_embeddings=True)
    with pytest.raises(RunError, match="the model's lm_head and embeddings are one weight"):
        add_lora(model, LORA, seed=0, merge=True)
    add_lora(make_model(tie_word_embeddings=True), "r=4", seed=0, merge=True)
