"""TRL's fused head on these kernels: what it returned before, as exactly, for every trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.huggingface.test_head import make_model
from tests.support.tiny_models import make_model as make_byte_model
from tests.support.tiny_models import make_tokenizer, one_thread
from unilogit_kernels.huggingface import restore_trl, trl_head, use_in_trl
from unilogit_kernels.testing import assert_within_budget

utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

ASKED = ("log_probs", "entropy", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    restore_trl()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, labels


def of_head(name: str, temperature: float) -> dict[str, torch.Tensor]:
    """The fused head's output, and the gradient of a loss of it in the lm_head's weight."""
    model, (ids, labels) = make_model(name), batch()
    utils.add_fused_lm_head(model, temperature=temperature, outputs=ASKED)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    (found.loss - 0.1 * found.entropy.mean()).backward()
    gradient = model.get_output_embeddings().weight.grad
    return {**{name: found[name] for name in ("loss", "label_mask", *ASKED)}, "weight": gradient}


def by_definition(name: str, temperature: float) -> dict[str, torch.Tensor]:
    """The same in float64, from the model's own logits."""
    model, (ids, labels) = make_model(name).double(), batch()
    logits = model(input_ids=ids).logits[:, :-1] / temperature
    target = labels[:, 1:]
    mask = target != -100
    log_p = logits.log_softmax(-1)
    found = {
        "log_probs": log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0].where(mask, 0.0),
        "entropy": (-(log_p.exp() * log_p).sum(-1)).where(mask, 0.0),
        "mean_logits": logits.mean(-1).where(mask, 0.0),
        "is_top1": (logits.argmax(-1) == target) & mask,
        "label_mask": mask,
    }
    # A mean of logits is a sum of numbers as large as the largest of them.
    found["scale"] = logits.abs().max().detach()
    found["loss"] = -found["log_probs"].sum() / mask.sum()
    (found["loss"] - 0.1 * found["entropy"].mean()).backward()
    return {**found, "weight": model.get_output_embeddings().weight.grad}


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_it_returns(name: str, temperature: float) -> None:
    theirs, exact = of_head(name, temperature), by_definition(name, temperature)
    use_in_trl()
    ours = of_head(name, temperature)
    for field, found in ours.items():
        assert found.shape == theirs[field].shape
        assert found.dtype == theirs[field].dtype
        if found.dtype == torch.bool:
            assert found.equal(exact[field]), field
        else:
            scale = exact["scale"].item() if field == "mean_logits" else 0.0
            assert_within_budget(found, exact[field], theirs[field], field, smallest_scale=scale)


def test_what_these_kernels_have_not_stays_theirs() -> None:
    use_in_trl()
    model = make_model("llama")
    utils.add_fused_lm_head(model, outputs=("log_probs", "log_sum_sq_probs"))
    ids = torch.randint(50, (2, 9))
    found = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert found.log_sum_sq_probs.lt(0).all()


def test_it_can_be_undone() -> None:
    theirs, compact = utils._ChunkedLogProbFunction, utils._use_triton
    use_in_trl()
    use_in_trl(backend="eager")
    assert utils._ChunkedLogProbFunction.backend == "eager"
    restore_trl()
    restore_trl()
    assert utils._ChunkedLogProbFunction is theirs
    assert utils._use_triton is compact


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_head, "_PARAMETERS", ("hidden", "weight"))
    with pytest.raises(RuntimeError, match="has not the fused head that this package knows"):
        use_in_trl()


def test_a_trainer_logs_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    calls: list[int] = []
    apply = trl_head._Kernel.apply

    def counted(self: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(hidden))
        return apply(self, hidden, *rest)

    monkeypatch.setattr(trl_head._Kernel, "apply", counted)
    rows = datasets.Dataset.from_dict({"text": ["who owns it", "nobody at all", "a shop"] * 2})

    def logs(folder: str) -> dict[str, float]:
        arguments = trl.SFTConfig(
            str(tmp_path / folder),
            max_steps=1,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            seed=0,
        )
        trainer = trl.SFTTrainer(
            make_byte_model(), arguments, train_dataset=rows, processing_class=make_tokenizer()
        )
        trainer.train()
        found: dict[str, float] = trainer.state.log_history[0]
        return found

    before = logs("theirs")
    use_in_trl()
    after = logs("ours")
    if not calls:
        pytest.skip("this SFTTrainer does not take the fused head by default")
    for name in ("loss", "entropy", "mean_token_accuracy"):
        assert after[name] == pytest.approx(before[name], rel=1e-3), name
