"""The fragments of an lm_head: its operands, which of them want a gradient, and these gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.fused_linear.compaction import HeadInputs, LinearInputs
from unilogit_kernels.fused_linear.gemm import GemmDtypes, Needs
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.fused_linear.tiles import Gradients
from unilogit_kernels.ops.arguments import Logits, gradient_like


class Head(NamedTuple):
    """An lm_head and the hidden states that enter it.

    Its logits are `hidden @ weight.T + inner @ up.T + bias`.

    Attributes:
        hidden: `[n, h]`.
        weight: `[V, h]`.
        bias: `[V]` or None.
        inner: `[n, r]` or None: hidden states in a low-rank adapter's space, times its scale.
        up: `[V, r]` or None: the adapter's way out of it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    inner: Tensor | None
    up: Tensor | None


HEAD = len(Head._fields)
"""Operands of one lm_head; where there are two, those of the student come first."""

Operands = Logits | Head
"""What the logits of a call come from: themselves, or an lm_head."""


def linear_inputs(heads: Sequence[Tensor | None], options: LinearOptions) -> LinearInputs:
    """The operands of one lm_head or of two as the layers below take them."""
    own, *others = (_inputs(heads[i : i + HEAD]) for i in range(0, len(heads), HEAD))
    return LinearInputs(own, options, *others)


def _inputs(head: Sequence[Tensor | None]) -> HeadInputs:
    hidden, weight, bias, inner, up = head
    assert hidden is not None
    assert weight is not None
    # An adapter may be kept in float32 beside 16-bit weights; the GEMMs take what they take.
    thin = (None if x is None else x.to(hidden.dtype) for x in (inner, up))
    return HeadInputs(hidden, weight, bias, *thin)


class HeadGradients(NamedTuple):
    """Gradients of an lm_head's operands; an unwanted one is empty."""

    hidden_grad: Tensor
    weight_grad: Tensor
    bias_grad: Tensor
    inner_grad: Tensor
    up_grad: Tensor

    @staticmethod
    def of(gradients: Gradients, head: Sequence[Tensor | None]) -> HeadGradients:
        """Those that are wanted, in the dtypes that they were added up in."""
        like = head[0]
        assert like is not None
        return HeadGradients(*(like.new_empty(0) if g is None else g for g in gradients))

    @staticmethod
    def like(
        needs: NeedsGradients, head: Sequence[Tensor | None], dtypes: GemmDtypes | None = None
    ) -> HeadGradients:
        """What these look like to a fake kernel; finished if no `dtypes` are given."""
        hidden, weight, _, inner, up = head[:HEAD]
        assert hidden is not None
        assert weight is not None
        results, exact = dtypes and dtypes.results, dtypes and dtypes.exact
        return HeadGradients(
            gradient_like(needs[0], hidden, results),
            gradient_like(needs[1], weight, results),
            gradient_like(needs[2], weight[:, 0], exact),
            *(
                hidden.new_empty(0) if x is None else gradient_like(need, x, exact)
                for need, x in zip(needs[3:], (inner, up), strict=True)
            ),
        )

    def finished(self, head: Sequence[Tensor | None]) -> HeadGradients:
        """In the operands' dtypes."""
        dtypes = dtypes_of(head)
        return HeadGradients(*(g.to(dtype) for g, dtype in zip(self, dtypes, strict=True)))


def dtypes_of(head: Sequence[Tensor | None]) -> tuple[torch.dtype, ...]:
    """Those of a head's operands, first of the student; one that is not there has the first's."""
    first = head[0]
    assert first is not None
    return tuple(first.dtype if x is None else x.dtype for x in head[:HEAD])


class NeedsGradients(NamedTuple):
    """Which operands of an lm_head want a gradient; autograd switches them on."""

    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool
    needs_inner: bool
    needs_up: bool

    @staticmethod
    def of_needs(needs: Sequence[bool]) -> NeedsGradients:
        """From which of the operands do."""
        return NeedsGradients(*needs)

    def needs(self) -> Needs:
        """The same as the layers below take it."""
        return Needs(*self)


NO_GRADIENTS = NeedsGradients(*(False,) * HEAD)
"""What a caller says: autograd knows better which gradients are wanted."""
