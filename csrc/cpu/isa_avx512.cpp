#include "lanes_types.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace unilogit {
namespace avx512 {
#include "lanes_avx512.h"
#include "row_math.h"
#include "row_kernels.h"
#include "array_kernels.h"
#include "pair_kernels.h"
#include "kernel_table.h"
}  // namespace avx512

const Kernels kAvx512Kernels = avx512::make_kernels("avx512", kAvx512Moments);
}  // namespace unilogit
#endif
