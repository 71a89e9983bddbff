"""One text for each parameter that several functions take, in the docstring of each of them.

So `help()` explains every parameter in a line of its own, and the lines cannot drift apart.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

WIDTH = 100

PARAMETERS = {
    "logits": "`[..., V]`, float32, bfloat16, float16 or float64, any strides.",
    "hidden": "`[..., H]`, the hidden states that enter the lm_head.",
    "weight": "`[V, H]`, the lm_head's weight, in hidden's dtype (any dtype under autocast).",
    "labels": "int64 or int32 `[...]`, in `[0, vocab_size)` or `ignore_index`. Of the same "
    "positions as the logits that predict them: `input_ids` need `shift=True` or `shift_labels`.",
    "shift": "Whether labels are those of Hugging Face, `labels[..., t]` of token t itself: they "
    "are moved by one along the last dimension, and with them token weights and the objective's "
    "tensors of tokens. The result of position t is about token t + 1.",
    "bias": "`[V]`, of the lm_head, or None.",
    "adapter": "A low-rank term of the lm_head, such as LoRA's (`LowRank`), or None.",
    "ref_adapter": "The same of the teacher's lm_head; it gets no gradient.",
    "ignore_index": "Label of positions that contribute nothing, whatever their logits hold.",
    "reduction": '`"mean"`, `"sum"` or `"none"`.',
    "token_weights": "`[...]`, a constant factor per token, of either sign. It does not enter the "
    "mean's denominator.",
    "num_items_in_batch": "Denominator of the mean, at least 1 (smaller numbers count as 1), for "
    "gradient accumulation: an int, or a tensor on any device. Default: the number of labels that "
    "are not `ignore_index`.",
    "softcap": "The model caps its logits as `softcap * tanh(z / softcap)` (Gemma 2).",
    "logit_scale": "The model multiplies its logits by this, before the cap (Cohere; Granite "
    "divides, so pass the reciprocal).",
    "vocab_size": "Number of real tokens where the vocabulary is padded; the columns beyond have "
    "no probability and get zero gradient.",
    "vocab_parallel": "Ranks that share the vocabulary, where each holds a part of its columns "
    "(`VocabParallel`); None where this process holds all of them.",
    "backend": "Name of a backend, or None for the best one of the device.",
    "rewrite": "What becomes of the teacher's label entry: `Shift(gamma)`, `Uniform()`, `Mask()`, "
    "or None for the teacher as it is.",
    "direction": '`"forward"` for KL(teacher || student), `"reverse"` for KL(student || teacher).',
    "temperature": "Divides both models' logits. The loss is not multiplied by its square.",
    "ref_softcap": "The teacher caps its logits as `softcap * tanh(z / softcap)`.",
    "ref_logit_scale": "The teacher multiplies its logits by this, before the cap.",
    "options": "How the call may run: memory, dtype of the logits, skipped rows (`LinearOptions`).",
}
"""The text of a parameter where a docstring has none of its own."""

RAISES = {
    "TypeError": "A dtype is not supported.",
    "ValueError": "A shape, device or option does not fit.",
    "IndexError": "A label is out of range. On accelerators, where checking would synchronise, its "
    "row becomes NaN instead, unless `UNILOGIT_KERNELS_CHECK_LABELS=1` is set.",
    "RuntimeError": "The backend cannot run here.",
}
"""What every loss raises."""

_Documented = TypeVar("_Documented", bound=Callable[..., Any])


def documented(function: _Documented) -> _Documented:
    """Complete a docstring: each parameter of the signature in order, and what all losses raise.

    What the docstring says itself stays: its own lines for parameters and errors take the place of
    the shared ones.

    Example:
        >>> @documented
        ... def loss(logits, labels, *, power=2):
        ...     '''A loss.
        ...
        ...     Args:
        ...         power: Its exponent.
        ...     '''
        >>> "labels: int64" in loss.__doc__, "power: Its exponent." in loss.__doc__
        (True, True)
    """
    if function.__doc__ is None:  # python -OO
        return function
    sections = _sections(inspect.cleandoc(function.__doc__))
    given = _entries(sections.get("Args", ""))
    names = inspect.signature(function).parameters
    sections["Args"] = _written({n: given.get(n, PARAMETERS.get(n, "")) for n in names})
    sections["Raises"] = _written(RAISES | _entries(sections.get("Raises", "")))
    order = ["", "Args", "Returns", "Raises", "Example"]
    parts = [
        (name and f"{name}:\n{sections[name]}") or sections[name]
        for name in order
        if name in sections
    ]
    function.__doc__ = "\n\n".join(parts) + "\n"
    return function


def _sections(text: str) -> dict[str, str]:
    """The text by headings, that before the first one under the empty name."""
    pieces = re.split(r"^(Args|Returns|Raises|Example):\n", text, flags=re.MULTILINE)
    return {"": pieces[0].rstrip()} | {
        name: body.rstrip() for name, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }


def _entries(body: str) -> dict[str, str]:
    """`name: text` entries, each on one line."""
    found = re.split(r"^    (\w+): ", body, flags=re.MULTILINE)[1:]
    return {n: " ".join(text.split()) for n, text in zip(found[::2], found[1::2], strict=True)}


def _written(entries: dict[str, str]) -> str:
    return "\n".join(
        textwrap.fill(
            f"{name}: {text}", WIDTH - 4, initial_indent=" " * 4, subsequent_indent=" " * 8
        )
        for name, text in entries.items()
    )
