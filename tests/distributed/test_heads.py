"""The fused head of a model that is copied or sharded: right, and gathered as often as its own."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.sharded_models import (
    BFLOAT16,
    WAYS,
    Counting,
    Partitioned,
    free,
    gradients,
    share,
)
from tests.huggingface.model_errors import (
    assert_same_gradients,
    assert_same_loss,
    assert_same_losses,
)
from tests.huggingface.test_head import ARCHITECTURES, make_batch
from tests.huggingface.test_head import make_model as make_other_model
from tests.support.processes import run_ranks
from tests.support.tiny_models import FORGET, RETAIN, encoded, make_model
from unilogit_kernels import kl_loss, reference
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.huggingface.head import (
    UnsupportedHeadError,
    fused_log_odds,
    fused_loss,
    verify_head,
)
from unilogit_kernels.huggingface.two_heads import WithoutAdapters, frozen_copy, fused_kl_loss
from unilogit_kernels.unlearning.data import collate

ROWS = [*FORGET, *RETAIN]
VOCAB = 6000
SMALL = LinearOptions(memory_budget=1 << 20)
"""Several chunks of logits of that vocabulary: a head that gathers for each of them would show."""


def literal_loss(model: nn.Module, batch: dict[str, Any], reduction: str = "mean") -> Tensor:
    """The paper's, on the model's own logits in float32."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**inputs, use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return reference.unilogit_loss(logits[:, :-1], batch["labels"][:, 1:], reduction=reduction)


