"""The parts of a plan: where rows and models come from, what is swept, what is tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.limits import Range

DEMO = "demo"
"""Name of a base model that needs no network: SmolLM2-135M-Instruct from a wheel."""

POSITIVE = Range(0.0, 1e6, open_low=True)
_COUNT = Range(1, 2**31 - 1, whole=True)
_COUNT_OR_NONE = Range(0, 2**31 - 1, whole=True)
SEED = Range(0, 2**32 - 1, whole=True)
_SHARE = Range(0.0, 1.0, open_high=True)
_AT_MOST_ONE = Range(0.0, 1.0, open_low=True)


@dataclass(frozen=True)
class DataPlan:
    """Where the rows come from: exactly one of `made_up`, `benchmark` and `files`.

    Attributes:
        made_up: arguments of `make_tofu_shaped`, which `unilogit dataset` calls.
        benchmark: name of a benchmark, see `load_benchmark`.
        data_dir: the folder of its files.
        files: files of rows by the name of their set, `forget` and `retain` among them; see
            `measuring.sets.role_of`. A set of another name than `forget...`, `retain...` and
            `holdout...` is learned by the starting and the golden model, and no unlearning batch
            contains it.
        set_aside: share of the retain rows, or of what they are about where their ids say so
            (`subject/fact`), that both models learn and no unlearning batch contains: they are
            measured as `neighbours`.
        sets: names of those that are measured, `forget` among them; all if empty.
    """

    made_up: dict[str, Any] | None = None
    benchmark: str | None = None
    data_dir: str | None = None
    files: dict[str, str] | None = None
    set_aside: float = field(default=0.0, metadata={"range": _SHARE})
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelPlan:
    """Which models.

    Attributes:
        base: directory or Hub id that the starting and the golden model are made of, or `demo`.
        starting: a model that knows all rows, in place of one that is made.
        golden: a model that never saw the rows to forget, in place of one that is made.
        train_layers: train only so many of the top layers; None for all.
        cached: compute what enters these layers once for each row and keep it on disk, where both
            models are made of `base`. A step then costs what these layers cost.
        dtype: of the weights.
        max_length: rows are cut after so many tokens.
        chat_template: see `Encoding`.
    """

    base: str | None = None
    starting: str | None = None
    golden: str | None = None
    train_layers: int | None = field(
        default=None, metadata={"range": _COUNT._replace(optional=True)}
    )
    cached: bool = False
    dtype: str = "float32"
    max_length: int = field(default=512, metadata={"range": _COUNT})
    chat_template: bool | None = None


@dataclass(frozen=True)
class LearnPlan:
    """How the starting and the golden model learn, by cross-entropy on a cosine schedule.

    Attributes:
        steps: of the optimizer.
        batch_size: rows in each.
        learning_rate: at the peak of the schedule.
        warmup_steps: to that peak.
        label_smoothing: keeps facts from being learned to a probability of 1, see `finetune`.
        seed: of the order of the rows.
    """

    steps: int = field(default=200, metadata={"range": _COUNT})
    batch_size: int = field(default=16, metadata={"range": _COUNT})
    learning_rate: float = field(default=2e-5, metadata={"range": POSITIVE})
    warmup_steps: int = field(default=10, metadata={"range": _COUNT_OR_NONE})
    label_smoothing: float = field(default=0.0, metadata={"range": _SHARE})
    seed: int = field(default=0, metadata={"range": SEED})


@dataclass(frozen=True)
class UnlearnPlan:
    """What all methods share: the one budget.

    Attributes:
        steps: at most.
        batch_size: forget rows in a step; retain rows come on top.
        retain_per_forget: retain rows for each.
        warmup_steps: of the learning rate, constant afterwards.
    """

    steps: int = field(default=100, metadata={"range": _COUNT})
    batch_size: int = field(default=8, metadata={"range": _COUNT})
    retain_per_forget: int = field(default=1, metadata={"range": _COUNT})
    warmup_steps: int = field(default=5, metadata={"range": _COUNT_OR_NONE})


@dataclass(frozen=True)
class ChecksPlan:
    """When a run is looked at, and when it ends.

    Attributes:
        every: steps from one look to the next.
        near: every step is looked at once the forget probability is below so many times the target.
        rows: of each set that are looked at, drawn with the validation's seed.
        past: a run ends once the forget probability has fallen to this share of the target; 1 ends
            it at the target, less shows how it goes on.
        target: forget probability at which methods are compared; None for the golden model's.
    """

    every: int = field(default=5, metadata={"range": _COUNT})
    near: float = field(default=1.5, metadata={"range": Range(1.0, 1e6)})
    rows: int = field(default=200, metadata={"range": _COUNT})
    past: float = field(default=1.0, metadata={"range": _AT_MOST_ONE})
    target: float | None = field(
        default=None, metadata={"range": Range(0.0, 1.0, True, True, optional=True)}
    )


@dataclass(frozen=True)
class ChoosePlan:
    """How each method's learning rate and weight are chosen.

    Attributes:
        by: measures at matched forgetting, `set.measure`; their mean over validation rows and
            training seeds is to be as large as it can be.
        validation: share of each set's rows that the choice sees; all others are what is reported.
        seed: of that split.
        training_seeds: how many of the plan's seeds, the first ones, run every setting and choose;
            the others run the chosen settings alone. None for all.
    """

    by: tuple[str, ...] = ("retain.probability",)
    validation: float = field(default=0.5, metadata={"range": _AT_MOST_ONE})
    seed: int = field(default=1000, metadata={"range": SEED})
    training_seeds: int | None = field(
        default=None, metadata={"range": _COUNT._replace(optional=True)}
    )


@dataclass(frozen=True)
class RobustnessPlan:
    """What is tried to bring the forgotten rows back; 0 leaves a trial out.

    Attributes:
        relearn_steps: of cross-entropy on half of the forget rows; the other half is asked.
        relearn_rate: their learning rate.
        bits: to which the decoder's weights are rounded, in groups along a row.
    """

    relearn_steps: int = field(default=0, metadata={"range": _COUNT_OR_NONE})
    relearn_rate: float = field(default=1e-5, metadata={"range": POSITIVE})
    bits: int = field(default=0, metadata={"range": Range(0, 8, whole=True)})

    def __post_init__(self) -> None:
        """One bit has a sign alone."""
        if self.bits == 1:
            raise RunError("robustness.bits must be 0 or at least 2, got 1")


@dataclass(frozen=True)
class AnswersPlan:
    """Greedy answers of the model at matched forgetting.

    Attributes:
        generate: whether there are any: ROUGE and key recall need them.
        sets: to which there are; to all if empty.
        samples: how many the report shows.
        max_new_tokens: of an answer; None for a few more than the longest completion has.
        batch_size: rows in one forward of every measurement.
    """

    generate: bool = True
    sets: tuple[str, ...] = ()
    samples: int = field(default=4, metadata={"range": _COUNT_OR_NONE})
    max_new_tokens: int | None = field(
        default=None, metadata={"range": _COUNT._replace(optional=True)}
    )
    batch_size: int = field(default=32, metadata={"range": _COUNT})


@dataclass(frozen=True)
class MethodPlan:
    """A method, and what it is swept over.

    Attributes:
        name: see `methods.method_names`.
        label: what the report calls it; by default its name.
        parameters: where they differ from the method's defaults.
        learning_rates: in place of the plan's.
        forget_weights: in place of the plan's.
        retain_loss: of the retain rows; None for the method's own.
        retain_weight: its factor.
    """

    name: str
    label: str = ""
    parameters: dict[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = field(default=(), metadata={"range": POSITIVE})
    forget_weights: tuple[float, ...] = field(default=(), metadata={"range": POSITIVE})
    retain_loss: str | None = None
    retain_weight: float = field(default=1.0, metadata={"range": Range(0.0, 1e6)})

    @property
    def title(self) -> str:
        """The label, or the name without one."""
        return self.label or self.name
