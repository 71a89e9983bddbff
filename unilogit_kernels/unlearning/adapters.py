"""PEFT adapters: what is refused of them, so that nothing that was trained is lost."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.loading import listed


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
