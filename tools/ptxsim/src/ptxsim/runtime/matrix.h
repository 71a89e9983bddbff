// ldmatrix, stmatrix and mma.sync m16n8kK, all of which the 32 lanes of a warp do together.
#pragma once

#include "launch.h"

namespace ptx {

// 8x8 matrices of 16-bit elements, `count` of them, two elements a lane and matrix.
void load_matrices(u32* destination, int count, bool transposed, u64 offset, int line);
void store_matrices(const u32* source, int count, bool transposed, u64 offset, int line);

enum class Element { f16, bf16, tf32, s8, u8 };
enum class Accumulator { f32, f16, s32, saturating_s32 };

// The registers of one lane.
struct Fragment {
    const u32* words;
    int count;
};

// d = a * b + c for a of 16 x k and b of k x 8. Sums are taken in double and rounded once; tensor
// cores round differently, in an order that nobody documents.
void multiply_matrices(int k, Element element, Accumulator accumulator, u32* d, Fragment a,
                       Fragment b, Fragment c, int line);

}  // namespace ptx
