// The maths of a row, shared by all kernels: what a logit becomes, the running statistics and their
// one merge, the objectives. The twin of csrc/cpu/row_math.h and of the Triton
// kernels' row_maths.py.
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

// ---- running statistics ------------------------------------------------------------------------

// In a state, of a row that is -inf but for the label: `NO_COLUMN` of row_state.py.
constexpr int kNoColumn = 0x7fffffff;

// Of some columns without the label's: the largest z, and the sum of exp(z - max). The column of
// the largest, of equal ones the lowest, is kept only by kernels with `kRunnerUp`; the others never
// look at it, so that it costs them nothing.
struct Part {
  float max;
  float sum;
  int column = kNoColumn;
};

UNILOGIT_DEVICE Part empty_part() { return {-infinity(), 0.0f}; }

// -inf minus -inf must not happen in a part that is still empty; +inf minus +inf gives NaN on
// purpose: overflow is never laundered.
UNILOGIT_DEVICE float shift_of(float max) { return max == -infinity() ? 0.0f : max; }

// The one merge of parts of a row: threads, blocks, and the state of earlier columns. NaN spreads
// through the sum, since a GPU's maximum drops it.
UNILOGIT_DEVICE Part merge(Part a, Part b) {
  const float max = fmaxf(a.max, b.max);
  const float shift = shift_of(max);
  const int lower = a.column < b.column ? a.column : b.column;
  return {max, fmaf(a.sum, exponential(a.max - shift), b.sum * exponential(b.max - shift)),
          a.max > b.max   ? a.column
          : a.max < b.max ? b.column
                          : lower};
}

// A part as others may see it: NaN in the sum is NaN in the maximum.
UNILOGIT_DEVICE Part spread_nan(Part part) {
  const bool nowhere = part.max == -infinity();
  return {part.sum != part.sum ? not_a_number() : part.max, part.sum,
          nowhere ? kNoColumn : part.column};
}

// Adds kept logits to a part. Short chains of additions are fast and keep the rounding small.
template <bool kCapped, int kCount>
UNILOGIT_DEVICE Part fold(Part part, const float (&kept)[kCount],
                          const Transform<kCapped>& transform) {
  constexpr int kChains = kCount < 4 ? kCount : 4;
  const float max = fmaxf(part.max, transform.largest(kept));
  const float shift = shift_of(max);
  float chains[kChains];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float term = exponential(transform.shifted(kept[i], shift));
    chains[i % kChains] = i < kChains ? term : chains[i % kChains] + term;
  }
#pragma unroll
  for (int i = 1; i < kChains; ++i) chains[0] += chains[i];
  return {max, fmaf(part.sum, exponential(part.max - shift), chains[0]), part.column};
}

// Where the largest of a part and of kept logits is; called before these are folded into it. Few
// tiles have a new maximum: only then is it looked for column by column.
template <bool kCapped, int kCount, class ColumnOf>
UNILOGIT_DEVICE int fold_column(const Part& part, const float (&kept)[kCount],
                                const Transform<kCapped>& transform, const ColumnOf& column_of) {
  const float largest = transform.largest(kept);
  if (largest < part.max) return part.column;
  int lowest = largest == part.max ? part.column : kNoColumn;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (transform.finished(kept[i]) == largest && column_of(i) < lowest) lowest = column_of(i);
  }
  return lowest;
}

// ---- objectives --------------------------------------------------------------------------------

// log_odds d = z_y - log(sum of the rest), the maximum subtracted first.
UNILOGIT_DEVICE float log_odds(Part rest, float target, bool label_exists) {
  if (!label_exists || target == infinity()) return not_a_number();
  if (rest.max == -infinity()) {
    return target == -infinity() ? not_a_number() : target + infinity();
  }
  return (target - rest.max) - logf(rest.sum);
}

enum Objective : int {
  kNoObjective = -1,
  kUnilogitReverse = 0,
  kUnilogitForward = 1,
  kCrossEntropy = 2,
  kGradientAscent = 3,
};

// What the objectives know of the vocabulary's size V: u = -log(V - 1), log(1 + exp(u)), 1 / V.
struct ObjectiveTerms {
  int objective;
  float uniform_log_odds;
  float softplus_uniform;
  float inverse_vocab;
};

struct RowResult {
  float value;
  float slope;
};

// Value and slope of an objective at d, in forms that do not cancel for either sign of d. A clamp
// to +-2e4, where sigmoid(-|d|) is 0, keeps 0 * inf out of bounded values.
UNILOGIT_DEVICE RowResult evaluate_objective(const ObjectiveTerms& terms, float d) {
  if (d != d) return {not_a_number(), not_a_number()};
  const float tail_exp = expf(-fabsf(d));
  const float log1p_term = log1pf(tail_exp);    // softplus(-|d|)
  const float body = 1.0f / (1.0f + tail_exp);  // sigmoid(|d|)
  const float tail = tail_exp * body;           // sigmoid(-|d|)
  if (terms.objective == kUnilogitReverse) {
    const float bounded = fminf(fmaxf(d, -2e4f), 2e4f);
    const float entropy_like = tail * (bounded - terms.uniform_log_odds);
    const float value =
        d > 0.0f ? (terms.softplus_uniform - terms.uniform_log_odds) - entropy_like - log1p_term
                 : entropy_like - log1p_term + terms.softplus_uniform;
    return {value < 0.0f ? 0.0f : value, entropy_like * body};
  }
  if (terms.objective == kUnilogitForward) {
    const float linear = d > 0.0f ? (1.0f - terms.inverse_vocab) * d : -d * terms.inverse_vocab;
    const float value =
        linear +
        (log1p_term + (terms.uniform_log_odds * terms.inverse_vocab - terms.softplus_uniform));
    return {value < 0.0f ? 0.0f : value, (d > 0.0f ? body : tail) - terms.inverse_vocab};
  }
  const float sign = terms.objective == kCrossEntropy ? 1.0f : -1.0f;
  const float cross_entropy = (d < 0.0f ? -d : 0.0f) + log1p_term;
  return {sign * cross_entropy, -sign * (d > 0.0f ? tail : body)};
}

// ---- gradient ----------------------------------------------------------------------------------

// A gradient row, but for the cap's slope: `at_label` at the label, elsewhere
// `coefficient * exp(z - max)`.
//
// With `kRunnerUp` the runner-up has an entry of its own too. A row of size 0 is exactly 0.
struct GradientRow {
  float max;
  float coefficient;
  float at_label;
  float size;
};

// One with an entry of its own in the column `runner_up`, -1 for none.
struct RunnerUpRow : GradientRow {
  float at_runner_up;
  int runner_up;
};

// What both kinds of row answer, so that one writer serves them.
template <class Row>
struct RunnerUpOf {
  static constexpr bool kExists = false;
  static UNILOGIT_DEVICE int column(const Row&) { return -1; }
  static UNILOGIT_DEVICE float entry(const Row&) { return 0.0f; }
};

template <>
struct RunnerUpOf<RunnerUpRow> {
  static constexpr bool kExists = true;
  static UNILOGIT_DEVICE int column(const RunnerUpRow& row) { return row.runner_up; }
  static UNILOGIT_DEVICE float entry(const RunnerUpRow& row) { return row.at_runner_up; }
};

UNILOGIT_DEVICE GradientRow gradient_row(Part rest, float slope, float derivative) {
  const float at_label = slope * derivative;
  return {rest.max, -at_label / rest.sum, at_label, slope};
}

}  // namespace unilogit
