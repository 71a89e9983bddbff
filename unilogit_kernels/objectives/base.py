"""What an objective is, and the registry that knows them by name.

With `d = logit(p_y)` the log-odds of the label, `p_y = sigmoid(d)`, `log p_y = -softplus(-d)` and
`log(1 - p_y) = -softplus(d)`. An objective is a value `f(d)` and its slope `f'(d)`; the kernels
compute `d` and turn a slope into a gradient row, and know nothing else of the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from unilogit_kernels.maths.row_state import PLAIN, RowNeeds
from unilogit_kernels.maths.statistics import Statistics

_PER_TOKEN = "per_token"
MIXTURE, JOIN = "mixture", "+"


class Sweep(NamedTuple):
    """What `RowKernels.log_odds_sweep` takes of an objective.

    Attributes:
        name: Of what the kernels know.
        weights: Its parameters.
    """

    name: str
    weights: tuple[float, ...] = ()


def per_token() -> Any:
    """A dataclass field that holds one number for each token, in the labels' shape."""
    return dataclasses.field(metadata={_PER_TOKEN: True})


def per_sequence() -> Any:
    """A dataclass field that holds one number for each sequence."""
    return dataclasses.field(metadata={_PER_TOKEN: False})


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss `f(d)` of the log-odds `d` of tokens.

    Call an instance with log-odds for a differentiable value. Subclasses are frozen dataclasses;
    their fields are float parameters, and tensors declared by `per_token()` or `per_sequence()`
    (then with `eq=False`, as tensors do not compare to one truth value).

    The slope need not be the value's derivative: a paper's stop-gradient, such as a weight that
    follows the model but is not differentiated, belongs into `slope`.

    Example:
        >>> import torch
        >>> from unilogit_kernels.objectives import UnilogitReverse
        >>> d = torch.tensor([0.0, 5.0], requires_grad=True)
        >>> UnilogitReverse()(d, vocab_size=100).sum().backward()
        >>> bool((d.grad > 0).all())
        True
    """

    name: ClassVar[str]
    coupled: ClassVar[bool] = False
    """Whether a token's loss depends on other tokens: then all of them are evaluated together."""

    @property
    def needs(self) -> RowNeeds:
        """What it sees of a row beside the log-odds; the kernels then look for it."""
        return PLAIN

    @property
    def reports(self) -> bool:
        """Whether it also says how large a part of its loss is, which `report` computes."""
        return False

    def report(self, seen: Statistics, vocab_size: int) -> Tensor:
        """That part of the losses of rows, `[n]`."""
        raise NotImplementedError(f"objective {self.name!r} reports no part of its loss")

    def evaluate_with_report(self, seen: Statistics, vocab_size: int) -> Tensor:
        """The losses of rows, `[n]`; where it reports, `[2, n]` with that part of them."""
        losses = self.evaluate(seen, vocab_size)
        return torch.stack((losses, self.report(seen, vocab_size))) if self.reports else losses

    def sweep(self, vocab_size: int) -> Sweep:
        """As what a backend may finish it in one pass, where it knows the name."""
        return Sweep(self.name)

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`f(d)`, elementwise, in the dtype of `log_odds`."""
        raise NotImplementedError

    def slope(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`f'(d)`, elementwise. The default differentiates `value`."""
        # Unlike autograd.grad, this works inside an operator, where autograd is off.
        slope: Tensor = torch.func.grad(lambda d: self.value(d, vocab_size).sum())(log_odds)
        return slope

    def evaluate(self, seen: Statistics, vocab_size: int) -> Tensor:
        """The losses of rows, `[n]`."""
        return self.value(seen.log_odds, vocab_size)

    def differentiate(self, seen: Statistics, vocab_size: int) -> Statistics:
        """Their derivatives by what they see; None for what they do not."""
        return Statistics(self.slope(seen.log_odds, vocab_size))

    def of_rows(self, seen: Statistics, vocab_size: int) -> Tensor:
        """The losses of rows, with `differentiate` as their derivative."""
        compiled = torch.compiler.is_compiling()
        function = _ValueWithSlope if compiled else _ValueWithSlopeAndTangent
        result: Tensor = function.apply(self, vocab_size, *seen)
        return result

    def parameters(self) -> list[float]:
        """The values of the float fields, in order."""
        return [float(getattr(self, name)) for name in declared(type(self)).floats]

    def tensors(self) -> list[Tensor]:
        """The values of the tensor fields, in order."""
        return [getattr(self, name) for name in declared(type(self)).tensors]

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> Objective:
        """The same objective with `function` applied to each per-token tensor."""
        changed = {name: function(getattr(self, name)) for name in declared(type(self)).per_token}
        return dataclasses.replace(self, **changed) if changed else self

    def at(self, rows: slice | Tensor) -> Objective:
        """The objective of some of the tokens, where these are in one row, `[n]`."""
        return self.map_tokens(lambda tensor: tensor[rows])

    def __call__(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        """`f(d)` with `f'(d)` as its derivative; differentiable twice where `slope` is once.

        Raises:
            TypeError: It sees more of a row than its log-odds.
        """
        if any(self.needs):
            asked = [name for name, need in self.needs._asdict().items() if need]
            raise TypeError(
                f"objective {self.name!r} is no function of the log-odds alone: it also sees: "
                f"{', '.join(asked)}. Pass it to objective_loss or linear_objective_loss"
            )
        return self.of_rows(Statistics(log_odds), vocab_size)


class _Declared(NamedTuple):
    """The names of an objective's fields: floats, tensors, those per token, those without default.

    Attributes:
        floats: In order.
        options: Those of the floats that a user may set.
        tensors: In order.
        per_token: Those of the tensors that have one number per token.
        required: Those of the tensors that a user must give.
    """

    floats: tuple[str, ...]
    options: tuple[str, ...]
    tensors: tuple[str, ...]
    per_token: tuple[str, ...]
    required: tuple[str, ...]


_DECLARED: dict[type[Objective], _Declared] = {}
"""Of registered objectives: torch.compile does not follow the question itself."""


def declared(cls: type[Objective]) -> _Declared:
    """The fields of an objective's class."""
    if cls in _DECLARED:
        return _DECLARED[cls]
    fields = dataclasses.fields(cls)
    floats = [field for field in fields if _PER_TOKEN not in field.metadata]
    tensors = [field for field in fields if _PER_TOKEN in field.metadata]
    return _Declared(
        floats=tuple(field.name for field in floats),
        options=tuple(field.name for field in floats if not field.kw_only),
        tensors=tuple(field.name for field in tensors),
        per_token=tuple(field.name for field in tensors if field.metadata[_PER_TOKEN]),
        required=tuple(
            field.name for field in tensors if field.default_factory is dataclasses.MISSING
        ),
    )


class _ValueWithSlope(torch.autograd.Function):
    """Pairs a value with its own slope formula, since differentiating the value loses digits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(objective: Objective, vocab_size: int, *seen: Tensor | None) -> Tensor:
        return objective.evaluate(Statistics(*seen), vocab_size)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.objective, ctx.vocab_size, *seen = inputs
        ctx.save_for_backward(*seen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope = ctx.objective.differentiate(Statistics(*ctx.saved_tensors), ctx.vocab_size)
        return None, None, *(None if each is None else grad * each for each in slope)


class _ValueWithSlopeAndTangent(_ValueWithSlope):
    """The same with forward-mode AD, which torch.compile does not follow."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _ValueWithSlope.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def jvp(ctx: Any, objective: None, vocab_size: None, *tangents: Tensor | None) -> Tensor:
        slope = ctx.objective.differentiate(Statistics(*ctx.saved_tensors), ctx.vocab_size)
        terms = [
            t * s for t, s in zip(tangents, slope, strict=True) if not (t is None or s is None)
        ]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


REGISTRY: dict[str, type[Objective]] = {}
"""Objectives by name. The fused losses can compute these with the gradient in the forward pass."""

_ObjectiveType = TypeVar("_ObjectiveType", bound=type[Objective])


def register(cls: _ObjectiveType) -> _ObjectiveType:
    """Class decorator: make an objective available by its `name`, and to the fused losses.

    Raises:
        ValueError: The name is taken by another class, or is reserved: `mixture`, a `+` in it.
    """
    if JOIN in cls.name or cls.name == MIXTURE:
        raise ValueError(f"an objective cannot have the name {cls.name!r}")
    if REGISTRY.setdefault(cls.name, cls) is not cls:
        raise ValueError(f"objective name {cls.name!r} is already taken by {REGISTRY[cls.name]}")
    _DECLARED[cls] = declared(cls)
    return cls


def parameter_names(name: str) -> list[str]:
    """The float parameters of a registered objective that a user may set."""
    return list(declared(REGISTRY[name]).options)


def by_name(name: str, **parameters: float) -> Objective:
    """The registered objective of that name.

    Args:
        name: A key of `REGISTRY`.
        parameters: Its float parameters, where they are not to be the defaults.

    Raises:
        ValueError: Unknown name or parameter, or an objective that needs tensors of its own.
    """
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise ValueError(f"objective {name!r} is unknown; expected one of: {known}")
    cls = REGISTRY[name]
    needed = declared(cls).required
    if needed:
        raise ValueError(
            f"objective {name!r} needs tensors: pass objectives.{cls.__name__}"
            f"({', '.join(f'{field}=...' for field in needed)}) instead of the name"
        )
    taken = parameter_names(name)
    for parameter in parameters:
        if parameter not in taken:
            raise ValueError(
                f"objective {name!r} has no parameter {parameter!r}; "
                f"it has {', '.join(taken) or 'none'}"
            )
    return cls(**parameters)


_OF_LOGITS = (nn.functional.cross_entropy, nn.functional.nll_loss, nn.functional.kl_div)
"""What people pass as an objective, and is none."""


def resolve(
    objective: str | Objective | Callable[..., Tensor],
) -> Objective | Callable[..., Tensor]:
    """Turn what a user may pass as `objective` into an instance, or leave a callable as it is.

    Raises:
        ValueError: Unknown name, or one of an objective that needs tensors.
        TypeError: Neither a name, an instance nor a callable.
    """
    if isinstance(objective, str):
        return by_name(objective)
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, nn.modules.loss._Loss) or any(objective is f for f in _OF_LOGITS):
        raise TypeError(
            "objective must be a name, an Objective instance or a function of the log-odds, got "
            f"{objective}, which takes logits and targets: did you mean objective='cross_entropy'?"
        )
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(
            "objective must be a name, an Objective instance or a function of the log-odds, "
            f"got {objective!r}"
        )
    return objective
