#include "lanes_types.h"

#if defined(__x86_64__)
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define UNILOGIT_NATIVE_BFLOAT16

namespace unilogit {
namespace avx512bf16_moments {
#include "lanes_avx512.h"
#include "row_math.h"
#include "row_kernels.h"
#include "moment_kernels.h"
}  // namespace avx512bf16_moments

const MomentKernels kAvx512Bf16Moments = avx512bf16_moments::make_moment_kernels();
}  // namespace unilogit
#endif
