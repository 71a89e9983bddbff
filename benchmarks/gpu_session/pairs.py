"""The kernels for two models' rows, against the eager ones in float64."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from benchmarks.gpu_session.judge import Judge
from benchmarks.gpu_session.rows import EAGER, TRANSFORMS, chunks_of
from tests.support.layouts import assert_only_written, place
from unilogit_kernels.backends.contract import RowKernels, TilePair
from unilogit_kernels.bench.problems import DTYPES
from unilogit_kernels.maths import pair_state

_EXACT, _PLAIN = torch.float64, torch.float32


def _pair(
    size: tuple[int, int], a_dtype: str, b_dtype: str, device: str, *, labelled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(3)
    a = 3 * torch.randn(*size, generator=generator, device=device)
    b = a + torch.randn(*size, generator=generator, device=device)
    labels = torch.randint(0, size[1], (size[0],), generator=generator, device=device)
    if not labelled:
        labels.fill_(-1)
    return a.to(DTYPES[a_dtype]), b.to(DTYPES[b_dtype]), labels


def _fold(
    kernels: RowKernels,
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    transforms: tuple[str, str],
    dtype: torch.dtype,
    chunks: int = 1,
    layout: str = "contiguous",
) -> Tensor:
    state = pair_state.empty_state(a.shape[0], a.device, dtype)
    chosen = [TRANSFORMS[name] for name in transforms]
    for columns in chunks_of(a.shape[1], chunks):
        views = [x[:, columns] for x in (a, b)]
        if layout != "contiguous":
            views = [place(view, layout)[0] for view in views]
        pair = TilePair(views[0], views[1], labels, columns.start, *chosen)
        kernels.divergence_update(pair, state)
    return state


def check_pair_statistics(
    kernels: RowKernels,
    size: tuple[int, int],
    device: str,
    *,
    dtype: str,
    other: str,
    transform: str,
    other_transform: str,
    labelled: bool,
    layout: str,
    chunks: int,
) -> Judge:
    """The rests' divergence, and both log-odds."""
    judge = Judge()
    a, b, labels = _pair(size, dtype, other, device, labelled=labelled)
    transforms = (transform, other_transform)
    states = [
        _fold(kernels, a, b, labels, transforms, _PLAIN, chunks, layout),
        *(_fold(EAGER, a, b, labels, transforms, to) for to in (_EXACT, _PLAIN)),
    ]
    found, exact, plain = (
        (
            pair_state.rest_divergence(state),
            *pair_state.log_odds(state, labels if labelled else None, size[1]),
        )
        for state in states
    )
    for i, what in enumerate(("divergence", "log-odds of a", "log-odds of b")):
        judge.near(found[i], exact[i], plain[i], what, smallest_scale=1.0)
    return judge


def check_pair_gradient(
    kernels: RowKernels,
    size: tuple[int, int],
    device: str,
    *,
    dtype: str,
    other: str,
    transform: str,
    other_transform: str,
    student: str,
    out: str,
    layout: str,
    chunks: int,
) -> Judge:
    """Gradient rows of one of the two, of random coefficients. For `out` see `rows`."""
    judge = Judge()
    a, b, labels = _pair(size, dtype, other, device, labelled=True)
    transforms = (transform, other_transform)
    generator = torch.Generator(device).manual_seed(1)
    coefficients = torch.randn(4, size[0], generator=generator, device=device)
    if size[0] > 1:
        coefficients[:, -1] = 0.0
    states = [
        _fold(each, a, b, labels, transforms, to)
        for each, to in ((kernels, _PLAIN), (EAGER, _EXACT), (EAGER, _PLAIN))
    ]
    chosen = [TRANSFORMS[name] for name in transforms]
    own = a if student == "a" else b
    out_dtype = own.dtype if out == "in place" else DTYPES[out]
    which: Literal["a", "b"] = "a" if student == "a" else "b"
    for columns in chunks_of(size[1], chunks):
        parts = [x[:, columns] for x in (a, b)]
        exact, plain = (
            torch.empty(parts[0].shape, dtype=to, device=device) for to in (_EXACT, out_dtype)
        )
        pair = TilePair(parts[0], parts[1], labels, columns.start, *chosen)
        EAGER.divergence_gradient(pair, states[1], coefficients.double(), which, exact)
        EAGER.divergence_gradient(pair, states[2], coefficients, which, plain)
        placed = [place(x, layout) for x in parts]
        target, written = placed[0 if student == "a" else 1]
        if out != "in place":
            target, written = place(own[:, columns].to(out_dtype), layout)
        pair = TilePair(placed[0][0], placed[1][0], labels, columns.start, *chosen)
        kernels.divergence_gradient(pair, states[0], coefficients, which, target)
        judge.near(target, exact, plain, "gradient")
        if size[0] > 1:
            assert int(target[-1].count_nonzero()) == 0, "a row without coefficients is not 0"
        assert_only_written(target, written)
    return judge
