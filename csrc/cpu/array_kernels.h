// Plain arrays: a copy that bypasses the cache, and the vector functions by themselves. Included
// after row_kernels.h, inside the instruction set's namespace.
#pragma once

void stream_copy(const char* source, char* destination, int64_t bytes) {
  constexpr int64_t kChunk = kUnit * static_cast<int64_t>(sizeof(float));
  int64_t k = 0;
  for (; k + kChunk <= bytes; k += kChunk) {
    const float* from = reinterpret_cast<const float*>(source + k);
    put<true>(reinterpret_cast<float*>(destination + k), load(from), load(from + kWidth));
  }
  std::memcpy(destination + k, source + k, static_cast<std::size_t>(bytes - k));
}

void exp_array(const float* x, float* result, int64_t count) {
  for (int64_t k = 0; k < count; k += kWidth) {
    float lanes[kWidth];
    store(lanes, exponential(gather(x + k, 1, count - k)));
    for (int64_t i = 0; i < kWidth && k + i < count; ++i) result[k + i] = lanes[i];
  }
}

void tanh_array(const float* x, float* result, float* slope, int64_t count) {
  for (int64_t k = 0; k < count; k += kWidth) {
    const Tanh tanh = hyperbolic_tangent(gather(x + k, 1, count - k));
    float values[kWidth], slopes[kWidth];
    store(values, tanh.value);
    store(slopes, tanh.slope);
    for (int64_t i = 0; i < kWidth && k + i < count; ++i) {
      result[k + i] = values[i];
      slope[k + i] = slopes[i];
    }
  }
}
