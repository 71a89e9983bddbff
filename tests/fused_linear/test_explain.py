"""`explain_plan` against what the loops do, and the default plan against bare GEMMs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fused_linear.test_options import GemmCounter
from unilogit_kernels import LinearOptions, explain_plan, linear_kl_loss, linear_unilogit_loss
from unilogit_kernels.functional.explain import ACCELERATORS, PlanReport
from unilogit_kernels.fused_linear import compaction
from unilogit_kernels.fused_linear.plan import Plan, plan_linear, plan_saving

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "kept whole": (96, 128, {}),
    "kept in part": (192, 48, {"memory_budget": 2 << 20}),
    "many tokens": (1500, 32, {}),
    "frozen weight": (96, 64, {"train_weight": False}),
    "frozen hidden": (96, 64, {"train_hidden": False}),
    "statistics alone": (96, 64, {"train_weight": False, "train_hidden": False}),
    "recomputed": (96, 64, {"reduction": "none"}),
    "recomputed, frozen weight": (96, 64, {"reduction": "none", "train_weight": False}),
    "much memory": (192, 48, {"memory_budget": 1 << 28}),
    "recomputed, much memory": (192, 48, {"memory_budget": 1 << 28, "reduction": "none"}),
    "float32 logits": (192, 48, {"logits_dtype": torch.float32}),
}
PAIR_CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "logits kept whole": (60, 128, {}),
    "rows kept whole": (96, 128, {}),
    "rows kept, another hidden size": (96, 100, {"ref_h": 72}),
    "rows kept in part": (192, 48, {"memory_budget": 2 << 20}),
    "many tokens": (1500, 32, {}),
    "frozen weight": (96, 64, {"train_weight": False}),
    "frozen hidden": (96, 64, {"train_hidden": False}),
    "statistics alone": (96, 64, {"train_weight": False, "train_hidden": False}),
    "recomputed": (96, 64, {"reduction": "none"}),
    "recomputed, frozen weight": (96, 64, {"reduction": "none", "train_weight": False}),
    "much memory": (192, 48, {"memory_budget": 1 << 28}),
    "recomputed, much memory": (192, 48, {"memory_budget": 1 << 28, "reduction": "none"}),
    "float32 logits": (192, 48, {"logits_dtype": torch.float32}),
    "teacher of another dtype": (192, 48, {"ref_dtype": torch.float16}),
}
V = 8003


def with_linear_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a case, with those of how the call may run taken together."""
    options = {"memory_budget": 4 << 20, **options}
    how = {name: options.pop(name) for name in LinearOptions._fields if name in options}
    return {**options, "options": LinearOptions(**how)}


def measured(n: int, h: int, dtype: torch.dtype, **options: Any) -> tuple[int, int]:
    """Operations of the GEMMs, and bytes beside operands and gradients, of a real call."""
    options = with_linear_options(options)
    hidden = torch.randn(n, h).to(dtype).requires_grad_(options.pop("train_hidden", True))
    weight = torch.randn(V, h).to(dtype).requires_grad_(options.pop("train_weight", True))
    labels = torch.randint(0, V, (n,))
    loss_of: Callable[..., Tensor] = linear_unilogit_loss
    operands = [hidden, weight, labels]
    if "ref_h" in options:
        ref_h, ref_dtype = options.pop("ref_h"), options.pop("ref_dtype", dtype)
        teacher = torch.randn(n, ref_h).to(ref_dtype), torch.randn(V, ref_h).to(ref_dtype)
        loss_of, operands = linear_kl_loss, [hidden, weight, *teacher, labels]
    with GemmCounter() as counter:
        loss = loss_of(*operands, backend="cpu", **options)
        if loss.requires_grad:
            loss.sum().backward()
    results: list[Tensor] = [x for x in (hidden, weight) if x.requires_grad]
    # Of float16, results wait in float32 and are scaled to float16 while these are alive.
    size = 2 + 4 if dtype == torch.float16 and options.get("reduction") != "none" else None
    return counter.flops, counter.peak_bytes - sum(
        x.numel() * (size or x.element_size()) for x in results
    )


