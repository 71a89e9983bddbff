"""The fused head inside autograd's wider machinery: several processes, sharding, 64-bit offsets."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.problems import check, linear_problem
from tests.support.processes import run_ranks
from unilogit_kernels import linear_target_log_odds, linear_unilogit_loss, reference, unilogit_loss
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.fused_linear import compaction, gemm
from unilogit_kernels.fused_linear.budget import LinearShape
from unilogit_kernels.fused_linear.gemm import GemmDtypes, LinearHead, Needs
from unilogit_kernels.fused_linear.loops import linear_loss
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.fused_linear.plan import Plan, plan_linear
from unilogit_kernels.fused_linear.saved import SavedBeside, SavedInGradient
from unilogit_kernels.fused_linear.tiles import Gradients
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds
from unilogit_kernels.objectives import CrossEntropy
from unilogit_kernels.rows.objective import ObjectiveLoss, RowProblem, Weighted
from unilogit_kernels.testing import assert_tensors_within_budget, assert_within_budget

N, H, V = 12, 16, 300


class Model(nn.Module):
    """A body and a head whose loss runs inside `forward`, where sharded weights are gathered."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(H, H), Head(fused=fused)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.lm_head(torch.tanh(self.body(x)), labels)
        return loss


class Head(nn.Linear):
    """An lm_head that returns the loss."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__(H, V, bias=False)
        self.fused = fused

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        if self.fused:
            return linear_unilogit_loss(x, self.weight, labels)
        return unilogit_loss(super().forward(x), labels)


def _worker(kind: str) -> None:
    rank, gradients = dist.get_rank(), []
    for fused, dtype in ((True, torch.float32), (False, torch.float64), (False, torch.float32)):
        torch.manual_seed(0)
        model: nn.Module = Model(fused=fused).to(dtype)
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
            for part in (*model.children(), model):
                fully_shard(part, mesh=mesh)
        generator = torch.Generator().manual_seed(rank)
        # Many tokens, so that no single slope decides the errors of all gradients.
        x = torch.randn(8 * N, H, generator=generator)
        labels = torch.randint(0, V, (8 * N,), generator=generator)
        labels[rank] = -100
        model(x.to(dtype), labels).backward()
        gradients.append({name: _whole(p.grad) for name, p in model.named_parameters()})
    assert_tensors_within_budget(*gradients)


def _whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind: str) -> None:
    """Gradients through DDP's buckets and FSDP2's shards are those of unfused logits."""
    run_ranks(_worker, kind)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tied_embedding(backend: str, reduction: str) -> None:
    """One parameter as embedding and lm_head: both gradients arrive."""
    ids, labels = torch.randint(0, V, (N,)), torch.randint(0, V, (N,))
    values = torch.randn(V, H)

    def gradient(dtype: torch.dtype, fused: bool) -> Tensor:
        table = values.to(dtype).requires_grad_()
        hidden = torch.tanh(nn.functional.embedding(ids, table))
        if fused:
            loss = linear_unilogit_loss(hidden, table, labels, reduction=reduction, backend=backend)
        else:
            loss = reference.unilogit_loss(hidden @ table.t(), labels, reduction=reduction)
        return torch.autograd.grad(loss.sum(), table)[0]

    exact, plain = (gradient(dtype, False) for dtype in (torch.float64, torch.float32))
    assert_within_budget(gradient(torch.float32, True), exact, plain)


@pytest.mark.parametrize("memory_budget", [1 << 20, 1 << 30])
def test_backward_twice_where_logits_are_kept(backend: str, memory_budget: int) -> None:
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    d = linear_target_log_odds(
        hidden,
        weight,
        torch.arange(N),
        options=LinearOptions(memory_budget=memory_budget),
        backend=backend,
    )
    upstream = torch.randn(N)
    first = torch.autograd.grad(d, (hidden, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(d, (hidden, weight), upstream)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("plan_of", ["rows", "logits", "tokens"])
def test_every_way_of_keeping(monkeypatch: pytest.MonkeyPatch, backend: str, plan_of: str) -> None:
    """Tiles narrower than chunks, chunks shorter than the tokens, and a weight that adds up."""
    n, h, v = 30, 24, 130
    problem = linear_problem(n, h, v, torch.bfloat16, bias=True, softcap=4.0)
    m = int((problem.labels != -100).sum())
    plans = {
        "rows": [
            Plan("vocabulary_chunks", tokens, 50, 20, kept, beside, True, 5, 30)
            for tokens in (m, 7)
            for kept, beside in ((h, 0), (10, 0), (14, 4), (m, m - 10))
        ],
        "logits": [Plan("vocabulary_chunks", tokens, 50, 20, 12) for tokens in (m, 7)],
        "tokens": [Plan("token_chunks", 7, v, 40)],
    }[plan_of]
    for plan in plans:
        plan = Plan(**{**plan.__dict__, "saved_tokens": min(plan.saved_tokens, m)})
        monkeypatch.setattr(compaction, "plan_linear", lambda *_, plan=plan, **__: plan)
        check(
            problem,
            backend,
            options=LinearOptions(logits_dtype=torch.float32 if plan_of != "tokens" else None),
        )


class TestGpuBranch:
    """Without a GPU: shapes and dtypes of what a GPU would run, and offsets beyond 32 bits."""

    def test_gemms_of_wider_results(self) -> None:
        """The overloads that write and add float32 from bfloat16, on tensors without data."""
        a = torch.empty(8, 4, dtype=torch.bfloat16, device="meta")
        b = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
        wide = torch.empty(8, 12, device="meta")[:, :6]
        assert torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=wide) is wide
        added = torch.ops.aten.addmm.dtype_out(wide, a, b, torch.float32, out=wide)
        assert added is wide
        assert wide.stride() == (12, 1)

    def test_a_device_is_asked_once_whether_it_has_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A CPU has neither, which is how a device without them answers."""
        assert not gemm.gemms_write_float32(torch.device("cpu"))
        assert gemm.writes_wider("cuda")  # of a GPU that is not here
        asked = []

        def probe(device: torch.device) -> bool:
            asked.append(device)
            return False

        monkeypatch.setattr(gemm, "gemms_write_float32", probe)
        monkeypatch.setattr(gemm, "_WIDER", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        with FakeTensorMode():
            assert gemm.writes_wider("cuda")  # nothing can be multiplied here
        assert not asked
        for _ in range(2):
            assert not GemmDtypes.of(torch.bfloat16, "cuda").wider
        assert asked == [torch.device("cuda", 1)]
        assert not gemm.writes_wider("cpu")

    @pytest.mark.parametrize("train_weight", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize(("n", "v"), [(8192, 128_256), (70_000, 65_536)])
    def test_default_plan_runs_on_tensors_without_data(
        self,
        monkeypatch: pytest.MonkeyPatch,
        n: int,
        v: int,
        train_weight: bool,
        dtype: torch.dtype,
    ) -> None:
        """The loop at n x V x 4096 with the plan, dtypes and GEMMs of a GPU.

        70,000 tokens are more than a launch has rows of blocks, and n * V is beyond 2^32.
        """
        h = 4096
        monkeypatch.setattr("unilogit_kernels.fused_linear.gemm.writes_wider", lambda _: True)
        dtypes = GemmDtypes.of(dtype, "cuda")
        needs = Needs(hidden=True, weight=train_weight, bias=False)
        plan = plan_linear(LinearShape(n, h, v, dtypes, dtype, "cuda", needs), passes=2)
        products: list[tuple[torch.dtype, torch.dtype]] = []

        multiply = GemmDtypes.multiply

        def watched(
            chosen: GemmDtypes, a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False
        ) -> None:
            assert a.dtype == b.dtype == dtypes.operands
            assert a.shape[1] == b.shape[0]
            assert out.shape == (a.shape[0], b.shape[1])
            products.append((a.dtype, out.dtype))
            multiply(chosen, a, b, out, accumulate=accumulate)

        monkeypatch.setattr(GemmDtypes, "multiply", watched)
        with FakeTensorMode():
            hidden = torch.empty(n, h, dtype=dtype, device="meta")
            weight = torch.empty(v, h, dtype=dtype, device="meta")
            head = LinearHead(hidden, weight, None, dtypes)
            gradients = Gradients(
                torch.empty_like(hidden, dtype=dtypes.results),
                torch.empty_like(weight, dtype=dtypes.results) if train_weight else None,
                None,
            )
            rows = RowProblem(
                torch.empty(n, dtype=torch.int64, device="meta"), LogitTransform(), v, _NoKernels()
            )
            ones = torch.ones(n, device="meta")
            weighted = Weighted(CrossEntropy(), ones, torch.ones((), device="meta"))
            options = LinearOptions(compact=False)
            loss = ObjectiveLoss(rows, weighted)
            values = linear_loss((head,), loss, plan, gradients, options)
            assert values.shape == (n,)
        # Sums are float32; a finished gradient is written at once in its own dtype.
        assert {out for _, out in products} <= {torch.float32, dtypes.results}
        assert products


class _NoKernels(EagerKernels):
    """Row kernels that check what they are given and compute nothing."""

    def log_odds_update(self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN) -> None:
        assert tile.logits.shape[0] == tile.labels.shape[0] == state.shape[1]

    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        assert tile.logits.shape == out.shape
        assert out.shape[0] == tile.labels.shape[0] == state.shape[1] == slope.shape[0]


def test_kept_tiles_beyond_32_bits() -> None:
    """CASES 23: V * H and n * V beyond 2^32 entries; without data, offsets are what matters."""
    v, h, n = 1 << 21, 4096, 70_000
    gradient = torch.empty(v, h, dtype=torch.bfloat16, device="meta")
    kept = SavedInGradient(gradient, [torch.bfloat16], h, finished=True)
    columns = slice(v - 512, v)
    place = kept.place(slice(4000, h), columns)
    assert place is not None
    assert place[0].shape == (96, 512)
    assert place[0].storage_offset() == (v - 512) * h + 4000 * 512 > 1 << 32
    logits = SavedBeside([torch.empty(n * v, device="meta")], n)
    place = logits.place(slice(n - 5, n), columns)
    assert place is not None
    assert place[0].shape == (5, 512)
    assert place[0].storage_offset() == (v - 512) * n + (n - 5) * 512 > 1 << 32
