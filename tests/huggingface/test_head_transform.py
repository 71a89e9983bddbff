"""What a model does to its logits is never out of date and never compared in part."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.huggingface.test_head import (
    VOCAB,
    assert_same_losses,
    literal_loss,
    make_batch,
    make_model,
)
from tests.support.tiny_models import one_thread
from unilogit_kernels.huggingface.head import (
    UnsupportedHeadError,
    fused_loss,
    observe_logit_transform,
)
from unilogit_kernels.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

Hook = Callable[[Tensor], Tensor | None]


def after_head(model: Any, change: Hook) -> None:
    model.get_output_embeddings().register_forward_hook(lambda m, inputs, out: change(out))


@pytest.mark.parametrize("rows", [VOCAB + 30, VOCAB - 7])
def test_a_resized_head(rows: int) -> None:
    """More columns change every probability, fewer make the old ones be read out of bounds."""
    model, batch = make_model("gemma2"), make_batch()
    batch["input_ids"].clamp_(max=rows - 1)
    batch["labels"].clamp_(max=rows - 1)
    assert_same_losses(model, batch)
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert_same_losses(model, batch)
    assert observe_logit_transform(model).vocab_size == rows


def test_a_swapped_head() -> None:
    model, batch = make_model("llama"), make_batch()
    assert_same_losses(model, batch)
    model.set_output_embeddings(nn.Linear(32, VOCAB))
    assert_same_losses(model, batch)


@pytest.mark.parametrize("where", ["lm_head", "model"])
def test_a_hook_that_comes_and_goes(where: str) -> None:
    model, batch = make_model("llama"), make_batch()
    expected = fused_loss(model, **batch)

    def double(module: nn.Module, inputs: Any, output: Any) -> Any:
        if where == "lm_head":
            return output * 2
        output.logits = output.logits * 2
        return output

    module = model if where == "model" else model.get_submodule(where)
    handle = module.register_forward_hook(double)
    assert_same_losses(model, batch)
    handle.remove()
    assert torch.equal(fused_loss(model, **batch), expected)


def test_a_factor_in_training_alone_is_an_error() -> None:
    model, batch = make_model("llama"), make_batch()
    after_head(model, lambda logits: logits * (1.5 if model.training else 1))
    assert_same_losses(model, batch)
    with pytest.raises(UnsupportedHeadError, match="what the fused losses cannot"):
        fused_loss(model.train(), **batch)


def masked(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., 40:44] = torch.finfo(torch.float32).min
    return logits


def masked_in_place(logits: Tensor) -> None:
    logits[:, :, torch.tensor([5, 90])] = -torch.inf


def biased(logits: Tensor) -> Tensor:
    return logits + torch.arange(VOCAB) * 1e-6


def tempered_columns(logits: Tensor) -> Tensor:
    return logits * torch.linspace(1, 1.01, VOCAB)


def tempered_positions(logits: Tensor) -> Tensor:
    return logits * torch.linspace(1, 2, logits.shape[1])[:, None]


def tempered_sequences(logits: Tensor) -> Tensor:
    return logits * torch.tensor([1.0, 2.0, 3.0])[: max(2, len(logits)), None, None]


def clipped(logits: Tensor) -> Tensor:
    return logits.clamp(-500, 500)


def capped_in_one_column(logits: Tensor) -> Tensor:
    return torch.cat(
        [logits[..., :50], 3 * torch.tanh(logits[..., 50:51] / 3), logits[..., 51:]], -1
    )


def without_the_last_token(logits: Tensor) -> Tensor:
    return logits[:, :-1]


def columns_in_another_order(logits: Tensor) -> Tensor:
    return logits.flip(-1)


def columns_from_the_middle(logits: Tensor) -> Tensor:
    return logits[..., 3:]


CHANGES: list[Hook] = [
    masked,
    masked_in_place,
    biased,
    tempered_columns,
    tempered_positions,
    tempered_sequences,
    clipped,
    capped_in_one_column,
    without_the_last_token,
    columns_in_another_order,
    columns_from_the_middle,
]


@pytest.mark.parametrize("observed", [False, True], ids=["", "observed without"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_happens_to_some_columns_or_tokens_is_an_error(change: Hook, observed: bool) -> None:
    model = make_model("llama")
    if observed:
        observe_logit_transform(model)
    after_head(model, change)
    with pytest.raises(UnsupportedHeadError, match="use objective_loss on model"):
        fused_loss(model, **make_batch())


def masks_what_it_was_given(model: Any) -> None:
    """Columns that depend on the inputs: the observation's own tokens tell nothing of them."""
    seen: dict[str, Tensor] = {}
    model.model.embed_tokens.register_forward_pre_hook(lambda m, args: seen.update(ids=args[0]))

    def mask(logits: Tensor) -> Tensor:
        given = seen["ids"][seen["ids"] > 20].unique()
        return logits.index_fill(-1, given, -1e4)

    after_head(model, mask)


