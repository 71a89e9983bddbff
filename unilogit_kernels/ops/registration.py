"""How an operator is registered: its schema from named fragments, its kernels, its derivatives."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from unilogit_kernels.ops.fragments import Fragment, names, rebuilt, save, saved, schema
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
        flat = [name for part in takes for name in names(part)]
        self._group_at = flat.index("group") if "group" in flat else None
        stops = list(itertools.accumulate(len(names(part)) for part in takes))
        self._slices: list[tuple[type[Any], int, int]] = list(
            zip(takes, [0, *stops], stops, strict=False)
        )
        LIBRARY.define(f"{name}({schema(takes)}) -> ({schema([gives])})")
        self._overload = getattr(torch.ops.unilogit_kernels, name).default
        run = self._real(function)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        IMPLEMENTATIONS[f"unilogit_kernels::{name}"] = run
        torch.library.register_vmap(f"unilogit_kernels::{name}", self._vmap, lib=LIBRARY)

    def __call__(self, *fragments: P.args, **_: P.kwargs) -> R:
        """Call it, as torch calls any operator."""
        flat = [value for fragment in fragments for value in cast(Fragment, fragment)]
        return self._result(self._overload(*flat))

    def fake(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorator of what the operator returns for tensors without data."""
        of_fragments: Callable[..., R] = function

        def run(*args: Any) -> Any:
            return self._output(of_fragments(*self._split(args)))

        torch.library.register_fake(f"unilogit_kernels::{self.name}", run, lib=LIBRARY)
        return function

    def differentiable(self, derivatives: type[Derivatives]) -> None:
        """Give the operator derivatives.

        `torch.library.register_autograd` does so in more host time: it walks the arguments as a
        tree several times a step, which on a few rows takes as long as the kernels. It also leaves
        forward-mode AD at a silent zero.
        """
        call = _Call(self, derivatives)
        operands = derivatives.operands

        def run(*args: Any) -> Any:
            first = args[:operands]
            tangents = any_tangent(first)
            if tangents or _requires_grad(first):
                return _apply(_Differentiable, call, tangents, args[operands:], *first)
            return self._below_autograd(args)

        LIBRARY.impl(self.name, run, "Autograd")

    def differentiable_no_more(self) -> None:
        """Say of an operator that computes derivatives that it has none itself."""

        def run(*args: Any) -> Any:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if _requires_grad(tensors) or any_tangent(tensors):
                compute = functools.partial(self._below_autograd, args)
                return first_derivatives_only(compute, self.name, tensors)
            return self._below_autograd(args)

        LIBRARY.impl(self.name, run, "Autograd")

    def _real(self, function: Callable[..., R]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            device_type = args[0].device.type
            if not torch.is_autocast_enabled(device_type):
                return compute(args, device_type)
            # A GEMM in here has chosen its dtypes; autocast would change them.
            with torch.autocast(device_type, enabled=False):
                return compute(args, device_type)

        def compute(args: Sequence[Any], device_type: str) -> Any:
            if self._group_at is None or not args[self._group_at]:
                return self._output(function(*self._split(args)))
            with told_to_all(args[self._group_at], device_type):
                return self._output(function(*self._split(args)))

        return run

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

    def _split(self, args: Sequence[Any]) -> list[Any]:
        """The fragments of a flat list of arguments."""
        return [rebuilt(part, args[start:stop]) for part, start, stop in self._slices]

    def _output(self, result: R) -> Any:
        """What torch expects of an operator that returns `result`."""
        values = tuple(result)
        return values if self._several else values[0]

    def _result(self, output: Any) -> R:
        """The inverse."""
        return rebuilt(self._gives, output if self._several else (output,))

    def _below_autograd(self, args: Sequence[Any]) -> Any:
        """Call it at the next level: below this one's autograd.

        Autograd is off inside an autograd function, but not for levels of `torch.func` below.
        """
        if not torch._C._are_functorch_transforms_active():
            with torch._C._AutoDispatchBelowAutograd():
                return self._overload(*args)
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return self._overload(*args)

    def _needing(self, args: Sequence[Any], needs: Sequence[bool]) -> Sequence[Any]:
        """The arguments with what autograd needs switched on, where the operator is told."""
        if self._of_needs is None:
            return args
        switched_on = self._of_needs(needs)
        first = len(args) - len(switched_on)
        wanted = (a or b for a, b in zip(args[first:], switched_on, strict=True))
        return *args[:first], *wanted


def operator(
    name: str, *takes: type[Fragment], gives: type[R]
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorator: register a function of fragments as an operator, for every device."""
    return lambda function: Operator(function, name, takes, gives)


# ---- derivatives -------------------------------------------------------------------------------


class Derivatives(Protocol):
    """The derivatives of an operator's first result by its first arguments; others have none.

    Attributes:
        operands: How many arguments these are.
    """

    operands: ClassVar[int]

    @staticmethod
    def save(result: Any, *fragments: Any) -> Iterable[Fragment]:
        """What the backward needs, which is handed on to `backward`."""

    @staticmethod
    def backward(needs: Sequence[bool], upstream: Tensor, *saved: Any) -> Sequence[Tensor | None]:
        """The operands' gradients; those that are not wanted are dropped."""

    @staticmethod
    def jvp(tangents: Sequence[Tensor | None], result: Any, *fragments: Any) -> Tensor | None:
        """The first result's tangent of those of the operands; None if that is not supported."""


class _Call:
    """An operator with its derivatives: what the autograd function below calls."""

    def __init__(self, of: Operator[Any, Any], derivatives: type[Derivatives]) -> None:
        self.operator, self.derivatives = of, derivatives


class _Differentiable(_SingleLevelFunction):
    """One level of autograd, of torch's own or of a transform of `torch.func`.

    It runs behind the dispatcher, which has unwrapped the levels above; hence it is not an
    `autograd.Function`, which would do so itself and can't without a `setup_context`.
    """

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(
        ctx: Any, call: _Call, tangents: bool, rest: tuple[Any, ...], *operands: Tensor | None
    ) -> Any:
        operator = call.operator
        args = operator._needing((*operands, *rest), ctx.needs_input_grad[_BESIDE:])
        output = operator._below_autograd(args)
        result, fragments = operator._result(output), operator._split(args)
        ctx.call = call
        if operator._several:
            ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        save(ctx, call.derivatives.save(result, *fragments))
        if tangents:
            ctx.of_jvp = result, fragments
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, upstream = ctx.needs_input_grad[_BESIDE:], gradients[0]
        found: Sequence[Tensor | None] = [None] * len(needs)
        if upstream is not None:
            found = ctx.call.derivatives.backward(needs, upstream, *saved(ctx))
        wanted = (g if need else None for g, need in zip(found, needs, strict=True))
        return *(None,) * _BESIDE, *wanted

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        result, fragments = ctx.of_jvp
        del ctx.of_jvp
        tangent = ctx.call.derivatives.jvp(tangents[_BESIDE:], result, *fragments)
        if tangent is None:
            raise _no_forward_ad(ctx.call.operator.name)
        others = len(list(result)) - 1
        return (tangent, *(None,) * others) if others else tangent


_BESIDE = 3
"""Arguments of `_Differentiable.forward` before the operands."""


class _FirstDerivative(_SingleLevelFunction):
    """A derivative that depends on `anchors`, but can't be differentiated by them."""

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Any], name: str, *anchors: Tensor) -> Any:
        ctx.name = name
        return compute()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"unilogit_kernels::{ctx.name} computes first derivatives only; for a double backward "
            "(create_graph=True) pass backend='eager', which knows reverse mode over reverse mode "
            "where no ranks share the vocabulary"
        )

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _no_forward_ad(ctx.name)


