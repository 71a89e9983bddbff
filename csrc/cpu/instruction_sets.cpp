// The choice of the instruction set: the best that the processor has, or the one that is asked for.
#include <atomic>
#include <cstring>

#include "rows.h"

namespace unilogit {
namespace {

bool processor_supports(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (&kernels == &kAvx2Kernels) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (&kernels == &kAvx512Kernels) return avx512;
  if (&kernels == &kAvx512Bf16Kernels) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return &kernels == &kBaselineKernels;
}

// Best first.
const Kernels* const kInstructionSets[] = {
#if defined(__x86_64__)
    &kAvx512Bf16Kernels,
    &kAvx512Kernels,
    &kAvx2Kernels,
#endif
    &kBaselineKernels,
};

const Kernels* find_kernels(const char* name) {
  for (const Kernels* kernels : kInstructionSets) {
    if ((*name == '\0' || std::strcmp(name, kernels->name) == 0) && processor_supports(*kernels)) {
      return kernels;
    }
  }
  return nullptr;
}

std::atomic<const Kernels*> selected_kernels{nullptr};

}  // namespace

const Kernels& current_kernels() {
  const Kernels* kernels = selected_kernels.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = find_kernels("");
    selected_kernels.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

}  // namespace unilogit

using namespace unilogit;

std::int32_t unilogit_select_instruction_set(const char* name) {
  const Kernels* kernels = find_kernels(name);
  if (kernels == nullptr) return kUnilogitUnsupported;
  selected_kernels.store(kernels, std::memory_order_release);
  return kUnilogitOk;
}

const char* unilogit_instruction_set(void) { return current_kernels().name; }