def tempers_what_it_was_given(model: Any) -> None:
    seen: dict[str, Tensor] = {}
    model.model.embed_tokens.register_forward_pre_hook(lambda m, args: seen.update(ids=args[0]))
    after_head(model, lambda logits: logits * (1 + (seen["ids"] > 20))[..., None])


def gathers_by_sequence(model: Any) -> None:
    after_head(model, lambda logits: logits[torch.arange(3)] if len(logits) != 2 else logits)


@pytest.mark.parametrize(
    "change", [masks_what_it_was_given, tempers_what_it_was_given, gathers_by_sequence]
)
def test_what_depends_on_the_inputs_is_an_error(change: Callable[[Any], None]) -> None:
    model = make_model("llama")
    change(model)
    with pytest.raises(UnsupportedHeadError, match="use objective_loss on model"):
        fused_loss(model, **make_batch())


def test_the_error_names_the_columns() -> None:
    model = make_model("llama")
    after_head(model, masked)
    with pytest.raises(UnsupportedHeadError, match=r"4 of 97 columns are changed \(40, 41, 42, 43"):
        fused_loss(model, **make_batch())


def test_a_negative_factor() -> None:
    model, batch = make_model("llama"), make_batch()
    after_head(model, lambda logits: logits * -0.5)
    assert_same_losses(model, batch)


def test_a_head_that_is_called_twice_or_never_is_an_error() -> None:
    model = make_model("llama")
    model.get_output_embeddings().register_forward_hook(
        lambda head, inputs, out: out + head.forward(inputs[0])
    )
    with pytest.raises(UnsupportedHeadError, match="called more than once"):
        fused_loss(model, **make_batch())
    model = make_model("llama")
    head = model.lm_head
    vars(model)["get_output_embeddings"] = lambda: head
    model.lm_head = copy.deepcopy(head)
    with pytest.raises(UnsupportedHeadError, match="was not called"):
        fused_loss(model, **make_batch())


class Scaled(Tensor):
    """Numbers with a factor that only its own operators know of."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            args = [x.as_subclass(Tensor) * 2 if isinstance(x, Scaled) else x for x in args]
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_that_is_not_just_its_numbers_is_an_error() -> None:
    model, batch = make_model("llama"), make_batch()
    head = model.get_output_embeddings()
    plain = head.weight
    fused_loss(model, **batch)
    head.weight = nn.Parameter(plain.detach().as_subclass(Scaled), requires_grad=False)
    with pytest.raises(UnsupportedHeadError, match=r"weight is a .*test_head_transform\.Scaled"):
        fused_loss(model, **batch)
    head.weight = nn.Parameter(plain.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedHeadError, match=r"of dtype torch\.float8_e4m3fn"):
        observe_logit_transform(model)
    head.weight = plain
    assert_same_losses(model, batch)


def test_backward_hooks_of_the_head_are_an_error() -> None:
    model = make_model("llama")
    model.get_output_embeddings().register_full_backward_hook(lambda m, before, after: None)
    with pytest.raises(UnsupportedHeadError, match="backward hooks"):
        fused_loss(model, **make_batch())


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(VOCAB, 2)), nn.Parameter(torch.randn(2, 32))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "low rank"])
def test_a_parametrised_weight(kind: str) -> None:
    """Also one that is parametrised after it was observed, and that changes when it is read."""
    model, batch = make_model("llama"), make_batch()
    fused_loss(model, **batch)
    head = model.get_output_embeddings()
    if kind == "low rank":
        nn.utils.parametrize.register_parametrization(head, "weight", LowRank())
    else:
        make = parametrizations.weight_norm if "weight" in kind else parametrizations.spectral_norm
        make(head)
    assert_same_losses(model, batch)
    exact, plain = copy.deepcopy(model).double().train(), copy.deepcopy(model).train()
    for each, loss in ((exact, literal_loss), (plain, literal_loss)):
        loss(each, batch).backward()
    fused_loss(model.train(), **batch).backward()
    for (name, ours), wanted, other in zip(
        head.named_parameters(), exact.lm_head.parameters(), plain.lm_head.parameters(), strict=True
    ):
        assert ours.grad is not None, name
        assert wanted.grad is not None
        assert other.grad is not None
        assert_within_budget(ours.grad, wanted.grad, other.grad, name)
    assert torch.equal(
        torch.cat([b.flatten() for b in plain.buffers()]),
        torch.cat([b.flatten() for b in model.buffers()]),
    )


def test_an_observation_is_used_again() -> None:
    model, batch = make_model("gemma2"), make_batch()
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda m, args: forwards.append(1))
    fused_loss(model, **batch)
    assert len(forwards) == 2
    fused_loss(model, **batch)
    assert len(forwards) == 3
    assert dataclasses.asdict(observe_logit_transform(model))["softcap"] == 3.0
    assert len(forwards) == 3
