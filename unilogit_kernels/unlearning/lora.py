"""LoRA for a run from files: what `--lora` says, the adapter on the model, merged in the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unilogit_kernels.huggingface.adapted_head import is_of_peft
from unilogit_kernels.unlearning.errors import RunError, reading

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
"""Every linear layer but the lm_head, which is adapted where it is named."""

_FORMAT = "r=16,alpha=32,targets=all-linear"
_KEYS = ("r", "alpha", "dropout", "targets", "modules_to_save", "rslora")


def lora_config(text: str) -> LoraConfig:
    """What a text such as `"r=16,alpha=32,dropout=0.05,targets=q_proj+v_proj,rslora"` asks for.

    Args:
        text: `NAME=VALUE` by commas: `r` (16), `alpha` (twice r), `dropout` (0), `targets`
            (`all-linear`) and `modules_to_save` (none), names of modules with `+` between them,
            and `rslora`.

    Returns:
        The config, its `target_modules` as they were named: `all-linear` may be one of several.

    Raises:
        RunError: it says something else, or peft is not installed.
    """
    given = lora_options(text)
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise RunError(
            "--lora needs the package peft: pip install 'unilogit-kernels[lora]'"
        ) from error
    names = given["targets"]
    return LoraConfig(
        r=given["r"],
        lora_alpha=given["alpha"],
        lora_dropout=given["dropout"],
        target_modules=names[0] if names == [ALL_LINEAR] else names,
        modules_to_save=given["modules_to_save"] or None,
        use_rslora=given["rslora"],
        task_type="CAUSAL_LM",
    )


def lora_options(text: str) -> dict[str, Any]:
    """The options that a text gives, and the defaults of the others; see `lora_config`.

    Raises:
        RunError: it says something else.
    """
    given: dict[str, str] = {}
    for item in filter(None, text.replace(" ", "").split(",")):
        name, separator, value = item.partition("=")
        if name == "rslora" and not separator:
            value, separator = "true", "="
        if name not in _KEYS or not separator or not value:
            raise RunError(
                f"--lora takes {', '.join(_KEYS)}, as in {_FORMAT!r}, got {item!r} in {text!r}"
            )
        if name in given:
            raise RunError(f"--lora {text!r}: {name} is given twice")
        given[name] = value
    rank = _number(text, "r", given.get("r", "16"), whole=True)
    if rank < 1:
        raise RunError(f"--lora {text!r}: r must be an integer of at least 1, got {given['r']}")
    alpha = _number(text, "alpha", given.get("alpha", str(2 * rank)))
    dropout = _number(text, "dropout", given.get("dropout", "0"))
    if not 0 <= dropout < 1:
        raise RunError(f"--lora {text!r}: dropout must be in [0, 1), got {given['dropout']}")
    if not 0 < alpha < float("inf"):
        raise RunError(f"--lora {text!r}: alpha must be a positive number, got {given['alpha']}")
    if given.get("rslora", "true").lower() not in ("true", "false"):
        raise RunError(f"--lora {text!r}: rslora must be true or false, got {given['rslora']}")
    return {
        "r": int(rank),
        "alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "dropout": dropout,
        "rslora": given.get("rslora", "false").lower() == "true",
        "targets": _names(given.get("targets", ALL_LINEAR)),
        "modules_to_save": _names(given.get("modules_to_save", "")),
    }


def _number(text: str, name: str, value: str, *, whole: bool = False) -> float:
    try:
        return int(value) if whole else float(value)
    except ValueError:
        what = "an integer" if whole else "a number"
        raise RunError(f"--lora {text!r}: {name} must be {what}, got {value!r}") from None


def _names(text: str) -> list[str]:
    return [name for name in text.split("+") if name]


def add_lora(model: PreTrainedModel, text: str, *, seed: int, merge: bool) -> nn.Module:
    """The model with a new adapter, which changes nothing yet; all else is frozen.

    Args:
        model: whole.
        text: see `lora_config`.
        seed: of the adapter's random factor: the same in every process and after a resume.
        merge: whether the adapter will be merged in the end.

    Raises:
        RunError: there are no such modules, or the adapter could not be merged.
    """
    from peft import get_peft_model

    config = lora_config(text)
    if isinstance(config.target_modules, (list, set)) and ALL_LINEAR in config.target_modules:
        named = [name for name in config.target_modules if name != ALL_LINEAR]
        config.target_modules = sorted({*named, *_linear(model)})
    with reading(f"--lora {text!r} does not fit the model"), torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)
    ends: list[Any] = [adapted.get_input_embeddings(), adapted.get_output_embeddings()]
    if merge and model.config.tie_word_embeddings and any(map(is_of_peft, ends)):
        raise RunError(
            f"--merge with --lora {text!r}: the model's lm_head and embeddings are one weight, and "
            "to merge an adapter of one of them would change the other: leave it out of the "
            "targets, or leave out --merge"
        )
    result: nn.Module = adapted
    return result


def _linear(model: PreTrainedModel) -> set[str]:
    """Last names of all linear layers but the lm_head."""
    head = model.get_output_embeddings()
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write an adapter alone: peft adds the frozen weight of an lm_head that is a target of it.

    Args:
        model: with the adapter, whole.
        folder: where the Trainer has written it already.
    """
    adapted: Any = model
    adapted.save_pretrained(folder, save_embedding_layers=False)


def merged(model: nn.Module) -> nn.Module:
    """A model of its own, with the adapter in its weights."""
    whole: Any = model
    result: nn.Module = whole.merge_and_unload()
    return result
