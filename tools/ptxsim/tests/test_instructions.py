"""Instructions one by one against their definition, and those that must be refused."""

from __future__ import annotations

import math
import struct

import pytest
import torch

import ptxsim.launch
import snippets
from ptxsim import KernelFaultError, UnsupportedPtxError
from ptxsim.parser import parse
from ptxsim.syntax import Instruction


def result(body: str) -> int:
    """The 64 bits that the body leaves in %rd7."""
    out = torch.zeros(1, dtype=torch.int64)
    snippets.run(body + "\n  st.global.b64 [%rd0], %rd7;", [out], threads=1)
    return int(out.item()) & (1 << 64) - 1


def result32(body: str) -> int:
    """The 32 bits that the body leaves in %r7."""
    return result(body + "\n  cvt.u64.u32 %rd7, %r7;")


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def float_bits(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("bfe.u32 %r7, 0x12345678, 8, 12;", 0x456),
        ("bfe.s32 %r7, 0x12345678, 4, 4;", 0x7),
        ("bfe.s32 %r7, 0x00000F00, 8, 4;", 0xFFFFFFFF),
        ("bfe.s32 %r7, 0x80000000, 28, 8;", 0xFFFFFFF8),
        ("bfe.u32 %r7, 0x12345678, 8, 0;", 0),
        ("bfe.u32 %r7, 0x12345678, 40, 8;", 0),
        ("bfi.b32 %r7, 0xAB, 0x12345678, 8, 8;", 0x1234AB78),
        ("bfi.b32 %r7, 0xAB, 0x12345678, 28, 8;", 0xB2345678),
        ("prmt.b32 %r7, 0x33221100, 0x77665544, 0x7531;", 0x77553311),
        ("prmt.b32 %r7, 0x80, 0, 0x8888;", 0xFFFFFFFF),
        ("lop3.b32 %r7, 0xFF00, 0x0FF0, 0x00FF, 0x96;", 0xFF00 ^ 0x0FF0 ^ 0x00FF),
        ("shf.l.wrap.b32 %r7, 0x80000000, 0x1, 33;", 0x3),
        ("shf.r.clamp.b32 %r7, 0x80000000, 0x1, 40;", 0x1),
        ("shl.b32 %r7, 1, 32;", 0),
        ("shr.s32 %r7, 0x80000000, 99;", 0xFFFFFFFF),
        ("shr.u32 %r7, 0x80000000, 31;", 1),
        ("brev.b32 %r7, 0x1;", 0x80000000),
        ("clz.b32 %r7, 0x1;", 31),
        ("clz.b32 %r7, 0;", 32),
        ("popc.b32 %r7, 0xF0F;", 8),
        ("bfind.u32 %r7, 0x100;", 8),
        ("bfind.s32 %r7, -1;", 0xFFFFFFFF),
        ("mul.hi.s32 %r7, -1, 2;", 0xFFFFFFFF),
        ("mul.hi.u32 %r7, 0xFFFFFFFF, 2;", 1),
        ("mad.lo.s32 %r7, -3, 5, 1;", -14 & 0xFFFFFFFF),
        ("div.s32 %r7, -7, 2;", -3 & 0xFFFFFFFF),
        ("div.s32 %r7, 0x80000000, -1;", 0x80000000),
        ("rem.s32 %r7, -7, 2;", -1 & 0xFFFFFFFF),
        ("div.u32 %r7, 7, 0;", 0xFFFFFFFF),
        ("abs.s32 %r7, -5;", 5),
        ("min.s32 %r7, -1, 1;", 0xFFFFFFFF),
        ("min.u32 %r7, -1, 1;", 1),
        ("cvt.sat.s8.s32 %r7, 300;", 127),
        ("add.cc.u32 %r6, 0xFFFFFFFF, 1; addc.u32 %r7, 1, 1;", 3),
        ("sub.cc.u32 %r6, 0, 1; subc.u32 %r7, 5, 1;", 3),
        ("mov.b32 {%h0, %h1}, 0x12345678; mov.b32 %r7, {%h1, %h0};", 0x56781234),
        ("vote.sync.ballot.b32 %r7, 1, 1;", 1),
        ("redux.sync.add.s32 %r7, 9, 1;", 9),
        ("activemask.b32 %r7;", 1),
        ("setp.lt.s32 %p1|%p2, -1, 1; selp.b32 %r7, 1, 2, %p2;", 2),
        ("setp.gt.and.u32 %p1, -1, 1, !%p0; selp.b32 %r7, 1, 2, %p1;", 2),
    ],
)
def test_integers(instruction: str, expected: int) -> None:
    assert result32(f"  setp.eq.u32 %p0, 0, 0;\n  {instruction}") == expected


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.rn.f32 %f7, {1}, {nan};", math.nan),
        ("max.f32 %f7, {1}, {nan};", 1.0),
        ("max.NaN.f32 %f7, {1}, {nan};", math.nan),
        ("min.f32 %f7, {inf}, {1};", 1.0),
        ("fma.rn.f32 %f7, {1}, {1}, {1};", 2.0),
        ("add.rz.f32 %f7, {1}, {tiny};", 1.0),
        ("add.rp.f32 %f7, {1}, {tiny};", 1 + 2.0**-23),
        ("add.sat.f32 %f7, {1}, {1};", 1.0),
        ("mul.ftz.f32 %f7, {tiny}, {tiny};", 0.0),
        ("ex2.approx.ftz.f32 %f7, {1};", 2.0),
        ("lg2.approx.f32 %f7, {1};", 0.0),
        ("rcp.approx.f32 %f7, {inf};", 0.0),
        ("sqrt.rn.f32 %f7, {1};", 1.0),
        ("cvt.rn.f32.s32 %f7, -3;", -3.0),
        ("cvt.rn.bf16.f32 %h0, {third}; cvt.f32.bf16 %f7, %h0;", 0.333984375),
        ("cvt.rz.bf16.f32 %h0, {third}; cvt.f32.bf16 %f7, %h0;", 0.33203125),
        ("cvt.rn.f16.f32 %h0, {third}; cvt.f32.f16 %f7, %h0;", 0.333251953125),
        ("cvt.rni.f32.f32 %f7, {third};", 0.0),
        ("cvt.rpi.f32.f32 %f7, {third};", 1.0),
        ("copysign.f32 %f7, {minus}, {third};", -1 / 3),
        ("setp.neu.f32 %p1, {nan}, {1}; selp.f32 %f7, {1}, {inf}, %p1;", 1.0),
        ("setp.ne.f32 %p1, {nan}, {1}; selp.f32 %f7, {1}, {inf}, %p1;", math.inf),
    ],
)
def test_floats(instruction: str, expected: float) -> None:
    constants = {
        "1": 1.0,
        "nan": math.nan,
        "inf": math.inf,
        "tiny": 2.0**-100,
        "third": 1 / 3,
        "minus": -2.0,
    }
    for name, value in constants.items():
        instruction = instruction.replace(f"{{{name}}}", float_bits(value))
    bits = result32(f"  {instruction}\n  mov.b32 %r7, %f7;")
    assert as_float(bits) == pytest.approx(expected, rel=1e-7, abs=0, nan_ok=True)


