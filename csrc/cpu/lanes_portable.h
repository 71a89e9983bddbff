// Vector primitives in the vector extensions of GCC and Clang: any processor; SSE2 on x86-64.
#pragma once

constexpr int kWidth = 4;
using Floats = float __attribute__((vector_size(16)));
using Words = std::uint32_t __attribute__((vector_size(16)));
using Halves = std::uint16_t __attribute__((vector_size(8)));

inline Floats broadcast(float x) { return Floats{x, x, x, x}; }

inline Words as_words(Floats a) { return reinterpret_cast<Words>(a); }

inline Floats as_floats(Words a) { return reinterpret_cast<Floats>(a); }

inline Words broadcast_word(std::uint32_t x) { return Words{x, x, x, x}; }

// condition's lanes are all ones or all zeros.
inline Words select(Words condition, Words yes, Words no) {
  return (condition & yes) | (~condition & no);
}

inline Words greater(Words a, Words b) { return reinterpret_cast<Words>(a > b); }

inline Floats load(const float* p) {
  Floats a;
  std::memcpy(&a, p, sizeof a);
  return a;
}

inline Words load_halves(const void* p) {
  Halves a;
  std::memcpy(&a, p, sizeof a);
  return __builtin_convertvector(a, Words);
}

inline Floats load(const bfloat16* p) { return as_floats(load_halves(p) << 16); }

inline Floats load(const float16* p) {
  const Words bits = load_halves(p);
  const Words magnitude = (bits & 0x7FFF) << 13;
  // A product by 2^112 moves the exponent's bias from 15 to 127, subnormal numbers included.
  const Words finite = as_words(as_floats(magnitude) * 0x1p112f);
  const Words special = magnitude | 0x7F800000;
  const Words is_special = greater(magnitude, broadcast_word(0x0F7FFFFF));
  return as_floats(select(is_special, special, finite) | (bits & 0x8000) << 16);
}

inline void store(float* p, Floats a) { std::memcpy(p, &a, sizeof a); }

// Fused where the target has it; the callers are accurate either way.
inline float fma(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__FP_FAST_FMAF)
  Floats result;
  for (int i = 0; i < kWidth; ++i) result[i] = fma(a[i], b[i], c[i]);
  return result;
#else
  return a * b + c;
#endif
}

// a > b ? a : b, hence b where either is NaN.
inline Floats max_or_second(Floats a, Floats b) {
#if defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return as_floats(select(reinterpret_cast<Words>(a > b), as_words(a), as_words(b)));
#endif
}

// a < b ? yes : no, lane by lane.
inline Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
  return as_floats(select(reinterpret_cast<Words>(a < b), as_words(yes), as_words(no)));
}

inline Floats copy_sign(Floats magnitude, Floats sign) {
  return as_floats((as_words(magnitude) & 0x7FFFFFFF) | (as_words(sign) & 0x80000000));
}

inline Floats absolute(Floats a) { return as_floats(as_words(a) & 0x7FFFFFFF); }

constexpr bool kLooksUpSixteen = false;

inline Floats look_up_sixteen(const float*, Floats bits) { return bits; }

// p * 2^n, -150 <= n <= 104. The low bits of `biased` hold n + 151, so that the power times 2^24
// is a normal number, and only the last product can be subnormal: one rounding.
inline Floats times_power_of_two(Floats p, Floats, Floats biased) {
  return p * as_floats(as_words(biased) << 23) * 0x1p-24f;
}

inline float reduce_max(Floats a) {
  const float low = a[0] > a[2] ? a[0] : a[2];
  const float high = a[1] > a[3] ? a[1] : a[3];
  return low > high ? low : high;
}

inline float reduce_add(Floats a) { return (a[0] + a[2]) + (a[1] + a[3]); }

template <bool kStream, class Bits>
inline void put_bits(void* p, Bits bits) {
  static_assert(sizeof bits == 16);
#if defined(__SSE2__)
  if constexpr (kStream) {
    _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(bits));
    return;
  }
#endif
  std::memcpy(p, &bits, sizeof bits);
}

// Stores 2 * kWidth values; streaming needs an address aligned to the vector.
template <bool kStream>
inline void put(float* p, Floats a, Floats b) {
  put_bits<kStream>(p, a);
  put_bits<kStream>(p + kWidth, b);
}

template <bool kStream>
inline void put_halves(void* p, Words a, Words b) {
  const Halves low = __builtin_convertvector(a, Halves);
  const Halves high = __builtin_convertvector(b, Halves);
  using Pair = std::uint16_t __attribute__((vector_size(16)));
  put_bits<kStream>(p, Pair{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]});
}

// Round to nearest even, in the lower half of each lane; NaN stays NaN.
inline Words rounded_to_bfloat16(Floats a) {
  const Words bits = as_words(a);
  const Words rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  const Words is_nan = reinterpret_cast<Words>(a != a);
  return select(is_nan, broadcast_word(0x7FC00000), rounded) >> 16;
}

inline Words rounded_to_float16(Floats a) {
  const Words sign = as_words(a) & 0x80000000;
  const Words magnitude = as_words(a) ^ sign;
  // The unit in the last place of 0.5 is that of subnormal half precision: the sum rounds.
  const Words subnormal = as_words(as_floats(magnitude) + 0.5f) - 0x3F000000;
  const Words normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  Words result = select(greater(broadcast_word(0x38800000), magnitude), subnormal, normal);
  result = select(greater(magnitude, broadcast_word(0x477FEFFF)), broadcast_word(0x7C00), result);
  result = select(greater(magnitude, broadcast_word(0x7F800000)), broadcast_word(0x7E00), result);
  return result | sign >> 16;
}

template <bool kStream>
inline void put(bfloat16* p, Floats a, Floats b) {
  put_halves<kStream>(p, rounded_to_bfloat16(a), rounded_to_bfloat16(b));
}

template <bool kStream>
inline void put(float16* p, Floats a, Floats b) {
  put_halves<kStream>(p, rounded_to_float16(a), rounded_to_float16(b));
}
