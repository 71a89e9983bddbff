"""Kernels written in PTX by hand, for what no compiler can be made to emit on demand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptxsim.arguments import ArgumentBlock, region_of
from ptxsim.counters import Launch
from ptxsim.launch import PtxModule, Schedule

_TEMPLATE = """
.version 8.4
.target sm_80
.address_size 64
{declarations}
.visible .entry snippet({parameters})
{{
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<16>;
  .reg .f32 %f<8>;
  .reg .b64 %rd<8>;
{loads}
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, %ctaid.x;
{body}
  ret;
}}
"""
PROLOGUE_MOVES = 2
"""Moves before the body, beside one load of an argument for each tensor."""


def module_of(body: str, tensors: int, declarations: str = "") -> PtxModule:
    """A kernel of so many tensors.

    Their addresses are in `%rd0`, `%rd1`..., the thread's index in `%r0`, its block's in `%r1`.
    """
    parameters = ", ".join(f".param .u64 .ptr .global .align 4 x{i}" for i in range(tensors))
    loads = "\n".join(f"  ld.param.u64 %rd{i}, [x{i}];" for i in range(tensors))
    return PtxModule(
        _TEMPLATE.format(declarations=declarations, parameters=parameters, loads=loads, body=body)
    )


def run(
    body: str,
    tensors: Sequence[torch.Tensor],
    *,
    threads: int = 32,
    blocks: int = 1,
    declarations: str = "",
    schedule: Schedule | None = None,
) -> Launch:
    """Execute the body on tensors that are called x0, x1..."""
    module = module_of(body, len(tensors), declarations)
    return launch(module, tensors, threads=threads, blocks=blocks, schedule=schedule)


def launch(
    module: PtxModule,
    tensors: Sequence[torch.Tensor],
    *,
    threads: int = 32,
    blocks: int = 1,
    schedule: Schedule | None = None,
) -> Launch:
    """Execute what `module_of` made."""
    arguments = ArgumentBlock()
    for tensor in tensors:
        arguments.append_pointer(tensor.data_ptr())
    regions = [region_of(tensor, f"x{i}") for i, tensor in enumerate(tensors)]
    return module.launch(
        "snippet", (blocks, 1, 1), (threads, 1, 1), bytes(arguments), regions, schedule=schedule
    )
