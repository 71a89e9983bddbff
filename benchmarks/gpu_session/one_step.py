"""A few steps and nothing else: what a profiler or a checker of memory is given to run.

`python -m benchmarks.gpu_session.one_step small|logits|linear [--backend triton]`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unilogit_kernels import kl_loss, linear_kl_loss, linear_unilogit_loss, unilogit_loss
from unilogit_kernels.bench.problems import Problem, Shape

Step = Callable[[], None]
_SMALL = ((5, 4099), (1100, 1031), (1, 50_257))
"""Rows that are split, swept, and a single one."""


def small(backend: str, device: str) -> Step:
    """Every kernel on rows that take every path."""

    def step() -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for n, v in _SMALL:
                logits, other = (
                    torch.randn(n, v, device=device).to(dtype).requires_grad_() for _ in range(2)
                )
                labels = torch.randint(0, v, (n,), device=device)
                labels[-1] = -100 if n > 1 else labels[-1]
                loss = unilogit_loss(logits, labels, backend=backend)
                loss = loss + unilogit_loss(logits, labels, softcap=5.0, backend=backend)
                (3 * loss + kl_loss(logits, other.detach(), labels, backend=backend)).backward()
            hidden, weight = (
                torch.randn(n, 64, device=device).to(dtype).requires_grad_() for n in (300, 5003)
            )
            labels = torch.randint(0, 5003, (300,), device=device)
            loss = linear_unilogit_loss(hidden, weight, labels, backend=backend)
            ref = hidden.detach().flip(0), weight.detach().flip(0)
            kl = linear_kl_loss(hidden, weight, *ref, labels, backend=backend)
            (loss + kl).backward()

    return step


def large(shape: Shape, backend: str | None, device: str) -> Step:
    """One training step of a shape."""
    problem = Problem(shape, device)
    loss: Callable[..., Tensor] = unilogit_loss if shape.h is None else linear_unilogit_loss

    def step() -> None:
        value = loss(*problem.operands, problem.labels, backend=backend)
        torch.autograd.grad(value, problem.trained)

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("small", "logits", "linear"))
    parser.add_argument("--backend", default="triton")
    given = parser.parse_args(arguments)
    shapes = {
        "logits": Shape(8192, 128_256, "bfloat16"),
        "linear": Shape(2048, 128_256, "bfloat16", 4096),
    }
    if given.what == "small":
        step = small(given.backend, "cuda")
    else:
        step = large(shapes[given.what], given.backend, "cuda")
        step()  # compiles
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
