"""A Hugging Face model whose vocabulary 2 ranks share, sharded by FSDP2 over 2 more: 2 x 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.distributed.sharded_models import BFLOAT16, Counting, gradients, shard_modules
from tests.distributed.test_heads import ROWS, SMALL, VOCAB, expected, literal_loss
from tests.distributed.vocabularies import recorded
from tests.huggingface.model_errors import assert_same_gradients, assert_same_loss
from tests.support.processes import run_ranks
from tests.support.tiny_models import encoded, make_model
from unilogit_kernels.huggingface.head import UnsupportedHeadError, fused_loss, verify_head
from unilogit_kernels.huggingface.two_heads import frozen_copy
from unilogit_kernels.unlearning.data import collate

DP, TP = 2, 2


def _whole(**options: Any) -> ColwiseParallel:
    return ColwiseParallel(output_layouts=Replicate(), **options)


def _of_plan(
    head: Callable[[], ColwiseParallel], **policy: Any
) -> Callable[[nn.Module, str], nn.Module]:
    """The lm_head alone over "tp", and all of the model over "dp"."""

    def shard(model: Any, folder: str) -> nn.Module:
        mesh = init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
        plan: dict[str, Any] = {"lm_head": head()}
        if model.config.tie_word_embeddings:
            plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(model, mesh["tp"], plan)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return shard_modules(model, mesh=mesh["dp"], **policy)

    return shard


def _over_tp_alone(model: Any, folder: str) -> nn.Module:
    sharded: nn.Module = parallelize_module(
        model, init_device_mesh("cpu", (TP,)), {"lm_head": _whole()}
    )
    return sharded


def _by_transformers(model: Any, folder: str) -> nn.Module:
    """All of the model by its own plan, as it is loaded."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    sizes = {"tp_size": TP, "fsdp_size": DP}
    loaded: nn.Module = type(model).from_pretrained(folder, distributed_config=sizes)
    return loaded


WAYS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "whole logits": _of_plan(_whole),
    "own columns": _of_plan(ColwiseParallel),
    "DTensor logits": _of_plan(lambda: ColwiseParallel(use_local_output=False)),
    "bfloat16": _of_plan(_whole, mp_policy=BFLOAT16),
    "transformers": _by_transformers,
    "no FSDP": _over_tp_alone,
}

OWN_LOGITS_ARE_WHOLE = ("whole logits", "transformers")
"""Where a loss of the model's own logits is computed as in one process."""


def _steps(way: str, tied: bool, folder: str) -> None:
    model = make_model(tie_word_embeddings=tied, vocab_size=VOCAB - 1)  # uneven parts
    copies = dist.get_world_size() // TP
    batches: list[dict[str, Any]] = [
        dict(collate(encoded(ROWS)[number::copies], 0)) for number in range(copies)
    ]
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    exact, plain = (expected(model, batches, each) for each in (torch.float64, dtype))
    sharded, mine = WAYS[way](model, folder), dist.get_rank() // TP
    batch = batches[mine]
    counts, own = [], []
    for _ in range(2):
        sharded.zero_grad()
        with Counting() as counting, recorded() as sent:
            loss = fused_loss(sharded, options=SMALL, **batch)
            forward = counting.total()
            loss.backward()
        counts.append((forward, counting.total()))
        assert_same_loss(loss.detach(), exact[0][mine], plain[0][mine])
        for name, parameter in sharded.named_parameters():
            assert type(parameter.grad) is type(parameter.detach()), name
            if isinstance(parameter, DTensor):
                assert isinstance(parameter.grad, DTensor)
                assert parameter.grad.placements == parameter.placements, name
        assert_same_gradients(gradients(sharded), exact[1], plain[1])
    # The losses of the ranks that share a batch are the same to the last bit.
    every = [torch.empty_like(loss.detach()) for _ in range(copies * TP)]
    dist.all_gather(every, loss.detach())
    assert torch.equal(every[TP * mine], every[TP * mine + 1])
    # Of the second call: the first looks at the model once, and asks for the sizes of the parts.
    assert [each.what for each in sent] == ["gather", "sum"]
    if way in OWN_LOGITS_ARE_WHOLE:
        with Counting() as counting:
            literal = literal_loss(sharded, batch)
            own.append(counting.total())
            literal.backward()
        assert counts[1] == (own[0], counting.total())
    verify_head(sharded)


@pytest.mark.parametrize(
    ("way", "tied"),
    [
        ("whole logits", False),
        ("whole logits", True),
        ("own columns", False),
        ("transformers", True),
        ("no FSDP", False),
        *(
            pytest.param(way, False, marks=pytest.mark.prove)
            for way in ("bfloat16", "DTensor logits", "transformers")
        ),
    ],
)
def test_a_step(way: str, tied: bool, tmp_path: Path) -> None:
    """Losses, gradients and their placements; the head is gathered as often as for own logits."""
    run_ranks(_steps, way, tied, str(tmp_path), ranks=TP if way == "no FSDP" else DP * TP)


def _refused() -> list[str]:
    """Plans that no loss of the whole vocabulary can be right with."""
    mesh = init_device_mesh("cpu", (2,))
    batch: dict[str, Any] = dict(collate(encoded(ROWS), 0))
    found = []
    for tied, plan in (
        (False, RowwiseParallel(input_layouts=Replicate())),
        (True, _whole()),
    ):
        model = make_model(tie_word_embeddings=tied)
        parallelize_module(model, mesh, {"lm_head": plan})
        with pytest.raises(UnsupportedHeadError) as caught:
            fused_loss(model, **batch)
        found.append(str(caught.value))
    with pytest.raises(ValueError, match=r"lm_head.weight is a DTensor\) and cannot be copied"):
        frozen_copy(model)
    return found


def test_other_plans_are_refused_by_name() -> None:
    by_rows, apart = run_ranks(_refused)[0]
    assert "placed as [Shard(dim=1)]" in by_rows
    assert 'parallelize_module(model, mesh["tp"]' in by_rows
    assert "two weights" in apart
    assert "lm_head.weight = embed_tokens.weight" in apart
