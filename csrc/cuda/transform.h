// What a model does to its logits, and the functions that take.
#pragma once

#include "platform.h"

namespace unilogit {

constexpr float kLog2E = 1.4426950408889634f;

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
