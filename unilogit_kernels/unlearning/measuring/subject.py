"""A model that is measured, with the rows as its tokenizer has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel

from unilogit_kernels.huggingface.head import observe_logit_transform
from unilogit_kernels.unlearning.data import Encoding, Example, padding_id
from unilogit_kernels.unlearning.errors import reading
from unilogit_kernels.unlearning.loading import check_fits, load_encoding, load_model
from unilogit_kernels.unlearning.measuring.request import Request
from unilogit_kernels.unlearning.measuring.set_metrics import OURS
from unilogit_kernels.unlearning.measuring.variants import Key, encode_variants
from unilogit_kernels.unlearning.record import file_digest, printing_date


@dataclass(frozen=True)
class Subject:
    """A model, loaded, and what it is shown.

    Attributes:
        role: `"model"`, `"golden"` or `"starting"`.
        source: directory or Hub id.
        model: on its device.
        encoding: of its tokenizer.
        examples: of each set, by its name; several of a variant that is shown in blocks.
        date: what chat templates print as today's.
    """

    role: str
    source: str
    model: PreTrainedModel
    encoding: Encoding
    examples: Mapping[str, Mapping[Key, tuple[Example, ...]]]
    date: datetime

    @property
    def pad_id(self) -> int:
        """The token to pad with."""
        return padding_id(self.encoding.tokenizer)

    def sets(self) -> dict[str, list[Example]]:
        """The examples of each set, in order."""
        return {name: list(chain(*each.values())) for name, each in self.examples.items()}

    @staticmethod
    def load(
        role: str,
        source: str,
        request: Request,
        date: datetime,
        note: Callable[[str], None],
        device: torch.device | None = None,
    ) -> Subject:
        """Read a model and see that it takes the rows.

        Args:
            role: see `Subject`.
            source: see `Subject`.
            request: what is asked for.
            date: see `Subject`.
            note: is told what a user should know.
            device: see `load_model`.

        Raises:
            RunError, DataError, UnsupportedHeadError: it cannot be measured on them.
        """
        encoding = load_encoding(
            source, request.max_length, request.chat_template, dict(request.template_arguments)
        )
        with printing_date(date, encoding):
            examples = {
                each.name: encode_variants(encoding, each, in_blocks=request.convention == OURS)
                for each in request.sets
            }
        model = load_model(
            source,
            request.dtype,
            device=device,
            allow_missing=request.allow_missing_weights,
            note=note,
        )
        with reading(f"the model of {source!r} cannot be run"):
            observe_logit_transform(model)
        subject = Subject(role, source, model, encoding, examples, date)
        check_fits(model, encoding, [each for each in subject.sets().values() if each])
        return subject


def file_digests(source: str) -> dict[str, str]:
    """The SHA-256 of each file in a model's directory, by name; nothing for a Hub id.

    What `sha256sum` prints, so that others can check it. It takes about a second for each GB and
    core.
    """
    folder = Path(source)
    files = sorted(path for path in folder.glob("*") if path.is_file())
    with ThreadPoolExecutor() as threads:
        return dict(
            zip((path.name for path in files), threads.map(file_digest, files), strict=True)
        )