@pytest.mark.parametrize(("value", "expected"), [(2.5, 2), (-1.0, 0), (1e20, 2**32 - 1)])
def test_float_to_integer_saturates(value: float, expected: int) -> None:
    assert result32(f"  cvt.rni.u32.f32 %r7, {float_bits(value)};") == expected
    assert result32(f"  cvt.rni.u32.f32 %r7, {float_bits(math.nan)};") == 0


def test_wide_arithmetic() -> None:
    assert result("  mul.wide.s32 %rd7, -3, 5;") == (-15) & (1 << 64) - 1
    assert result("  mad.wide.u32 %rd7, 0xFFFFFFFF, 2, 1;") == 2 * 0xFFFFFFFF + 1
    assert result("  mul.hi.u64 %rd7, 0xFFFFFFFFFFFFFFFF, 16;") == 15
    assert result("  rem.s64 %rd7, -7, 2;") == (1 << 64) - 1


def test_packed_halves() -> None:
    """bf16x2: 1.0 + 2.0 and 0.5 + 0.25, the first in the upper half."""
    assert result32("  add.rn.bf16x2 %r7, 0x3F803F00, 0x40003E80;") == 0x40403F40
    assert result32("  cvt.rn.bf16x2.f32 %r7, 0f3F800000, 0f40000000;") == 0x3F804000


