// What the kernels need of a compiler: number formats, 16-byte words, fast functions. Free of every
// header, so that one source goes through nvcc, NVRTC and, for tests, a C++ compiler for CPUs.
#pragma once

#define UNILOGIT_DEVICE __device__ __forceinline__

namespace unilogit {

using int64 = long long;
using uint16 = unsigned short;
using uint32 = unsigned int;
using address = unsigned long long;

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr uint32 kAllLanes = 0xffffffffu;

// One access of a thread moves this much at once.
constexpr int kAccessBytes = 16;

struct alignas(16) Words4 {
  uint32 words[4];
};

struct alignas(8) Words2 {
  uint32 words[2];
};

// ---- bits and floats ---------------------------------------------------------------------------

UNILOGIT_DEVICE float float_of_bits(uint32 bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

UNILOGIT_DEVICE uint32 bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32 bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// An integer that lies among floats: a float counts to 2^24 only.
UNILOGIT_DEVICE int int_of_bits(float bits) { return static_cast<int>(bits_of_float(bits)); }
UNILOGIT_DEVICE float bits_of_int(int value) { return float_of_bits(static_cast<uint32>(value)); }

// Either as it lies there.
UNILOGIT_DEVICE float word_of(float value) { return value; }
UNILOGIT_DEVICE float word_of(int value) { return bits_of_int(value); }
UNILOGIT_DEVICE void read_word(float& value, float word) { value = word; }
UNILOGIT_DEVICE void read_word(int& value, float word) { value = int_of_bits(word); }

UNILOGIT_DEVICE float infinity() { return float_of_bits(0x7f800000u); }
UNILOGIT_DEVICE float not_a_number() { return float_of_bits(0x7fffffffu); }

// 2^t to 2 units in the last place; results below the normal numbers are 0.
UNILOGIT_DEVICE float power_of_two(float t) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#else
  const float result = exp2f(t);
  return result < 0x1p-126f ? 0.0f : result;
#endif
}

// a / b to 2 units in the last place, for b from 2^-126 to 2^126.
UNILOGIT_DEVICE float quick_quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// a + b of what has been rounded: no multiplication before it is fused into the addition.
UNILOGIT_DEVICE float sum_of_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// ---- element types -----------------------------------------------------------------------------

// A type says how a value is stored, how many of them fill a 32-bit word, and converts words.
struct Float32 {
  using Stored = float;
  static constexpr int kPerWord = 1;

  static UNILOGIT_DEVICE float load(float stored) { return stored; }
  static UNILOGIT_DEVICE float store(float value) { return value; }
  static UNILOGIT_DEVICE void unpack(uint32 word, float* values) {
    values[0] = float_of_bits(word);
  }
  static UNILOGIT_DEVICE uint32 pack(const float* values) { return bits_of_float(values[0]); }
};

struct Bfloat16 {
  using Stored = uint16;
  static constexpr int kPerWord = 2;

  static UNILOGIT_DEVICE float load(uint16 stored) {
    return float_of_bits(static_cast<uint32>(stored) << 16);
  }
  static UNILOGIT_DEVICE uint16 store(float value) {
    const float pair[2] = {value, 0.0f};
    return static_cast<uint16>(pack(pair));
  }
  static UNILOGIT_DEVICE void unpack(uint32 word, float* values) {
    values[0] = float_of_bits(word << 16);
    values[1] = float_of_bits(word & 0xffff0000u);
  }
  static UNILOGIT_DEVICE uint32 pack(const float* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    return rounded(values[0]) | rounded(values[1]) << 16;
#endif
  }

 private:
  // To nearest, ties to even; NaN stays NaN.
  static UNILOGIT_DEVICE uint32 rounded(float value) {
    if (value != value) return 0x7fffu;
    const uint32 bits = bits_of_float(value);
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
};

struct Float16 {
  using Stored = uint16;
  static constexpr int kPerWord = 2;

  static UNILOGIT_DEVICE float load(uint16 stored) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored));
    return value;
#else
    _Float16 half;
    __builtin_memcpy(&half, &stored, sizeof half);
    return static_cast<float>(half);
#endif
  }
  static UNILOGIT_DEVICE uint16 store(float value) {
    uint16 stored;
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored) : "f"(value));
#else
    const _Float16 half = static_cast<_Float16>(value);
    __builtin_memcpy(&stored, &half, sizeof half);
#endif
    return stored;
  }
  static UNILOGIT_DEVICE void unpack(uint32 word, float* values) {
    values[0] = load(static_cast<uint16>(word));
    values[1] = load(static_cast<uint16>(word >> 16));
  }
  static UNILOGIT_DEVICE uint32 pack(const float* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    return store(values[0]) | static_cast<uint32>(store(values[1])) << 16;
#endif
  }
};

}  // namespace unilogit
