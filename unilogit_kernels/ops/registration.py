"""How an operator is registered: its schema from named fragments, its kernels, its derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from unilogit_kernels.ops.derivatives import (
    Below,
    Call,
    Derivatives,
    Fragments,
    any_tangent,
    differentiable,
    first_derivatives_only,
    is_of_numbers,
    requires_grad,
)
from unilogit_kernels.ops.fragments import Fragment, names, rebuilt, schema
from unilogit_kernels.rows.ranks import told_to_all

LIBRARY = torch.library.Library("unilogit_kernels", "DEF")

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The Python function behind each operator, so that `testing` can watch what it allocates."""

P = ParamSpec("P")
R = TypeVar("R", bound=Fragment)


class Operator(Generic[P, R]):
    """An operator that takes fragments and returns one.

    Args:
        function: What it computes, from fragments.
        name: In the namespace `unilogit_kernels`.
        takes: The classes of the fragments. The first one begins with the operands that may have
            a gradient; a last one with `of_needs` says which are wanted.
        gives: The class of the result, of tensors only.
    """

    def __init__(
        self,
        function: Callable[P, R],
        name: str,
        takes: Sequence[type[Fragment]],
        gives: type[R],
    ) -> None:
        self.name = name
        self._gives, self._several = gives, len(names(gives)) > 1
        self._of_needs = getattr(takes[-1], "of_needs", None)
        self._group_in = next((n for n, part in enumerate(takes) if "group" in names(part)), None)
        stops = list(itertools.accumulate(len(names(part)) for part in takes))
        self._slices: list[tuple[type[Any], int, int]] = list(
            zip(takes, [0, *stops], stops, strict=False)
        )
        LIBRARY.define(f"{name}({schema(takes)}) -> ({schema([gives])})")
        self._overload = getattr(torch.ops.unilogit_kernels, name).default
        self._function: Callable[..., R] = function
        self._level: Callable[[Fragments, Below], R] = lambda fragments, below: below(fragments)
        self._straight: Below = self._of_numbers  # one object, to be known again

        def run(*args: Any) -> Any:
            return self.output(self._compute(self._split(args)))

        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        IMPLEMENTATIONS[f"unilogit_kernels::{name}"] = run
        torch.library.register_vmap(f"unilogit_kernels::{name}", self._vmap, lib=LIBRARY)

    def __call__(self, *fragments: P.args, **_: P.kwargs) -> R:
        """Call it, as torch calls any operator; where nobody watches, without its dispatcher.

        That takes each argument through C++ and back twice in a forward and twice in a backward,
        which on a few rows takes as long as the kernels.
        """
        given = cast(tuple[Fragment, ...], fragments)
        if _is_plain(given):
            return self._level(given, self._straight)
        return self._result(self._overload(*_flat(given)))

    def fake(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorator of what the operator returns for tensors without data."""
        of_fragments: Callable[..., R] = function

        def run(*args: Any) -> Any:
            return self.output(of_fragments(*self._split(args)))

        torch.library.register_fake(f"unilogit_kernels::{self.name}", run, lib=LIBRARY)
        return function

    def differentiable(self, derivatives: type[Derivatives]) -> None:
        """Give the operator derivatives.

        `torch.library.register_autograd` does so in more host time: it walks the arguments as a
        tree several times a step, which on a few rows takes as long as the kernels. It also leaves
        forward-mode AD at a silent zero.
        """
        operands = derivatives.operands

        def level(fragments: Fragments, below: Below) -> Any:
            first = (*fragments[0],)[:operands]
            tangents = any_tangent(first)
            if not (tangents or requires_grad(first)):
                return below(fragments)
            results: list[Any] | None = [] if below is self._straight and not tangents else None
            call = Call(self, derivatives, fragments, below, tangents, results)
            output = differentiable(call, first)
            if results is None:
                return self._result(output)
            return rebuilt(self._gives, (output, *results[0][1:]))

        self._set_level(level)

    def differentiable_no_more(self) -> None:
        """Say of an operator that computes derivatives that it has none itself."""

        def level(fragments: Fragments, below: Below) -> Any:
            tensors = [arg for arg in _flat(fragments) if isinstance(arg, Tensor)]
            if not (requires_grad(tensors) or any_tangent(tensors)):
                return below(fragments)
            return self._result(
                first_derivatives_only(lambda: self.output(below(fragments)), self.name, tensors)
            )

        self._set_level(level)

    def _set_level(self, level: Callable[[Fragments, Below], R]) -> None:
        """Say what autograd does with a call, at each of its levels."""

        def run(*args: Any) -> Any:
            return self.output(level(self._split(args), self._below_autograd))

        self._level = level
        LIBRARY.impl(self.name, run, "Autograd")

    def _compute(self, fragments: Fragments) -> R:
        """Call the function itself."""
        device_type = next(iter(fragments[0])).device.type
        if not torch.is_autocast_enabled(device_type):
            return self._on_all_ranks(fragments, device_type)
        # A GEMM in here has chosen its dtypes; autocast would change them.
        with torch.autocast(device_type, enabled=False):
            return self._on_all_ranks(fragments, device_type)

    def _on_all_ranks(self, fragments: Fragments, device_type: str) -> R:
        group = "" if self._group_in is None else fragments[self._group_in].group  # type: ignore[attr-defined]
        if not group:
            return self._function(*fragments)
        with told_to_all(group, device_type):
            return self._function(*fragments)

    def _vmap(self, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        """`torch.vmap`: one after the other, as a row kernel fills the device by itself."""

        def at(i: int, arg: Any, dim: Any) -> Any:
            if isinstance(arg, list):
                return [at(i, *each) for each in zip(arg, dim or [None] * len(arg), strict=True)]
            return arg if dim is None else arg.select(dim, i)

        results: list[tuple[Tensor, ...]] = []
        for i in range(info.batch_size):
            output = self._overload(*(at(i, *each) for each in zip(args, in_dims, strict=True)))
            results.append(output if self._several else (output,))
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return (stacked, (0,) * len(stacked)) if len(stacked) > 1 else (stacked[0], 0)

    def _split(self, args: Sequence[Any]) -> Fragments:
        """The fragments of a flat list of arguments."""
        return tuple([rebuilt(part, args[start:stop]) for part, start, stop in self._slices])

    def output(self, result: R) -> Any:
        """What torch expects of an operator that returns `result`."""
        values = tuple(result)
        return values if self._several else values[0]

    def _result(self, output: Any) -> R:
        """The inverse."""
        return rebuilt(self._gives, output if self._several else (output,))

    def _below_autograd(self, fragments: Fragments) -> R:
        """Call it at the next level: below this one's autograd.

        Autograd is off inside an autograd function, but not for levels of `torch.func` below.
        """
        args = _flat(fragments)
        if not torch._C._are_functorch_transforms_active():
            with torch._C._AutoDispatchBelowAutograd():
                return self._result(self._overload(*args))
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return self._result(self._overload(*args))

    def _of_numbers(self, fragments: Fragments) -> R:
        """The same where the level below is that of numbers."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._compute(fragments)

    def needing(self, fragments: Fragments, needs: Sequence[bool]) -> Fragments:
        """With what autograd needs switched on, where the operator is told."""
        if self._of_needs is None:
            return fragments
        *others, last = fragments
        switched_on = self._of_needs(needs)
        return *others, rebuilt(
            type(last), [a or b for a, b in zip(last, switched_on, strict=True)]
        )


def _flat(fragments: Fragments) -> list[Any]:
    return [value for fragment in fragments for value in fragment]


def _is_plain(fragments: Fragments) -> bool:
    """Whether torch's dispatcher would do no more than autograd does.

    Nobody traces, transforms, records or watches operators, and all tensors are of numbers.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for fragment in fragments:
        for value in fragment:
            kind = type(value)
            if kind is list:
                for each in value:
                    if not (type(each) in _NO_TENSORS or is_of_numbers(each)):
                        return False
            elif not (kind in _NO_TENSORS or is_of_numbers(value)):
                return False
    return True


_NO_TENSORS = frozenset({bool, int, float, str, torch.dtype, type(None)})
"""What an argument may be beside tensors; others, such as sizes that are traced, are not plain."""


def operator(
    name: str, *takes: type[Fragment], gives: type[R]
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorator: register a function of fragments as an operator, for every device."""
    return lambda function: Operator(function, name, takes, gives)