def test_shuffles() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    body = """
  shfl.sync.{mode}.b32 %r2|%p1, %r0, {lane}, {clamp}, -1;
  selp.b32 %r3, %r2, -1, %p1;
  mul.wide.u32 %rd2, %r0, 4;
  add.s64 %rd3, %rd0, %rd2;
  st.global.b32 [%rd3], %r3;
"""
    lanes = range(32)
    for mode, lane, clamp, expected in (
        ("bfly", 3, 31, [i ^ 3 for i in lanes]),
        ("up", 1, 0, [i - 1 if i else -1 for i in lanes]),
        ("down", 2, 31, [i + 2 if i < 30 else -1 for i in lanes]),
        ("idx", 5, 31, [5] * 32),
        ("idx", 5, 0x181F, [5 + i // 8 * 8 for i in lanes]),
    ):
        snippets.run(body.format(mode=mode, lane=lane, clamp=clamp), [out])
        assert out.tolist() == expected, mode


def test_variables_of_the_module() -> None:
    table = ".const .align 4 .b32 table[3] = {10, 20, 30};\n.global .align 4 .b32 cell = 7;"
    body = """
  ld.const.b32 %r2, [table+8];
  mov.u64 %rd1, cell;
  ld.global.b32 %r3, [%rd1];
  add.s32 %r4, %r2, %r3;
  st.global.b32 [%rd0], %r4;
"""
    out = torch.zeros(1, dtype=torch.int32)
    snippets.run(body, [out], threads=1, declarations=table)
    assert out.item() == 37


def test_faster_code_goes_on_with_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that has run for long is compiled once more, and counts on from where it was."""
    monkeypatch.setattr(ptxsim.launch, "PATIENCE", 0.0)
    body = """
  mov.u64 %rd1, cell;
  ld.global.b32 %r2, [%rd1];
  add.s32 %r2, %r2, 1;
  st.global.b32 [%rd1], %r2;
  st.global.b32 [%rd0], %r2;
"""
    module = snippets.module_of(body, 1, ".global .align 4 .b32 cell = 7;")
    out, libraries = torch.zeros(1, dtype=torch.int32), set()
    for expected in (8, 9, 10):
        snippets.launch(module, [out], threads=1)
        assert out.item() == expected
        libraries.add(module._library)
    assert len(libraries) == 2


def test_cache_policies_change_nothing() -> None:
    body = """
  createpolicy.fractional.L2::evict_last.b64 %rd1, 1.0;
  ld.global.L1::evict_last.L2::cache_hint.b32 {%r2}, [%rd0+4], %rd1;
  st.global.L1::evict_first.L2::cache_hint.b32 [%rd0], {%r2}, %rd1;
"""
    x = torch.tensor([1, 2], dtype=torch.int32)
    snippets.run(body, [x], threads=1)
    assert x.tolist() == [2, 2]


def test_generic_addresses() -> None:
    """Shared memory through a generic address is checked as shared memory."""
    body = """
  mov.u32 %r2, memory;
  cvt.u64.u32 %rd1, %r2;
  cvta.shared.u64 %rd2, %rd1;
  isspacep.shared %p1, %rd2;
  selp.b32 %r3, 5, 6, %p1;
  st.b32 [%rd2], %r3;
  ld.shared.b32 %r4, [memory];
  st.b32 [%rd0], %r4;
"""
    out = torch.zeros(1, dtype=torch.int32)
    declarations = ".shared .align 16 .b32 memory[4];"
    snippets.run(body, [out], threads=1, declarations=declarations)
    assert out.item() == 5


def test_registers_of_inner_blocks() -> None:
    """Inline assembly reuses names, with other types."""
    body = """
  {
    .reg .b32 inner;
    mov.b32 inner, 0x12345678;
    mov.b32 %r2, inner;
  }
  {
    .reg .b16 inner;
    cvt.u16.u32 inner, %r2;
    cvt.u32.u16 %r7, inner;
  }
"""
    assert result32(body) == 0x5678


@pytest.mark.parametrize(
    ("instruction", "match"),
    [
        ("wgmma.fence.sync.aligned;", "wgmma.fence"),
        ("cp.async.bulk.commit_group;", "modifier .bulk"),
        ("tcgen05.wait::ld.sync.aligned;", "tcgen05"),
        ("mbarrier.init.shared::cta.b64 [%r0], 1;", "mbarrier"),
        ("add.rna.f32 %f1, %f1, %f1;", "modifier .rna"),
        ("cvt.rm.f16.f32 %h0, %f0;", "cvt.rm.f16.f32"),
        ("ld.global.v16.b32 %r0, [%rd0];", "modifier .v16"),
        ("bar.red.popc.u32 %r0, 0, %p0;", "modifier .red"),
        ("mov.u32 %r0, %envreg0;", "%envreg0"),
        ("brx.idx %r0, targets;", "brx.idx"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f0}, {%r0}, {%r0}, {%f0};", "m8n8k4"),
    ],
)
def test_refused(instruction: str, match: str) -> None:
    with pytest.raises(UnsupportedPtxError, match=match):
        snippets.module_of(f"  {instruction}", 1)


def test_calls_are_refused_where_they_are_reached() -> None:
    body = """
  setp.lt.u32 %p1, %r0, {threads};
  @%p1 bra done;
  {{
    .param .b32 argument;
    st.param.b32 [argument], %r0;
    call.uni helper, (argument);
  }}
done:
"""
    snippets.run(body.format(threads=32), [])
    with pytest.raises(KernelFaultError, match="call of helper"):
        snippets.run(body.format(threads=31), [])


def test_traps() -> None:
    with pytest.raises(KernelFaultError, match=r"trap; thread \(0,0,0\)"):
        snippets.run("  trap;", [])


def test_parsing_keeps_the_source_line() -> None:
    text = """
.visible .entry k(.param .u64 .ptr .global .align 16 a, .param .align 8 .b8 b[12], .param .u32 c)
.maxntid 128
{
  .reg .pred %p<2>;
  .loc 1 42 7
  @!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];
}
"""
    (kernel,) = parse(text).kernels
    assert [(p.offset, p.size) for p in kernel.parameters.values()] == [(0, 8), (8, 12), (20, 4)]
    assert kernel.registers == {"%p0": "pred", "%p1": "pred"}
    (instruction,) = kernel.statements
    assert instruction == Instruction(
        "ld.global.v2.b32", ("{%r1, %r2}", "[%rd1+8]"), "%p1", guard_negated=True, line=42
    )
