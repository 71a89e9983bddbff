// The maths of two rows over the same columns, for KL(P_a || P_b): running statistics and their one
// merge, and an entry of a gradient row. See unilogit_kernels/pair_state.py for the formulas.
#pragma once

#include "row_math.h"

namespace unilogit {

// Of some columns without the label's, both maxima taken off: s = a - a_max, t = b - b_max.
struct PairPart {
  float a_max;
  float a_sum;  // of exp(s)
  float a_dot;  // of exp(s) (s - t)
  float b_max;
  float b_sum;  // of exp(t)
};

constexpr int kPairFields = 5;

UNILOGIT_DEVICE PairPart empty_pair() { return {-infinity(), 0.0f, 0.0f, -infinity(), 0.0f}; }

// A part as it is seen from larger maxima. One of no weight there contributes nothing, be its dot
// product infinite.
UNILOGIT_DEVICE PairPart moved(PairPart part, float a_max, float b_max) {
  const float a_move = part.a_max - shift_of(a_max);
  const float b_move = part.b_max - shift_of(b_max);
  const float weight = exponential(a_move);
  const float dot = weight * fmaf(part.a_sum, a_move - b_move, part.a_dot);
  return {a_max, weight * part.a_sum, weight == 0.0f ? 0.0f : dot, b_max,
          exponential(b_move) * part.b_sum};
}

// The one merge of parts of a pair of rows. NaN spreads through the sums.
UNILOGIT_DEVICE PairPart merge(const PairPart& x, const PairPart& y) {
  const float a_max = fmaxf(x.a_max, y.a_max), b_max = fmaxf(x.b_max, y.b_max);
  const PairPart p = moved(x, a_max, b_max), q = moved(y, a_max, b_max);
  return {a_max, p.a_sum + q.a_sum, p.a_dot + q.a_dot, b_max, p.b_sum + q.b_sum};
}

UNILOGIT_DEVICE PairPart spread_nan(const PairPart& part) {
  const Part a = spread_nan(Part{part.a_max, part.a_sum});
  const Part b = spread_nan(Part{part.b_max, part.b_sum});
  return {a.max, a.sum, part.a_dot, b.max, b.sum};
}

// Adds columns to a part; z of -inf in both rows is no column.
template <int kCount>
UNILOGIT_DEVICE PairPart fold(const PairPart& part, const float (&a)[kCount],
                              const float (&b)[kCount]) {
  float a_max = part.a_max, b_max = part.b_max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    a_max = fmaxf(a_max, a[i]);
    b_max = fmaxf(b_max, b[i]);
  }
  const float a_shift = shift_of(a_max), b_shift = shift_of(b_max);
  float a_sum = 0.0f, a_dot = 0.0f, b_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float s = a[i] - a_shift, t = b[i] - b_shift;
    const float weight = exponential(s);
    a_sum += weight;
    a_dot = fmaf(weight, weight > 0.0f ? s - t : 0.0f, a_dot);
    b_sum += exponential(t);
  }
  const PairPart before = moved(part, a_max, b_max);
  return {a_max, before.a_sum + a_sum, before.a_dot + a_dot, b_max, before.b_sum + b_sum};
}

// A gradient row but for dz/dx: `at_label` at the label, elsewhere
// `exp(s) (alpha + beta (s - t)) + gamma exp(t)`.
struct PairGradient {
  float a_shift;
  float b_shift;
  float alpha;
  float beta;
  float gamma;
  float at_label;

  UNILOGIT_DEVICE bool is_zero() const {
    return alpha == 0.0f && beta == 0.0f && gamma == 0.0f && at_label == 0.0f;
  }

  // A term whose factor is exactly 0 is left out, so that its row's infinities do not matter. Where
  // a has no weight its term is 0, also for an infinite alpha; a NaN still spreads. Both terms are
  // rounded before they are added, so that equal rows with alpha = -gamma give exactly 0.
  UNILOGIT_DEVICE float entry(float a, float b) const {
    const float s = a - a_shift, t = b - b_shift;
    const float weight = exponential(s);
    const float factor = beta == 0.0f || !(weight > 0.0f) ? alpha : fmaf(beta, s - t, alpha);
    const float nan_or_zero = (alpha != alpha || beta != beta) ? not_a_number() : 0.0f;
    const float first = weight > 0.0f ? weight * factor : weight + nan_or_zero;
    return gamma == 0.0f ? first : sum_of_rounded(first, gamma * exponential(t));
  }
};

}  // namespace unilogit