def predicted(n: int, h: int, dtype: torch.dtype, **options: Any) -> PlanReport:
    options = with_linear_options(options)
    return explain_plan(n, h, V, dtype=dtype, device="cpu", **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations_and_peak_are_those_of_the_loops(case: str, dtype: torch.dtype) -> None:
    n, h, options = CASES[case]
    flops, peak = measured(n, h, dtype, **options)
    report = predicted(n, h, dtype, **options)
    assert report.gemm_flops == flops
    assert 0.99 * peak <= report.peak_bytes <= 1.01 * peak


@pytest.mark.parametrize("case", PAIR_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations_and_peak_against_a_reference_model(case: str, dtype: torch.dtype) -> None:
    n, h, options = PAIR_CASES[case]
    options = {"ref_h": h, **options}
    flops, peak = measured(n, h, dtype, **options)
    report = predicted(n, h, dtype, **options)
    assert report.gemm_flops == flops
    assert 0.99 * peak <= report.peak_bytes <= 1.01 * peak


@pytest.mark.parametrize(
    ("n", "train_weight", "gemms"), [(64, True, 4), (128, True, 4), (1024, False, 3)]
)
def test_a_pair_needs_no_gemm_beyond_its_own(n: int, train_weight: bool, gemms: int) -> None:
    """In bfloat16 on CPU: two heads' logits and the gradients, up to H tokens of a trained head."""
    report = explain_plan(n, 128, 32_000, device="cpu", ref_h=128, train_weight=train_weight)
    assert report.gemms == gemms
    assert report.saved_share == (1.0 if train_weight else 0.0)


def test_a_float32_pair_adds_up_where_its_logits_do_not_fit() -> None:
    """Sums in float32 are the gradient itself, so that nothing has to wait in it."""
    orders = [
        explain_plan(n, 128, 32_000, dtype=torch.float32, device="cpu", ref_h=128).plan.order
        for n in (64, 65)
    ]
    assert orders == ["vocabulary_chunks", "token_chunks"]


@pytest.mark.parametrize("n", [64, 1024, 16_384])
@pytest.mark.parametrize("ref_h", [None, 512])
@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peak_is_within_the_budget(
    n: int, ref_h: int | None, train_weight: bool, dtype: torch.dtype, device: str
) -> None:
    """Up to what grows with the tokens, where that alone leaves less than it should: sums of the
    hidden states' gradient, and hidden states that are cast."""
    h = 256
    report = explain_plan(
        n,
        h,
        32_000,
        dtype=dtype,
        device=device,
        train_weight=train_weight,
        ref_h=ref_h,
    )
    sums = n * h * 4 + n * h * 2 if dtype != torch.float32 and train_weight else 0
    casts = device == "cpu" and dtype == torch.float16
    copies = 4 * n * (h + (ref_h or 0)) if casts else 0
    budget, vectors = report.memory_budget, 64 * n
    assert report.peak_bytes <= max(budget, sums + copies + vectors + budget // 2)


@pytest.mark.parametrize("train_weight", [False, True])
def test_default_plan_is_near_the_bare_gemms_on_an_h100(train_weight: bool) -> None:
    """Predicted, from the data sheet."""
    report = explain_plan(8192, 4096, 128_256, train_weight=train_weight)
    assert set(report.predicted_seconds) == set(ACCELERATORS)
    ratio = report.predicted_seconds["H100"] / report.bare_gemm_seconds["H100"]
    assert 1.0 <= ratio <= 1.1
    assert report.launches <= 64


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_the_one_that_a_call_follows(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations and bytes could agree by chance; the cut of the call is the cut explained."""
    n, h, options = CASES[case]
    followed: list[Plan] = []
    for function in (plan_linear, plan_saving):

        def spy(*args: Any, function: Callable[..., Plan] = function, **kwargs: Any) -> Plan:
            followed.append(function(*args, **kwargs))
            return followed[-1]

        monkeypatch.setattr(compaction, function.__name__, spy)
    measured(n, h, torch.float32, **options)
    assert predicted(n, h, torch.float32, **options).plan == followed[-1]


@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cost_is_linear_in_tokens_and_columns(train_weight: bool, device: str) -> None:
    """No quadratic part: launches and operations follow n and V, from 8 k to 64 k tokens."""
    for n, v in ((65_536, 32_768), (8192, 262_144)):
        small = explain_plan(8192, 1024, 32_768, device=device, train_weight=train_weight)
        large = explain_plan(n, 1024, v, device=device, train_weight=train_weight)
        assert large.gemm_flops <= 8 * 1.15 * small.gemm_flops
        assert large.launches <= 8 * 2 * small.launches


def test_kept_share_grows_with_the_budget() -> None:
    shares = [
        explain_plan(
            512,
            64,
            32_000,
            device="cpu",
            reduction="none",
            options=LinearOptions(memory_budget=budget << 20),
        ).saved_share
        for budget in (8, 25, 45, 120)
    ]
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert 0 < shares[1] < shares[2] < shares[3]
    assert shares[3] > 0.8


def test_shows_its_figures_when_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = explain_plan(8192, 4096, 128_256)
    assert capsys.readouterr().out == ""
    table = str(report)
    assert f"{report.launches:,} launches" in table
    assert f"{report.gemms:.2f} x 2nhV" in table
    assert f"of a budget of {report.memory_budget / 2**20:.1f} MiB" in table
    assert table.count("predicted") == len(ACCELERATORS)


def test_errors() -> None:
    with pytest.raises(ValueError, match="vocab_size >= 2, got 5, 4, 1"):
        explain_plan(5, 4, 1)
    with pytest.raises(ValueError, match="reduction must be one of"):
        explain_plan(5, 4, 10, reduction="max")
    with pytest.raises(ValueError, match="ref_h must be at least 1"):
        explain_plan(5, 4, 10, ref_h=0)
    with pytest.raises(TypeError, match="logits_dtype must be the operands' dtype"):
        explain_plan(
            5,
            4,
            10,
            ref_h=4,
            ref_dtype=torch.float16,
            options=LinearOptions(logits_dtype=torch.bfloat16),
        )
