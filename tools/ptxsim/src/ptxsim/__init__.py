"""Executes PTX on the CPU, without a GPU, and checks every access: see README.md.

`ptxsim.triton_device` (Triton kernels) and `ptxsim.cuda_source` (CUDA sources) are imported from
their own modules, since they need triton and nvcc.
"""

from ptxsim.classes import InstructionClass
from ptxsim.counters import Counters, Launch, collect
from ptxsim.errors import KernelFaultError, PtxError, UnsupportedPtxError
from ptxsim.launch import ORDERS, PtxModule, Schedule

__all__ = [
    "ORDERS",
    "Counters",
    "InstructionClass",
    "KernelFaultError",
    "Launch",
    "PtxError",
    "PtxModule",
    "Schedule",
    "UnsupportedPtxError",
    "collect",
]
