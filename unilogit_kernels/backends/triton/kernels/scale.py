"""A tensor times a number that only the device knows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["factor"])
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """`values *= factor` in place; nothing is read or written where the factor is exactly 1."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            pointers = values + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            left = count - block.to(tl.int64) * BLOCK
            # A mask would make accesses single, so only the last block has one.
            if left >= BLOCK:
                x = tl.load(pointers)
                tl.store(pointers, (x.to(tl.float32) * scale).to(x.dtype))
            else:
                inside = tl.arange(0, BLOCK) < left
                x = tl.load(pointers, mask=inside)
                tl.store(pointers, (x.to(tl.float32) * scale).to(x.dtype), mask=inside)