def expected(
    model: nn.Module, batches: list[dict[str, Any]], dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of the ranks' batches, and gradients of their mean, by one process."""
    model = copy.deepcopy(model).to(dtype)
    losses = [literal_loss(model, batch) for batch in batches]
    torch.stack(losses).mean().backward()
    return [loss.detach() for loss in losses], {
        name: p.grad.float() if dtype != torch.float64 else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _steps(way: str, tied: bool, recompute: bool) -> None:
    model = make_model(tie_word_embeddings=tied, vocab_size=VOCAB)
    if recompute:
        model.gradient_checkpointing_enable()
    batches: list[dict[str, Any]] = [dict(collate(encoded(ROWS)[rank::2], 0)) for rank in range(2)]
    dtype = torch.bfloat16 if "bfloat16" in way else torch.float32
    exact, plain = (expected(model, batches, each) for each in (torch.float64, dtype))
    models = WAYS[way](copy.deepcopy(model)), WAYS[way](model)
    batch, rank = batches[dist.get_rank()], dist.get_rank()
    counts: list[Any] = []
    for turn in range(2):
        for fused, each in zip((True, False), models, strict=True):
            each.zero_grad()
            with Counting() as counting:
                if fused:
                    loss = fused_loss(each, options=SMALL, **batch)
                else:
                    loss = literal_loss(each, batch)
                forward = counting.total()
                loss.backward()
            counts.append((turn, forward, counting.total()))
            if fused:
                assert_same_loss(loss, exact[0][rank], plain[0][rank])
                assert_same_gradients(gradients(each), exact[1], plain[1])
    # The first call looks at the model once, in a forward of its own.
    assert counts[2] == counts[3], counts
    assert counts[2][2].reductions > 0


@pytest.mark.parametrize(
    ("way", "tied", "recompute"),
    [
        ("fsdp modules", False, True),
        ("fsdp tail", True, False),
        ("fsdp bfloat16", False, False),
        ("ddp", True, True),
        *(
            pytest.param(way, tied, False, marks=pytest.mark.prove)
            for way, tied in (
                *((way, False) for way in WAYS if way != "fsdp bfloat16"),
                *((way, True) for way in ("fsdp root", "fsdp modules")),
            )
        ),
    ],
)
def test_a_step_and_its_collectives(way: str, tied: bool, recompute: bool) -> None:
    """As many as of the model's own logits: the head is gathered once a forward and a backward."""
    run_ranks(_steps, way, tied, recompute)


def _accumulate(way: str) -> None:
    model = make_model()
    batches: list[dict[str, Any]] = [dict(collate(encoded(ROWS)[rank::4], 0)) for rank in range(4)]
    # Rank 0 takes batches 0 and 2, and sums their losses.
    exact, plain = (expected(model, batches, each)[1] for each in (torch.float64, torch.float32))
    for grads in (exact, plain):
        for grad in grads.values():
            grad.mul_(2)
    sharded = WAYS[way](model)
    first, second = share(batches)
    with torch.no_grad():
        fused_log_odds(sharded, **first)
    with Counting() as counting:
        if isinstance(sharded, FSDPModule):
            sharded.set_requires_gradient_sync(False)
            fused_loss(sharded, **first).backward()
            sharded.set_requires_gradient_sync(True)
        else:
            assert isinstance(sharded, DistributedDataParallel)
            with sharded.no_sync():
                fused_loss(sharded, **first).backward()
        assert counting.total().reductions == 0
        fused_loss(sharded, **second).backward()
        assert counting.total().reductions > 0
    assert_same_gradients(gradients(sharded), exact, plain)


@pytest.mark.parametrize("way", ["ddp", "fsdp modules"])
def test_accumulation_without_reductions(way: str) -> None:
    run_ranks(_accumulate, way)


def _two_models(way: str) -> None:
    student, teacher = make_model(0), frozen_copy(make_model(1))
    reference_model: Any = copy.deepcopy(teacher)
    batches: list[dict[str, Any]] = [dict(collate(encoded(ROWS)[rank::2], 0)) for rank in range(2)]
    found: list[Any] = []
    for dtype in (torch.float64, torch.float32):
        each: Any = copy.deepcopy(student)
        both, losses = [each.to(dtype), reference_model.to(dtype)], []
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            own, others = (model(**inputs).logits[:, :-1] for model in both)
            losses.append(kl_loss(own, others, batch["labels"][:, 1:], backend="eager"))
        torch.stack(losses).mean().backward()
        grads = {name: p.grad for name, p in each.named_parameters()}
        found.append((losses[dist.get_rank()].detach(), grads))
    wrap = WAYS[way]
    beside: nn.Module = teacher if way == "ddp" else wrap(teacher)  # DDP takes none that is frozen
    model = wrap(student)
    loss = fused_kl_loss(model, beside, options=SMALL, **batches[dist.get_rank()])
    loss.backward()
    assert_same_loss(loss, found[0][0], found[1][0])
    assert_same_gradients(gradients(model), found[0][1], found[1][1])


@pytest.mark.parametrize(
    "way", [pytest.param("ddp", marks=pytest.mark.prove), "fsdp root", "fsdp modules"]
)
def test_a_teacher_beside_it(way: str) -> None:
    run_ranks(_two_models, way)


def _casts(name: str) -> None:
    model, batch = make_other_model(name), make_batch()
    exact = literal_loss(copy.deepcopy(model).double(), batch, "none").flatten()
    plain = literal_loss(copy.deepcopy(model).bfloat16(), batch, "none").flatten()
    wrap: Any = WAYS["fsdp bfloat16"] if hasattr(model, "model") else None
    sharded = wrap(model)
    assert BFLOAT16.output_dtype == torch.bfloat16
    found = fused_loss(sharded, **batch, reduction="none")
    assert_same_losses(found[:, :-1].flatten(), exact, plain)
    verify_head(sharded)


@pytest.mark.parametrize(
    "name", ["gemma2", "granite", pytest.param("cohere", marks=pytest.mark.prove)]
)
def test_logits_that_fsdp_would_round(name: str) -> None:
    """Its `output_dtype` casts what head and model return; a cap and a factor still show."""
    assert name in ARCHITECTURES
    run_ranks(_casts, name)


def _forwards() -> int:
    model = WAYS["fsdp root"](make_model())
    batch: dict[str, Any] = dict(collate(encoded(ROWS), 0))
    calls: list[Any] = []
    model.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        for _ in range(3):
            fused_log_odds(model, **batch)
    fused_loss(model, **batch).backward()
    fused_loss(model, **batch)
    return len(calls)


def test_a_model_is_looked_at_once_whether_it_is_gathered_or_not() -> None:
    assert run_ranks(_forwards) == [6, 6]


class QuantisedLinear(nn.Linear):
    """Stands for a class of a quantisation library."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).round()


def _adapters(way: str) -> str:
    batch: dict[str, Any] = dict(collate(share(encoded(ROWS)), 0))
    for target in ("q_proj", "lm_head"):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
        adapted = peft.get_peft_model(make_model(), config)
        plain = copy.deepcopy(adapted)
        model = WAYS[way](adapted)
        loss, literal = fused_loss(model, **batch), literal_loss(plain, batch)
        loss.backward()
        literal.backward()
        torch.testing.assert_close(loss.detach(), literal.detach())
        for name, grad in gradients(model).items():
            mine = dict(plain.named_parameters())[name].grad
            assert mine is not None
            dist.all_reduce(mine)
            torch.testing.assert_close(grad, mine / 2)
        ours, expected = (
            fused_kl_loss(model, reference, **batch)
            for reference in (WithoutAdapters(model), make_model())
        )
        torch.testing.assert_close(ours, expected)
        with pytest.raises(TypeError, match=r"unexpected keyword 'atention_mask'"):
            fused_loss(model, **batch, atention_mask=None)
    quantised = make_model()
    quantised.lm_head = QuantisedLinear(32, 259, bias=False)
    with pytest.raises(UnsupportedHeadError) as caught:
        fused_loss(WAYS[way](quantised), **batch)
    return str(caught.value)


@pytest.mark.parametrize("way", ["ddp", "fsdp modules"])
def test_adapters_and_quantised_heads(way: str) -> None:
    """LoRA beside the head and on it is right; a head of another class is an error."""
    for quantised in run_ranks(_adapters, way):
        assert "tests.distributed.test_heads.QuantisedLinear, not a plain" in quantised
        assert "modules_to_not_convert" in quantised


def _partitioned(tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied, vocab_size=VOCAB)
    batches: list[dict[str, Any]] = [dict(collate(encoded(ROWS)[rank::2], 0)) for rank in range(2)]
    exact, plain = (expected(model, batches, each) for each in (torch.float64, torch.float32))
    partitioned, rank = Partitioned(model), dist.get_rank()
    for _ in range(2):  # the first call looks at the model once, in a forward of its own
        model.zero_grad()
        partitioned.gathers.clear()
        loss = fused_loss(model, options=SMALL, **batches[rank])
        forward = partitioned.gathers.count("lm_head")
        loss.backward()
        free(model.parameters())
    assert (forward, partitioned.gathers.count("lm_head")) == (1, 2)
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(2)
    assert_same_loss(loss, exact[0][rank], plain[0][rank])
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, exact[1], plain[1])


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.prove)])
def test_weights_that_hooks_gather_as_zero_3_does(tied: bool) -> None:
    run_ranks(_partitioned, tied)


def test_a_partition_that_nobody_gathered_is_an_error() -> None:
    model: transformers.PreTrainedModel = make_model()
    batch: dict[str, Any] = dict(collate(encoded(ROWS), 0))
    head: Any = model.get_output_embeddings()
    head.weight.ds_shape = head.weight.shape
    assert fused_loss(model, **batch).isfinite()
    head.weight.data = torch.empty(0)  # as ZeRO-3 leaves it outside of a forward
    with pytest.raises(UnsupportedHeadError, match=r"not gathered .*GatheredParameters"):
        fused_loss(model, **batch)
