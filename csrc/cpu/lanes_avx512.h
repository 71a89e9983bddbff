// Vector primitives on AVX-512 (F, BW, DQ, VL), and BF16 where UNILOGIT_NATIVE_BFLOAT16 is defined.
#pragma once

constexpr int kWidth = 16;
using Floats = __m512;

inline Floats broadcast(float x) { return _mm512_set1_ps(x); }

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }

inline Floats load(const bfloat16* p) {
  // One permutation puts every half-word into the upper half of its lane.
  alignas(64) static constexpr std::uint16_t kTwice[32] = {
      0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
      8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, _mm512_load_si512(kTwice),
                                                            _mm512_castsi256_si512(bits)));
}

inline Floats load(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// a > b ? a : b, hence b where either is NaN.
inline Floats max_or_second(Floats a, Floats b) { return _mm512_max_ps(a, b); }

// a < b ? yes : no, lane by lane.
inline Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

inline Floats copy_sign(Floats magnitude, Floats sign) {
  const __m512i mask = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign),
                                                       _mm512_castps_si512(magnitude), 0xCA));
}

inline Floats absolute(Floats a) { return _mm512_abs_ps(a); }

constexpr bool kLooksUpSixteen = true;

// table[the lowest 4 bits of each lane of `bits`]
inline Floats look_up_sixteen(const float* table, Floats bits) {
  return _mm512_permutexvar_ps(_mm512_castps_si512(bits), _mm512_load_ps(table));
}

// p * 2^floor(n) with one rounding, subnormal results included.
inline Floats times_power_of_two(Floats p, Floats n, Floats) { return _mm512_scalef_ps(p, n); }

inline float reduce_max(Floats a) { return _mm512_reduce_max_ps(a); }

inline float reduce_add(Floats a) { return _mm512_reduce_add_ps(a); }

template <bool kStream>
inline void put_bits(void* p, __m512i bits) {
  if constexpr (kStream) {
    _mm512_stream_si512(static_cast<__m512i*>(p), bits);
  } else {
    _mm512_storeu_si512(p, bits);
  }
}

// Stores 2 * kWidth values; streaming needs an address aligned to the vector.
template <bool kStream>
inline void put(float* p, Floats a, Floats b) {
  put_bits<kStream>(p, _mm512_castps_si512(a));
  put_bits<kStream>(p + kWidth, _mm512_castps_si512(b));
}

#if defined(UNILOGIT_NATIVE_BFLOAT16)
// Flushes subnormal results to zero, unlike the conversion below.
template <bool kStream>
inline void put(bfloat16* p, Floats a, Floats b) {
  put_bits<kStream>(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}
#else
// Round to nearest even in the upper half of each lane; NaN stays NaN.
inline __m512i rounded_to_bfloat16(Floats a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000));
}

template <bool kStream>
inline void put(bfloat16* p, Floats a, Floats b) {
  alignas(64) static constexpr std::uint16_t kUpperHalves[32] = {
      1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  put_bits<kStream>(
      p, _mm512_permutex2var_epi16(rounded_to_bfloat16(a), _mm512_load_si512(kUpperHalves),
                                   rounded_to_bfloat16(b)));
}
#endif

template <bool kStream>
inline void put(float16* p, Floats a, Floats b) {
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(a, kRounding));
  put_bits<kStream>(p, _mm512_inserti64x4(low, _mm512_cvtps_ph(b, kRounding), 1));
}

// The largest of many values, 32 at a time, on bit patterns turned into integers of the same order.
// NaN is left out or wins.
#define UNILOGIT_ORDERED_BFLOAT16
class OrderedBfloat16Max {
 public:
  // Explicit: GCC compiles implicit constructors for the wrong target.
  OrderedBfloat16Max() {
    constexpr int kTwoMinusInfinities = static_cast<int>(0xFF80FF80);
    max_ = ordered(_mm512_set1_epi32(kTwoMinusInfinities));
  }

  void add(const bfloat16* p) { max_ = _mm512_max_epi16(ordered(_mm512_loadu_si512(p)), max_); }

  float result() const {
    const __m512i bits = ordered(max_);
    return reduce_max(max_or_second(
        _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
        _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(INT32_MIN >> 15)))));
  }

 private:
  // Flips the magnitude of negative numbers; its own inverse.
  static __m512i ordered(__m512i bits) {
    return _mm512_ternarylogic_epi32(bits, _mm512_srai_epi16(bits, 15),
                                     _mm512_set1_epi32(0x7FFF7FFF), 0x78);
  }

  __m512i max_;
};
