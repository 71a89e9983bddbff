#include "lanes_types.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

namespace unilogit {
namespace avx2 {
#include "lanes_avx2.h"
#include "row_math.h"
#include "row_kernels.h"
#include "array_kernels.h"
#include "pair_kernels.h"
#include "kernel_table.h"
}  // namespace avx2

const Kernels kAvx2Kernels = avx2::make_kernels("avx2", kAvx2Moments);
}  // namespace unilogit
#endif
