#include "lanes_types.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

namespace unilogit {
namespace avx2_moments {
#include "lanes_avx2.h"
#include "row_math.h"
#include "row_kernels.h"
#include "moment_kernels.h"
}  // namespace avx2_moments

const MomentKernels kAvx2Moments = avx2_moments::make_moment_kernels();
}  // namespace unilogit
#endif