def first_derivatives_only(
    compute: Callable[[], Any], name: str, anchors: Iterable[Tensor | None]
) -> Any:
    """`compute()`, attached to the graph of the `anchors`: to differentiate it again is an error.

    Args:
        compute: Of tensors, what the backward of an operator returns.
        name: Of the operator.
        anchors: What the result depends on.
    """
    return _apply(_FirstDerivative, compute, name, *anchors)


def _apply(function: type[_SingleLevelFunction], *args: Any) -> Any:
    apply: Callable[..., Any] = function.apply  # type: ignore[attr-defined]  # of a base in C++
    if not torch._C._are_functorch_transforms_active():
        return apply(*args)
    with enable_single_level_autograd_function():
        return apply(*args)


def any_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode AD carries a tangent of one of these."""
    level = forward_ad._current_level
    return level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x, level=level).tangent is not None
        for x in tensors
    )


def _requires_grad(operands: Sequence[Tensor | None]) -> bool:
    """Whether the graph has to see an operation on these."""
    if torch.is_grad_enabled():
        for x in operands:
            if x is not None and x.requires_grad:
                return True
    return False


def _no_forward_ad(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"Trying to use forward AD with unilogit_kernels::{name} that does not support it because "
        "it has not been implemented yet. Of these losses forward AD knows first derivatives only."
    )
