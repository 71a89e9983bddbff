"""`explain_plan`: how a fused linear call would run, before it does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from unilogit_kernels.backends.imagined import Gpu
from unilogit_kernels.calls import validation
from unilogit_kernels.fused_linear.budget import HeadShape, LinearShape, budget_of, saved_capacity
from unilogit_kernels.fused_linear.cost import (
    Collective,
    Costs,
    Shares,
    launched,
    loss_costs,
    recomputing_costs,
)
from unilogit_kernels.fused_linear.gemm import EVERYTHING, NOTHING, GemmDtypes, Needs
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.fused_linear.plan import (
    Plan,
    plan_linear,
    plan_saving,
)
from unilogit_kernels.fused_linear.recorder import Launch, Read


@dataclass(frozen=True)
class Accelerator:
    """A GPU by its rates: dense, no sparsity.

    Attributes:
        half_flops: bfloat16 and float16 matrix products, operations per second.
        float32_flops: float32 ones (TF32 off), operations per second.
        bandwidth: Memory, bytes per second.
        gpu: What decides how row kernels are launched.
        source: Where the 16-bit rate and the bandwidth are from.
        launch_seconds: Host time of a launch: below it, launches set the pace.
    """

    half_flops: float
    float32_flops: float
    bandwidth: float
    gpu: Gpu
    source: str = "data sheet"
    launch_seconds: float = 5e-6

    @property
    def rates(self) -> str:
        """What a prediction takes for granted."""
        return (
            f"{self.half_flops / 1e12:.0f} TFLOP/s, {self.bandwidth / 1e12:.1f} TB/s, {self.source}"
        )

    def seconds(self, launch: Launch, dtype: torch.dtype) -> float:
        """Roofline time: whichever takes longer, operations or bytes."""
        rate = self.half_flops if dtype.itemsize == 2 else self.float32_flops
        return max(launch.flops / rate, launch.moved(self.gpu.cache_bytes) / self.bandwidth)


ACCELERATORS = {
    "A100": Accelerator(312e12, 19.5e12, 2.039e12, Gpu("cuda:80", 108, 40 << 20)),
    "H100": Accelerator(798e12, 66.9e12, 3.0e12, Gpu("cuda:90", 132, 50 << 20), "seen"),
    "H200": Accelerator(989.4e12, 66.9e12, 4.8e12, Gpu("cuda:90", 132, 50 << 20)),
    "B200": Accelerator(2250e12, 75e12, 8.0e12, Gpu("cuda:100", 148, 126 << 20)),
    "MI300X": Accelerator(1307.4e12, 163.4e12, 5.3e12, Gpu("hip:gfx942", 304, 256 << 20)),
}
"""NVIDIA A100 80GB SXM, H100 SXM, H200 and B200, AMD MI300X, from their makers' data sheets; the
H100's rates are those of an 8192^3 bfloat16 product and of a copy, which others have measured."""

COUNTED_ON = "H100"
"""The one whose launches and bytes a report names; those of the others are in its predictions."""


