"""A model of a comparison, whole or as its top layers, and what it is fed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from unilogit_kernels.huggingface.head import observe_logit_transform
from unilogit_kernels.unlearning.comparison.parts import DEMO, ModelPlan
from unilogit_kernels.unlearning.comparison.rows import Data
from unilogit_kernels.unlearning.data import Encoding, Example, Features, padding_id
from unilogit_kernels.unlearning.demo.model import load_base, run_trunk, top_of
from unilogit_kernels.unlearning.errors import RunError, reading
from unilogit_kernels.unlearning.hidden_states import steered_layer
from unilogit_kernels.unlearning.layers import train_only_top_layers
from unilogit_kernels.unlearning.loading import check_fits, encode, load_encoding, load_model
from unilogit_kernels.unlearning.measuring.store import write_whole
from unilogit_kernels.unlearning.measuring.variants import Key, encode_variants

_BASE = "base"
_TRUNK = "trunk"
"""Folders of the comparison: of the demo's model, and of what enters the top layers."""

_RMU_LAYERS = 3
"""How many RMU's paper trains where a plan does not say: the steered one and two below."""


@dataclass(frozen=True)
class Subject:
    """A model in memory.

    Attributes:
        whole: all of it.
        trained: what steps and checks run: the whole model, or its top layers, whose modules are
            the same.
    """

    whole: PreTrainedModel
    trained: nn.Module


class Bench:
    """Rows as the models' tokenizer has them, and models on demand.

    Args:
        plan: which models.
        data: the rows.
        folder: of the comparison.
    """

    def __init__(self, plan: ModelPlan, data: Data, folder: Path) -> None:
        self.plan, self.data, self.folder = plan, data, folder
        source = self.base if plan.base is not None else str(plan.starting)
        self.encoding: Encoding = load_encoding(source, plan.max_length, plan.chat_template, {})
        self.pad_id = padding_id(self.encoding.tokenizer)

    @cached_property
    def base(self) -> str:
        """The model that others are made of; the demo's is unpacked on the first call."""
        if self.plan.base != DEMO:
            return str(self.plan.base)
        folder = self.folder / _BASE
        if not (folder / "model.safetensors").exists():
            load_base(folder)
        return str(folder)

    @cached_property
    def variants(self) -> Mapping[str, Mapping[Key, tuple[Example, ...]]]:
        """Every text of every set that is measured, as examples."""
        return {
            each.name: encode_variants(self.encoding, each, in_blocks=True)
            for each in self.data.sets
        }

    @cached_property
    def training(self) -> Mapping[str, list[Example]]:
        """Rows by what is done with them: `forget` and `retain` in runs, `learn_...` before."""
        # That an answer ends is no knowledge to forget, as in `unilogit unlearn`.
        endless = dataclasses.replace(self.encoding, append_eos=False)
        data = self.data
        return {
            "forget": encode(endless, data.forget),
            "retain": encode(self.encoding, data.retain),
            "learn_forget": encode(self.encoding, data.forget),
            "learn_known": encode(self.encoding, data.known),
        }

    def open(self, source: str, *, method: str | None = None, **parameters: float) -> Subject:
        """Load a model, with what is not trained frozen.

        Args:
            source: directory or Hub id.
            method: what will train it, since `rmu` trains other layers than the top ones.
            parameters: of the method.

        Raises:
            RunError, UnsupportedHeadError: it cannot be loaded, or does not take the rows.
        """
        model = load_model(source, self.plan.dtype)
        with reading(f"the model of {source!r} cannot be run"):
            observe_logit_transform(model)
        check_fits(model, self.encoding, [each for each in self.training.values() if each])
        layers = self.plan.train_layers
        if self.plan.cached:
            if not isinstance(model, LlamaForCausalLM):
                kind = type(model).__name__
                raise RunError(f"model.cached takes a model of Llama's architecture, got {kind}")
            assert layers is not None  # As the plan was checked.
            return Subject(model, top_of(model, layers))
        if method == "rmu":
            below = steered_layer(model, parameters) + 1
            train_only_top_layers(model, min(layers or _RMU_LAYERS, below), below=below)
        elif layers is not None:
            with reading("model.train_layers"):
                train_only_top_layers(model, layers)
        return Subject(model, model)

    def fed(self, subject: Subject, name: str, examples: Sequence[Example]) -> list[Features]:
        """Examples as what steps and checks run takes them.

        Args:
            subject: the model.
            name: of the examples, under which what is computed of them is kept.
            examples: in their order.
        """
        if not self.plan.cached or not examples:
            return [example.features() for example in examples]
        path = self.folder / _TRUNK / f"{name}-{self._digest(examples)}.safetensors"
        if not path.exists():
            model, layers = cast(LlamaForCausalLM, subject.whole), self.plan.train_layers or 0
            _save(path, run_trunk(model, layers, examples, self.pad_id))
        tensors = load_file(path)
        parts = torch.tensor_split(tensors["states"], tensors["end"][:-1])
        return [
            {"inputs_embeds": states, "labels": torch.tensor(example.labels)}
            for states, example in zip(parts, examples, strict=True)
        ]

    def _digest(self, examples: Sequence[Example]) -> str:
        """Of what the kept states are a function of."""
        content: list[Any] = [self.plan.base, self.plan.train_layers, self.plan.dtype]
        content += [example.input_ids for example in examples]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _save(path: Path, features: Sequence[Features]) -> None:
    tensors = {
        "states": torch.cat([each["inputs_embeds"] for each in features]),
        "end": torch.tensor([len(each["labels"]) for each in features]).cumsum(0),
    }

    def write(unfinished: Path) -> None:
        save_file(tensors, unfinished)

    write_whole(path, write)


Note = Callable[[str], None]
"""Is told what a user should know."""

Settings = Mapping[str, Any]
"""Of one cell, as JSON has them."""
