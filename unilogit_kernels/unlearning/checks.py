"""Whether the settings of a run go together."""

from __future__ import annotations

import math

from unilogit_kernels.unlearning.config import check_handed_on
from unilogit_kernels.unlearning.dual import check_dual
from unilogit_kernels.unlearning.errors import RunError
from unilogit_kernels.unlearning.limits import check_choice, check_numbers
from unilogit_kernels.unlearning.loading import DTYPES
from unilogit_kernels.unlearning.lora import lora_options
from unilogit_kernels.unlearning.methods import (
    ALTPO,
    NONE,
    Method,
    check_goes_together,
    check_retain_loss,
    default_retain_loss,
)
from unilogit_kernels.unlearning.settings import TASKS, Settings
from unilogit_kernels.unlearning.stopping import read_target


def retain_loss_of(settings: Settings) -> str:
    """The loss of the retain rows, the method's own where none is given."""
    return settings.retain_loss or default_retain_loss(settings.method)


def takes_retain_rows(settings: Settings) -> bool:
    """Whether there is a loss of retain rows, and so are rows."""
    return retain_loss_of(settings) != NONE


def check_settings(settings: Settings) -> None:
    """See that they go together.

    Raises:
        RunError: they do not, or one of them has no such value.
    """
    _check_sources(settings)
    retain_loss = retain_loss_of(settings)
    try:
        method = Method(settings.method, settings.method_parameters)
        check_numbers(vars(settings))
        check_handed_on(settings.args)
        if settings.save_dtype is not None:
            check_choice("save_dtype", settings.save_dtype, DTYPES)
        if settings.task == "unlearn":
            of_labels = {name: getattr(settings, name) for name in ("label_smoothing", "z_loss")}
            check_retain_loss(retain_loss, of_labels)
        check_goes_together(method.name, retain_loss, settings.dual_step_size, settings.stop_at)
        read_target(settings.stop_at)
        epochs = math.inf if settings.args.get("max_steps", -1) > 0 else settings.epochs
        check_dual(vars(settings), epochs)
    except ValueError as error:
        raise RunError(str(error)) from error
    _check_retain_rows(settings)
    _check_lora(settings, method)
    takes_refusals = method.needs_refusals and method.name != ALTPO
    if takes_refusals and settings.refusals is None:
        raise RunError(f"method {method.name!r} needs refusals: a text file with one a line")
    if settings.refusals is not None and not takes_refusals:
        raise RunError(f"method {method.name!r} takes no refusals")


def _check_sources(settings: Settings) -> None:
    """See that it is said where the rows come from, and once."""
    check_choice("task", settings.task, TASKS)
    if (settings.benchmark is None) != (settings.data_dir is None):
        raise RunError(
            "--benchmark and --data-dir go together: the one names what, the other where"
        )
    if settings.task == "finetune":
        if not settings.data and settings.benchmark is None:
            raise RunError("there is nothing to learn: name files by --data, or a --benchmark")
        if settings.with_forget and settings.benchmark is None:
            raise RunError("--with-forget is about the rows of a benchmark: name one")
        return
    if settings.forget is None and settings.benchmark is None:
        raise RunError("name the rows to forget: --forget FILE, or a --benchmark")


def _check_retain_rows(settings: Settings) -> None:
    """See that there are rows to keep where there is a loss of them, and only there."""
    retain_loss = retain_loss_of(settings)
    takes = takes_retain_rows(settings)
    if not takes and settings.retain is not None:
        raise RunError(f"retain_loss {retain_loss!r} takes no rows to keep, got {settings.retain}")
    if takes and settings.task == "finetune":
        raise RunError(
            f"a fine-tuning keeps no rows: retain_loss must be 'none', got {retain_loss!r}"
        )
    if takes and settings.retain is None and settings.benchmark is None:
        raise RunError(
            f"retain_loss {retain_loss!r} needs rows to keep: --retain FILE, or a --benchmark; "
            "retain_loss 'none' does not"
        )


def _check_lora(settings: Settings, method: Method) -> None:
    """See that an adapter is asked for in a way that can be, and with what goes with one."""
    if settings.lora is None:
        if settings.merge:
            raise RunError("--merge is about the adapter of --lora, which is not given")
        return
    lora_options(settings.lora)
    if settings.train_layers is not None:
        raise RunError("--train-layers and --lora both say what is trained: leave one out")
    if method.is_negated:
        raise RunError(f"method {method.name!r} negates weights, which --lora does not train")
