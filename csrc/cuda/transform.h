// What a model does to its logits, and the functions that take.
#pragma once

#include "platform.h"

namespace unilogit {

constexpr float kLog2E = 1.4426950408889634f;

constexpr float kLn2 = 0.6931471805599453f;

// From here on numbers are at least 128 apart: exponentials of their differences are 0 or 1. Below,
// the product with log2(e) is rounded by less than 2^6, so that no sum of its powers overflows.
constexpr float kAllOrNothing = 1.4e9f;
constexpr float kLowest = -3.4028234663852886e38f;

// Below it 2^e is 1 + e log(2): what is left out is no digit of a float.
constexpr float kSmallExcess = 0x1p-13f;

// How a kept logit becomes a binary exponent of exp(z - max), in one instruction.
struct Exponents {
  float factor;
  float shift;

  UNILOGIT_DEVICE float of(float kept) const { return fmaf(kept, factor, shift); }
};

// sum * 2^excess.
UNILOGIT_DEVICE float with_excess(float sum, float excess) {
  return fabsf(excess) < kSmallExcess ? fmaf(sum, excess * kLn2, sum) : sum * power_of_two(excess);
}

UNILOGIT_DEVICE float exponential(float t) { return power_of_two(t * kLog2E); }

// ---- what a model does to its logits -----------------------------------------------------------

// tanh(t) and its derivative 1 - tanh^2, neither of which cancels: below 5/8 an odd polynomial
// (Cephes), above it 1 - w with w = 2 q / (1 + q), q = exp(-2|t|), and w (2 - w).
struct Tanh {
  float value;
  float slope;
};

UNILOGIT_DEVICE Tanh hyperbolic_tangent(float t) {
  const float magnitude = fabsf(t);
  const float q = power_of_two(magnitude * (-2.0f * kLog2E));
  const float w = quick_quotient(2.0f * q, 1.0f + q);
  const float square = magnitude * magnitude;
  float p = fmaf(-5.70498872745e-3f, square, 2.06390887954e-2f);
  p = fmaf(p, square, -5.37397155531e-2f);
  p = fmaf(p, square, 1.33314422036e-1f);
  p = fmaf(p, square, -3.33332819422e-1f);
  const float small = fmaf(p * square, magnitude, magnitude);
  const bool is_small = magnitude < 0.625f;
  const float value = is_small ? small : 1.0f - w;
  const float slope = is_small ? 1.0f - small * small : w * (2.0f - w);
  return {copysignf(value, t), slope};
}

// `z = scale * x`, or with a cap `z = softcap * tanh(scale * x)`, whose `scale` the host has
// divided by the cap. The linear one is never carried out by itself: it is folded into the
// subtraction of the maximum, which takes no instruction more than the subtraction alone.
template <bool kCapped>
struct Transform {
  float scale;
  float softcap;
  float derivative;  // dz/dx but for the cap's slope: the undivided scale

  // What a raw logit is kept as.
  UNILOGIT_DEVICE float staged(float x) const {
    return kCapped ? softcap * hyperbolic_tangent(x * scale).value : x;
  }
  // The same, and the slope of the cap.
  UNILOGIT_DEVICE float staged(float x, float& cap_slope) const {
    cap_slope = 1.0f;
    if (!kCapped) return x;
    const Tanh tanh = hyperbolic_tangent(x * scale);
    cap_slope = tanh.slope;
    return softcap * tanh.value;
  }
  // z - shift of a kept logit.
  UNILOGIT_DEVICE float shifted(float kept, float shift) const {
    return kCapped ? kept - shift : fmaf(kept, scale, -shift);
  }
  // What exponents are of, without a cap: from kAllOrNothing on any base gives the same
  // exponentials, and 1 does not overflow. The maximum is no -inf.
  static UNILOGIT_DEVICE float log_base(float max) {
    return fabsf(max) < kAllOrNothing ? kLog2E : 1.0f;
  }
  UNILOGIT_DEVICE Exponents exponents(float max) const {
    const float base = log_base(max);
    return {scale * base, -(max * base)};
  }
  // By how much too large all exponents of a row are, since both products are rounded.
  UNILOGIT_DEVICE float excess(float max) const {
    const float base = log_base(max);
    const Exponents rounded = exponents(max);
    const float of_shift = fmaf(max, base, rounded.shift);
    const float of_factor = fmaf(scale, base, -rounded.factor);
    // In this order, since the maximum of no column over a small scale is infinite.
    return scale == 0.0f ? of_shift : of_shift - max * (of_factor / scale);
  }
  // z of a kept logit.
  UNILOGIT_DEVICE float finished(float kept) const { return kCapped ? kept : kept * scale; }
  // A kept logit whose z is -inf: no column.
  UNILOGIT_DEVICE float absent() const {
    return kCapped ? -infinity() : copysignf(infinity(), -scale);
  }
  // The largest z of kept logits; NaN is left out.
  template <int kCount>
  UNILOGIT_DEVICE float largest(const float (&kept)[kCount]) const {
    float extreme = absent();
    if (!kCapped && scale < 0.0f) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) extreme = fminf(extreme, kept[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) extreme = fmaxf(extreme, kept[i]);
    }
    return finished(extreme);
  }
};

}  // namespace unilogit
