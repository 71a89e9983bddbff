"""PEFT adapters: the model below is the starting model; what training would lose is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from unilogit_kernels.huggingface.adapted_head import adapters_disabled, has_adapters
from unilogit_kernels.huggingface.two_heads import Reference, WithoutAdapters, frozen_copy
from unilogit_kernels.unlearning.arguments import UnlearningArguments
from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.loading import listed
from unilogit_kernels.unlearning.methods import MethodError


def check_no_adapter(model: str) -> None:
    """See that a model is no adapter: what is saved after training is whole models.

    Args:
        model: directory or Hub id.

    Raises:
        RunError: it is the adapter of another model.
    """
    try:
        found = find_adapter_config_file(model)
    except Exception:
        return  # There is no such model, which loading it tells.
    if found is not None:
        raise RunError(
            f"{model!r} is a PEFT adapter (it holds adapter_config.json), and unlearn trains whole "
            "models: load it with peft, merge it with merge_and_unload(), save the result with "
            "save_pretrained, and pass that folder as --model"
        )


def starting_model(model: nn.Module) -> Reference:
    """The model to compare with where none is given: its own base, or a frozen copy of it.

    Args:
        model: not wrapped for several processes.
    """
    if not has_adapters(model):
        return frozen_copy(model)
    _warn_of_trained_adapters(model)
    return WithoutAdapters(model)


@contextmanager
def at_the_start(model: nn.Module) -> Iterator[None]:
    """The model as the starting model: below its adapters, if it has some.

    Args:
        model: as it trains, before its first step.
    """
    if not has_adapters(model):
        yield
        return
    _warn_of_trained_adapters(model)
    with adapters_disabled(model):
        yield


def _warn_of_trained_adapters(model: nn.Module) -> None:
    changed = [
        name
        for name, weight in model.named_parameters()
        if (".lora_B." in name or ".lora_embedding_B." in name) and bool(weight.detach().any())
    ]
    if changed:
        warnings.warn(
            f"the adapter has been trained already ({listed(changed)} are not 0): the starting "
            "model that the method compares with is the one below it; to compare with the model as "
            "it is, merge the adapter first (merge_and_unload) and add a new one",
            stacklevel=3,
        )


def check_adapters(model: nn.Module, args: UnlearningArguments) -> None:
    """See that a model's adapters can be trained as the arguments say, and all of them.

    Where activations are recomputed, inputs are made to require a gradient, which transformers 4
    leaves to the caller: with reentrant checkpoints no adapter would get one otherwise.

    Args:
        model: any; one without adapters passes.
        args: the Trainer's.

    Raises:
        ValueError: see `check_saves_what_it_trains`.
        MethodError: the method is none for adapters.
    """
    check_saves_what_it_trains(model)
    if not has_adapters(model):
        return
    if args.resolved_method().is_negated:
        raise MethodError(
            f"method {args.method!r} negates weights, and a product of two negated factors is not "
            "negated: train the whole model, or merge the adapter first"
        )
    names = ("gradient_checkpointing", "activation_checkpointing")
    if any(getattr(args, name, False) for name in names):
        whole: Any = model
        whole.enable_input_require_grads()


def check_saves_what_it_trains(model: nn.Module) -> None:
    """See that a model with adapters trains nothing that `save_pretrained` would leave out.

    Args:
        model: wrapped by peft, or with adapters of its own (`PreTrainedModel.add_adapter`); any
            other model passes.

    Raises:
        ValueError: it trains weights of the model below the adapters.
    """
    adapters: Any = getattr(model, "peft_config", None)
    if not adapters:
        return
    from peft import get_peft_model_state_dict

    saved = {
        tensor.data_ptr()
        for name in adapters
        for tensor in get_peft_model_state_dict(model, adapter_name=name).values()
    }
    lost = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad
        and weight.data_ptr() not in saved
        # Virtual tokens are saved as what their encoder makes of them.
        and "prompt_encoder." not in name
    ]
    if lost:
        raise ValueError(
            f"the model has adapters, and saving it keeps them alone, but these weights would be "
            f"trained, too: {listed(lost)}; set requires_grad to False for them, or merge the "
            "adapters with merge_and_unload() first"
        )
