#include "lanes_types.h"

#if defined(__x86_64__)
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define UNILOGIT_NATIVE_BFLOAT16

namespace unilogit {
namespace avx512bf16 {
#include "lanes_avx512.h"
#include "row_math.h"
#include "row_kernels.h"
#include "array_kernels.h"
#include "pair_kernels.h"
#include "kernel_table.h"
}  // namespace avx512bf16

const Kernels kAvx512Bf16Kernels = avx512bf16::make_kernels("avx512bf16", kAvx512Bf16Moments);
}  // namespace unilogit
#endif
