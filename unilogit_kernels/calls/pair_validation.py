"""Validation of a call on two models: what the single-model validation does not see."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.calls import validation
from unilogit_kernels.calls.options import CallOptions, TeacherOptions
from unilogit_kernels.calls.validation import LossCall
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.maths.divergence import DIRECTIONS, Direction, Divergence
from unilogit_kernels.maths.rewrites import Mask, Rewrite
from unilogit_kernels.ops.divergence import PairRows


class PairCall(NamedTuple):
    """A validated call on a student and a teacher.

    Attributes:
        call: The student's side, with weights and reduction; the temperature in its transform.
        teacher_transform: What the teacher does to its raw logits, the temperature included.
        divergence: Which divergence, at that temperature.
    """

    call: LossCall
    teacher_transform: LogitTransform
    divergence: Divergence

    def rows(self) -> PairRows:
        """What describes the rows to an operator."""
        rewrite = self.divergence.rewrite
        return PairRows(
            self.call.labels,
            self.call.ignore_index,
            *self.call.transform,
            *self.teacher_transform,
            self.call.vocab_size,
            self.call.shard.first_column,
            self.call.shard.columns,
            self.call.shard.group,
            self.call.shard.owners,
            self.divergence.direction,
            rewrite.name,
            rewrite.parameters(),
            self.call.backend,
        )


def describe_logits(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None,
    options: CallOptions,
    teacher: TeacherOptions,
) -> PairCall:
    """Validate a call on both models' logits `[..., V]`.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, device or option is wrong.
        RuntimeError: The requested backend cannot run here.
    """
    call = validation.describe_logits(logits, labels, options)
    _check_teacher("ref_logits", ref_logits, "logits", logits)
    _check_leading_shape("ref_logits", ref_logits, "logits", logits)
    _check_vocabularies(
        call, ("logits", logits.shape[-1]), ("ref_logits", ref_logits.shape[-1]), options.vocab_size
    )
    return _pair_call(call, labels, teacher)


def describe_linear(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor | None,
    options: CallOptions,
    teacher_options: TeacherOptions,
    linear: LinearOptions,
) -> PairCall:
    """Validate a call on both models' hidden states, lm_head and bias.

    Raises:
        TypeError: A dtype is wrong, or one model's dtypes are mixed outside autocast.
        ValueError: A shape, device or option is wrong.
        RuntimeError: The requested backend cannot run here.
    """
    hidden, weight, bias = student
    call = validation.describe_linear(hidden, weight, bias, labels, options, linear)
    if linear.skip_below:
        raise ValueError(
            f"skip_below must be 0 for a divergence, got {linear.skip_below}: no slope in front of "
            "a row's gradient tells its size"
        )
    ref_hidden, ref_weight, ref_bias = teacher
    _check_teacher("ref_hidden", ref_hidden, "hidden", hidden)
    validation.check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    _check_logits_dtype(call.linear.logits_dtype, hidden.dtype, ref_hidden.dtype)
    _check_leading_shape("ref_hidden", ref_hidden, "hidden", hidden)
    _check_vocabularies(
        call, ("weight", weight.shape[0]), ("ref_weight", ref_weight.shape[0]), options.vocab_size
    )
    return _pair_call(call, labels, teacher_options)


def _pair_call(call: LossCall, labels: Tensor | None, teacher: TeacherOptions) -> PairCall:
    rewrite, direction, temperature, softcap, logit_scale = teacher
    transform = validation.check_transform(softcap, logit_scale, prefix="ref_")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive finite number, got {temperature}")
    if rewrite is None:
        rewrite = Rewrite()
    elif not isinstance(rewrite, Rewrite):
        raise TypeError(f"rewrite must be None, Shift, Uniform or Mask, got {rewrite!r}")
    elif labels is None:
        raise ValueError(f"rewrite={rewrite!r} changes the label's entry: labels must be given")
    if not all(math.isfinite(value) for value in rewrite.parameters()):
        raise ValueError(f"rewrite must have finite parameters, got {rewrite!r}")
    if isinstance(rewrite, Mask) and direction == "reverse":
        raise ValueError(
            "rewrite=Mask() gives the label probability 0, for which KL(student || teacher) is "
            "infinite; use direction='forward' or another rewrite"
        )
    return PairCall(
        call._replace(transform=call.transform.at_temperature(temperature)),
        transform.at_temperature(temperature),
        Divergence(cast(Direction, direction), rewrite.at_temperature(temperature)),
    )


def _check_teacher(name: str, teacher: Tensor, student_name: str, student: Tensor) -> None:
    validation.check_float(name, teacher)
    validation.check_device(name, teacher, student_name, student)
    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        raise TypeError(
            f"{name} and {student_name} must both be float64 or neither, "
            f"got {teacher.dtype} and {student.dtype}"
        )


def _check_logits_dtype(
    logits_dtype: torch.dtype | None, dtype: torch.dtype, ref_dtype: torch.dtype
) -> None:
    """Check that it goes with the teacher's dtype too; the student's has been checked."""
    if logits_dtype not in (None, ref_dtype, validation.statistics_dtype(ref_dtype)):
        raise TypeError(
            f"logits_dtype is of both models' logits: with hidden {dtype} and ref_hidden "
            f"{ref_dtype} it must be {validation.statistics_dtype(ref_dtype)} or None, "
            f"got {logits_dtype}"
        )


def _check_leading_shape(name: str, teacher: Tensor, student_name: str, student: Tensor) -> None:
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"{name} must have {student_name}'s leading shape {list(student.shape[:-1])}, "
            f"got {list(teacher.shape)} for {student_name} {list(student.shape)}"
        )


def _check_vocabularies(
    call: LossCall, student: tuple[str, int], teacher: tuple[str, int], vocab_size: int | None
) -> None:
    (name, columns), (ref_name, ref_columns) = student, teacher
    if call.shard.group:
        # Beyond the last real token either model may have as much padding as it likes.
        ends = call.shard.first_column + call.shard.columns == call.vocab_size
        if columns != ref_columns and not (ends and ref_columns >= call.shard.columns):
            raise ValueError(
                f"{name} has {columns} tokens on this rank and {ref_name} {ref_columns}: with "
                "vocab_parallel both models must be cut at the same columns"
            )
        return
    if vocab_size is None and columns != ref_columns:
        raise ValueError(
            f"{name} has {columns} tokens and {ref_name} {ref_columns}; if both models "
            "share a tokenizer and pad it differently, pass the number of real ones as vocab_size"
        )
    if call.vocab_size > ref_columns:
        raise ValueError(
            f"vocab_size must be at most {ref_name}'s {ref_columns} tokens, got {call.vocab_size}"
        )
