"""A tensor times a number that only the device knows."""

import triton
import triton.language as tl

from unilogit_kernels.backends.triton.kernels.row_walk import ACCESS_BYTES


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["factor"])
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """`values *= factor` in place; nothing is read or written where the factor is exactly 1."""
    VECTOR: tl.constexpr = ACCESS_BYTES * 8 // values.dtype.element_ty.primitive_bitwidth
    VECTORS: tl.constexpr = BLOCK // VECTOR
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        vectors = count // VECTOR
        lanes = tl.arange(0, VECTOR)[None, :]
        for block in range(tl.program_id(0), tl.cdiv(vectors, VECTORS), tl.num_programs(0)):
            # A mask for each element would make accesses single.
            vector = block.to(tl.int64) * VECTORS + tl.arange(0, VECTORS)[:, None]
            inside = vector < vectors
            pointers = values + vector * VECTOR + lanes
            x = tl.load(pointers, mask=inside)
            tl.store(pointers, (x.to(tl.float32) * scale).to(x.dtype), mask=inside)
        if tl.program_id(0) == 0:
            # Wider than a vector, so that no two warps hold the same element.
            end = vectors.to(tl.int64) * VECTOR + tl.arange(0, VECTORS)
            x = tl.load(values + end, mask=end < count)
            tl.store(values + end, (x.to(tl.float32) * scale).to(x.dtype), mask=end < count)
