#include "lanes_types.h"

namespace unilogit {
namespace baseline_moments {
#include "lanes_portable.h"
#include "row_math.h"
#include "row_kernels.h"
#include "moment_kernels.h"
}  // namespace baseline_moments

const MomentKernels kBaselineMoments = baseline_moments::make_moment_kernels();
}  // namespace unilogit
