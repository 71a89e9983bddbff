// What callers take of the library beside the row kernels: its interface, memory, vector functions.
#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rows.h"

using namespace unilogit;

std::int32_t unilogit_interface(void) { return UNILOGIT_INTERFACE; }

void unilogit_stream_copy(const void* source, void* destination, int64_t bytes,
                          std::int32_t threads) {
  const Kernels& kernels = current_kernels();
  constexpr int64_t kPiece = int64_t{1} << 16;
  parallel_for(std::max(threads, 1), divide_up(bytes, kPiece), 1, [&](int64_t piece) {
    const int64_t first = piece * kPiece;
    kernels.stream_copy(static_cast<const char*>(source) + first,
                        static_cast<char*>(destination) + first, std::min(kPiece, bytes - first));
  });
}

void unilogit_populate([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes,
                       [[maybe_unused]] std::int32_t threads) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;            // MADV_POPULATE_WRITE, newer than many headers
  constexpr int64_t kPiece = int64_t{2} << 20;  // a huge page, which two threads must not share
  parallel_for(std::max(threads, 1), divide_up(bytes, kPiece), 1, [&](int64_t piece) {
    const int64_t first = piece * kPiece;
    madvise(static_cast<char*>(memory) + first,
            static_cast<std::size_t>(std::min(kPiece, bytes - first)), kPopulateWrite);
  });
#endif
}

void unilogit_exp(const float* x, float* result, int64_t count) {
  current_kernels().exp(x, result, count);
}

void unilogit_tanh(const float* x, float* result, float* slope, int64_t count) {
  current_kernels().tanh(x, result, slope, count);
}
