// Vector primitives on AVX2 with FMA and F16C.
#pragma once

constexpr int kWidth = 8;
using Floats = __m256;

inline Floats broadcast(float x) { return _mm256_set1_ps(x); }

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }

inline Floats load(const bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Floats load(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// a > b ? a : b, hence b where either is NaN.
inline Floats max_or_second(Floats a, Floats b) { return _mm256_max_ps(a, b); }

// a < b ? yes : no, lane by lane.
inline Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

inline Floats copy_sign(Floats magnitude, Floats sign) {
  const Floats mask = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_and_ps(mask, sign), _mm256_andnot_ps(mask, magnitude));
}

inline Floats absolute(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

constexpr bool kLooksUpSixteen = false;

inline Floats look_up_sixteen(const float*, Floats bits) { return bits; }

// p * 2^n, -150 <= n <= 104. The low bits of `biased` hold n + 151, so that the power times 2^24
// is a normal number, and only the last product can be subnormal: one rounding.
inline Floats times_power_of_two(Floats p, Floats, Floats biased) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
  return p * _mm256_castsi256_ps(exponent) * _mm256_set1_ps(0x1p-24f);
}

inline float reduce_max(Floats a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
}

inline float reduce_add(Floats a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}

template <bool kStream>
inline void put_bits(void* p, __m256i bits) {
  if constexpr (kStream) {
    _mm256_stream_si256(static_cast<__m256i*>(p), bits);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
  }
}

// Stores 2 * kWidth values; streaming needs an address aligned to the vector.
template <bool kStream>
inline void put(float* p, Floats a, Floats b) {
  put_bits<kStream>(p, _mm256_castps_si256(a));
  put_bits<kStream>(p + kWidth, _mm256_castps_si256(b));
}

// Round to nearest even, in the lower half of each lane; NaN stays NaN.
inline __m256i rounded_to_bfloat16(Floats a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), is_nan), 16);
}

template <bool kStream>
inline void put(bfloat16* p, Floats a, Floats b) {
  const __m256i interleaved = _mm256_packus_epi32(rounded_to_bfloat16(a), rounded_to_bfloat16(b));
  put_bits<kStream>(p, _mm256_permute4x64_epi64(interleaved, _MM_SHUFFLE(3, 1, 2, 0)));
}

template <bool kStream>
inline void put(float16* p, Floats a, Floats b) {
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  put_bits<kStream>(p,
                    _mm256_set_m128i(_mm256_cvtps_ph(b, kRounding), _mm256_cvtps_ph(a, kRounding)));
}