@dataclass(frozen=True)
class PlanReport:
    """What `explain_plan` finds; `print` and notebooks show it as a table.

    Attributes:
        title: The call.
        plan: The cut of a loss that is finished in the forward, or of the backward otherwise.
        gemms: Matrix products in units of `2 n h V` operations; 3 are needed to train an lm_head,
            4 against a reference model of the same hidden size.
        gemm_flops: Floating-point operations of the matrix products.
        moved_bytes: Bytes that the launches read and write, caches apart.
        launches: Kernels on the device: of torch, of matrix products and of rows; on GPUs, those on
            an H100. How many a call of a row kernel takes depends on the GPU and its rows.
        launches_on: The same by GPU.
        peak_bytes: Most bytes alive at a time beside operands and gradients.
        memory_budget: Bytes that buffers may take, as given or by default.
        saved_share: Share of the logits, or of their gradient rows, that is not projected again.
        predicted_seconds: By GPU, from its rates: a prediction, never a measurement.
        bare_gemm_seconds: The same for the matrix products alone, each in one piece.
        collectives: What ranks that share the vocabulary send each other: all figures are then
            those of one rank.
    """

    title: str
    plan: Plan
    gemms: float
    gemm_flops: int
    moved_bytes: int
    launches: int
    launches_on: dict[str, int]
    peak_bytes: int
    memory_budget: int
    saved_share: float
    predicted_seconds: dict[str, float]
    bare_gemm_seconds: dict[str, float]
    collectives: tuple[Collective, ...] = ()

    def __str__(self) -> str:
        """The table."""
        plan = self.plan
        lines = [
            self.title,
            f"  order            {plan.order.replace('_', ' ')}",
            f"  chunks           {plan.tokens:,} tokens x {plan.columns:,} columns, "
            f"projected {plan.tile_columns:,} columns at a time",
        ]
        what = "finished gradient rows" if plan.saves_rows else "logits"
        if plan.saves_rows:
            lines.append(f"  finished         by {plan.row_tokens:,} tokens")
        lines += [
            f"  saved             {self.saved_share:.0%} of the {what}",
            f"  GEMMs            {self.gemms:.2f} x 2nhV = {self.gemm_flops / 1e12:.2f} TFLOP",
            f"  moved            {self.moved_bytes / 1e9:.2f} GB in {self.launches:,} launches",
            f"  peak memory      {self.peak_bytes / 2**20:.1f} MiB beside operands and gradients, "
            f"of a budget of {self.memory_budget / 2**20:.1f} MiB",
        ]
        for each in self.collectives:
            lines.append(
                f"  {each.what:<17}{each.bytes / 1e6:.2f} MB from each of {each.ranks} ranks, "
                f"{each.received / 1e6:.2f} MB to each"
            )
        for name, seconds in self.predicted_seconds.items():
            bare = self.bare_gemm_seconds[name]
            lines.append(
                f"  {name:<17}{1e3 * seconds:.2f} ms predicted, {seconds / bare:.2f} x the bare "
                f"GEMMs' {1e3 * bare:.2f} ms, {self.launches_on[name]:,} launches (roofline at "
                f"{ACCELERATORS[name].rates}; not measured)"
            )
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows."""
        printer.text(str(self))


def explain_plan(
    n: int,
    h: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    train_hidden: bool = True,
    train_weight: bool = True,
    train_bias: bool = False,
    reduction: str = "mean",
    options: LinearOptions | None = None,
    ref_h: int | None = None,
    ref_dtype: torch.dtype | None = None,
    vocab_parallel: int | None = None,
    rank: int = 0,
    train_adapter: bool = True,
    sequence_parallel: bool = False,
) -> PlanReport:
    """How a fused linear call would run: strategy, chunks, operations, bytes, memory, time.

    The plan depends on these arguments alone, so the same call always runs in the same way.

    Args:
        n: Tokens that count: not ignored, of weight other than 0.
        h: Hidden size.
        vocab_size: V.
        dtype: Of hidden states and lm_head.
        device: Device type, `"cuda"` or `"cpu"`.
        train_hidden: Whether hidden states want a gradient.
        train_weight: Whether the lm_head does.
        train_bias: Whether its bias does.
        reduction: `"mean"` or `"sum"`; `"none"` for losses that go through
            `linear_target_log_odds`, whose backward is a call of its own.
        options: How the call may run; `skip_below` and `compact` do not count here.
        ref_h: The reference model's hidden size, for a call of `linear_kl_loss`; None for a loss of
            one model.
        ref_dtype: Of its hidden states and lm_head; default: `dtype`.
        vocab_parallel: Number of ranks that share the vocabulary (`VocabParallel`), in equal parts;
            the report is then of one of them. Predicted times leave out what they send.
        rank: Of the lm_head's low-rank term (`LowRank`); 0 for none.
        train_adapter: Whether that term wants a gradient.
        sequence_parallel: Whether those ranks also share the tokens of hidden states equally: the
            states of all `n` are gathered, and their gradient is scattered.

    Returns:
        The report. For `reduction="none"` it adds forward and backward up.

    Raises:
        ValueError: A size or option does not fit.
        TypeError: A dtype does not.

    Example:
        >>> report = explain_plan(8192, 4096, 128_256, train_weight=False)
        >>> print(report)  # doctest: +ELLIPSIS
        8,192 tokens x 4,096 x 128,256, torch.bfloat16 on cuda, trains hidden states
          order            token chunks
        ...
        >>> report.gemms
        2.0
    """
    if min(n, h) < 1 or vocab_size < 2:
        raise ValueError(f"expected n, h >= 1 and vocab_size >= 2, got {n}, {h}, {vocab_size}")
    if ref_h is not None and ref_h < 1:
        raise ValueError(f"ref_h must be at least 1, or None for a loss of one model, got {ref_h}")
    options = options or LinearOptions()
    options = validation.check_linear_options(options, dtype)
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    adapts = rank > 0 and train_adapter
    inner = rank > 0 and (train_adapter or train_hidden)
    needs = Needs(train_hidden, train_weight, train_bias, inner, adapts)
    dtypes = GemmDtypes.of(dtype, device, options.logits_dtype)
    reference = None
    if ref_h is not None:
        ref_dtype = ref_dtype or dtype
        validation.check_linear_options(options, ref_dtype)
        ref_dtypes = GemmDtypes.of(ref_dtype, device, options.logits_dtype)
        reference = HeadShape(ref_h, ref_dtypes, ref_dtype)
    shares = None
    columns = vocab_size
    if vocab_parallel is not None:
        if vocab_parallel < 1:
            raise ValueError(f"vocab_parallel must be at least 1, or None, got {vocab_parallel}")
        shares = Shares(vocab_parallel, vocab_size, sequence_parallel)
        columns = -(-vocab_size // vocab_parallel)
    elif sequence_parallel:
        raise ValueError(
            "sequence_parallel is of ranks that share a vocabulary: pass their number as "
            "vocab_parallel"
        )
    shape = LinearShape(n, h, columns, dtypes, dtype, device, needs, reference, rank)
    if reduction not in validation.REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(validation.REDUCTIONS)}, got {reduction!r}"
        )
    calls_of = _recomputing if reduction == "none" else _finished
    calls = calls_of(shape, options, shares)
    return _report(shape, calls, budget_of(shape, options))


def _finished(shape: LinearShape, options: LinearOptions, shares: Shares | None) -> list[Costs]:
    plan = plan_linear(shape, options, passes=2, shared=shares is not None)
    return [loss_costs(shape, plan, shares)]


def _recomputing(shape: LinearShape, options: LinearOptions, shares: Shares | None) -> list[Costs]:
    everything = shape._replace(needs=EVERYTHING)
    saved = saved_capacity(everything, options) if shape.needs.any() else 0
    nothing = shape._replace(needs=NOTHING)
    shared = shares is not None
    forward = plan_linear(nothing, options, passes=1)
    backward = None
    if shape.needs.any():
        backward = plan_linear(shape, options, passes=1, shared=shared)
    if saved:
        forward = backward = plan_saving(shape, options, shape.n)
    return recomputing_costs(shape, forward, backward, saved, shares)


def _report(shape: LinearShape, calls: list[Costs], memory_budget: int) -> PlanReport:
    plan, flops = calls[-1].plan, sum(call.flops for call in calls)
    unit = 2 * shape.n * shape.h * shape.vocab_size
    trained = _trained_widths(shape)
    projected = flops - 2 * shape.n * shape.vocab_size * sum(trained)
    once = 2 * shape.n * shape.vocab_size * sum(head.h + head.rank for head in shape.heads)
    passes = 2 if shape.needs.any() and plan.order == "vocabulary_chunks" else 1
    whole = [
        _whole_gemm(shape, width, head.dtypes)
        for head in shape.heads
        for width in (head.h, head.rank)
        if width
    ]
    whole += [_whole_gemm(shape, width, shape.dtypes) for width in trained]
    recorded = launches = [launch for call in calls for launch in call.launches]
    predicted, bare, launches_on = {}, {}, {}
    if shape.device_type == "cuda":
        for name, gpu in ACCELERATORS.items():
            given = launched(recorded, gpu.gpu)
            on_device = sum(gpu.seconds(launch, shape.dtypes.operands) for launch in given)
            predicted[name] = max(on_device, len(given) * gpu.launch_seconds)
            bare[name] = sum(gpu.seconds(launch, shape.dtypes.operands) for launch in whole)
            launches_on[name] = len(given)
        launches = launched(recorded, ACCELERATORS[COUNTED_ON].gpu)
    return PlanReport(
        title=_title(shape),
        plan=plan,
        gemms=flops / unit,
        gemm_flops=flops,
        moved_bytes=sum(launch.moved() for launch in launches),
        launches=len(launches),
        launches_on=launches_on,
        peak_bytes=max(call.peak_bytes for call in calls),
        memory_budget=memory_budget,
        saved_share=passes - projected / once,
        predicted_seconds=predicted,
        bare_gemm_seconds=bare,
        collectives=tuple(each for call in calls for each in call.collectives),
    )


def _trained_widths(shape: LinearShape) -> list[int]:
    """The inner size of each product that a gradient takes."""
    needs, r = shape.needs, shape.rank
    widths = [needs.hidden * shape.h, needs.weight * shape.h, needs.inner * r, needs.up * r]
    return [width for width in widths if width]


def _whole_gemm(shape: LinearShape, h: int, dtypes: GemmDtypes) -> Launch:
    """A matrix product of a head in one piece: n x h, h x V and n x V, each moved once."""
    n, v, size = shape.n, shape.vocab_size, dtypes.operands.itemsize
    return Launch("bare", 2 * n * v * h, size * n * v, (Read(size * (n + v) * h, math.inf),))


def _title(shape: LinearShape) -> str:
    names = ("hidden states", "weight", "bias", "", "a low-rank term")
    trained = [name for name, need in zip(names, shape.needs, strict=True) if need and name]
    against = ""
    if shape.reference is not None:
        against = f" against a reference model of {shape.reference.h:,}"
    adapted = f" with a term of rank {shape.rank:,}" if shape.rank else ""
    return (
        f"{shape.n:,} tokens x {shape.h:,} x {shape.vocab_size:,}{adapted}, {shape.input_dtype} on "
        f"{shape.device_type}, trains {', '.join(trained) or 'nothing'}{against}"
    )
