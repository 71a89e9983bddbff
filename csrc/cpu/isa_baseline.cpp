#include "lanes_types.h"

namespace unilogit {
namespace baseline {
#include "lanes_portable.h"
#include "row_math.h"
#include "row_kernels.h"
#include "array_kernels.h"
#include "pair_kernels.h"
#include "kernel_table.h"
}  // namespace baseline

const Kernels kBaselineKernels = baseline::make_kernels("baseline", kBaselineMoments);
}  // namespace unilogit
