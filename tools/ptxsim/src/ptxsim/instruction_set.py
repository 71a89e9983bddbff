"""The instructions that the executor knows, with every modifier it knows of each.

A modifier changes what an instruction means, so one that is not listed is refused, never ignored.
"""

from __future__ import annotations

import re

from ptxsim.errors import UnsupportedPtxError
from ptxsim.ptx_types import TYPE_NAMES
from ptxsim.syntax import Instruction


def _words(text: str) -> list[str]:
    return text.split()


_ROUNDED = "rn rz rm rp ftz sat"
_COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz"
_MEMORY = (
    "ca cg cs lu cv wb wt global shared local const param shared::cta volatile relaxed acquire "
    "release weak gpu cta sys cluster nc v2 v4 v8 mmio"
)
_ATOMIC = (
    "global shared shared::cta relaxed acquire release acq_rel gpu cta sys "
    "add min max and or xor exch cas inc dec noftz"
)
_MATRIX_MOVE = "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"

_MODIFIERS = {
    # arithmetic
    "add": f"{_ROUNDED} cc",
    "sub": f"{_ROUNDED} cc",
    "mul": f"{_ROUNDED} lo hi wide",
    "mad": f"{_ROUNDED} lo hi wide cc",
    "fma": f"{_ROUNDED}",
    "div": "rn rz rm rp full approx ftz",
    "rem": "",
    "min": "ftz NaN",
    "max": "ftz NaN",
    "abs": "ftz",
    "neg": "ftz",
    "copysign": "",
    "addc": "cc",
    "subc": "cc",
    "madc": "lo hi cc",
    "setp": _COMPARISONS,
    "selp": "",
    "testp": "infinite finite number notanumber normal",
    # bits
    **dict.fromkeys(_words("and or xor not shl shr prmt bfe bfi popc clz brev bfind lop3"), ""),
    "shf": "l r wrap clamp",
    # special functions
    **dict.fromkeys(_words("ex2 lg2 rcp sqrt rsqrt sin cos tanh"), "approx rn ftz"),
    # conversion
    "cvt": "rn rz rm rp rni rzi rmi rpi rna ftz sat relu",
    # movement
    "mov": "",
    "ld": _MEMORY,
    "ldu": _MEMORY,
    "st": _MEMORY,
    "cvta": "to global shared local const param shared::cta",
    "isspacep": "shared global shared::cta",
    "cp": "async ca cg shared global shared::cta commit_group wait_group wait_all",
    "atom": _ATOMIC,
    "red": _ATOMIC,
    # warps
    "shfl": "sync up down bfly idx",
    "vote": "sync ballot all any uni",
    "redux": "sync add min max and or xor abs NaN",
    "activemask": "",
    "ldmatrix": _MATRIX_MOVE,
    "stmatrix": _MATRIX_MOVE,
    "mma": "sync aligned row col satfinite",
    # control
    "bar": "sync cta warp aligned",
    "barrier": "sync cta aligned",
    "bra": "uni",
    "ret": "uni",
    "exit": "",
    "call": "uni",
    "trap": "",
    "brkpt": "",
}
MODIFIERS = {name: frozenset(_words(text)) for name, text in _MODIFIERS.items()}

_SCHEDULING = "griddepcontrol nanosleep setmaxnreg"
_CACHES = "prefetch prefetchu discard createpolicy"
HINTS = frozenset(_words(f"membar fence {_SCHEDULING} {_CACHES}"))
"""No value depends on these: caches, scheduling, and the order of memory, which is sequential."""

_MOST_TYPES = {"cvt": 2, "mma": 4, "add": 2, "sub": 2, "fma": 2}
"""How many types an opcode may name; one, unless it is listed."""

_CACHE_HINT = re.compile(r"L[12]::\w+")
_MATRIX_SHAPE = re.compile(r"m16n8k\d+")


def check_known(instruction: Instruction) -> None:
    """Raise unless the opcode and all of its modifiers are known.

    Raises:
        UnsupportedPtxError: Naming what is not.
    """
    name = instruction.name
    if name in HINTS:
        return
    if name not in MODIFIERS:
        raise UnsupportedPtxError(f"instruction `{instruction.opcode}` is not supported")
    types = 0
    for part in instruction.parts[1:]:
        if part in TYPE_NAMES:
            types += 1
        elif part not in MODIFIERS[name] and not _depends_on_opcode(name, part):
            raise UnsupportedPtxError(
                f"modifier .{part} of `{instruction.opcode}` is not supported"
            )
    if types > _MOST_TYPES.get(name, 1):
        raise UnsupportedPtxError(f"the types of `{instruction.opcode}` are not supported")


def _depends_on_opcode(name: str, part: str) -> bool:
    if name == "mma":
        return bool(_MATRIX_SHAPE.fullmatch(part))
    return name in ("ld", "ldu", "st", "cp") and bool(_CACHE_HINT.fullmatch(part))
