// The maths of a row, shared by every instruction set: included once for each of them, inside its
// own namespace, after its vector primitives (lanes_*.h).
#pragma once

constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// ---- exponential and hyperbolic tangent --------------------------------------------------------

constexpr float kLog2E = 0x1.715476p+0f;
// log 2 in two parts: products of the upper one with n are exact without a fused multiply-add.
constexpr float kLog2Upper = 0x1.63p-1f;
constexpr float kLog2UpperExcess = 0x1.bd0106p-13f;

// Below this exp rounds to 0 in float32 (half the smallest subnormal is exp(-103.97)).
constexpr float kExpUnderflow = -104.0f;

// Adding one of these rounds to an integer, or to a multiple of 1/16, and leaves the result in the
// low bits (plus 151, see times_power_of_two).
constexpr float kIntegerBias = 0x1.8p23f + 151.0f;
constexpr float kSixteenthsBias = 0x1.8p19f;

// 2^(k / 16)
alignas(kCacheLine) constexpr float kSixteenthPowers[16] = {
    0x1.0p+0f,      0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fep+0f,  0x1.3dea64p+0f,
    0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
    0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};

// `t`, or where exp(t) is 0 something finite, so that no product with that exponential is NaN.
inline Floats above_underflow(Floats t) { return max_or_second(broadcast(kExpUnderflow), t); }

// exp(t) for t <= 72; NaN passes, -inf gives 0. Error <= 2 ulp over [-104, 0], subnormals included
// (checked over every float32). t = n log 2 + r; exp(r) is a minimax polynomial of degree 6 for
// integers n (relative error 3.1e-9), of degree 3 (9.2e-9) for multiples of 1/16.
inline Floats exponential(Floats t) {
  t = above_underflow(t);
  const Floats bias = broadcast(kLooksUpSixteen ? kSixteenthsBias : kIntegerBias);
  const Floats biased = fma(t, broadcast(kLog2E), bias);
  const Floats n = biased - bias;
  Floats r = fma(n, broadcast(-kLog2Upper), t);
  r = fma(n, broadcast(kLog2UpperExcess), r);
  const Floats one = broadcast(1.0f);
  if constexpr (kLooksUpSixteen) {
    const Floats power = look_up_sixteen(kSixteenthPowers, biased);
    Floats q = fma(broadcast(0x1.555556p-3f), r, broadcast(0.5f));
    q = fma(q, r, one);
    return times_power_of_two(fma(q, power * r, power), n, biased);
  }
  Floats q = fma(broadcast(0x1.6a23d0p-10f), r, broadcast(0x1.123a20p-7f));
  q = fma(q, r, broadcast(0x1.5558f2p-5f));
  q = fma(q, r, broadcast(0x1.555492p-3f));
  q = fma(q, r, broadcast(0x1.fffffcp-2f));
  return times_power_of_two(fma(q, r * r, r) + one, n, biased);
}

// tanh(x) and its derivative 1 - tanh^2, neither of which cancels: below 5/8 an odd polynomial
// (Cephes), above it 1 - w with w = 2 q / (1 + q), q = exp(-2|x|), and w (2 - w).
struct Tanh {
  Floats value;
  Floats slope;
};

inline Tanh hyperbolic_tangent(Floats x) {
  const Floats magnitude = absolute(x);
  const Floats one = broadcast(1.0f), two = broadcast(2.0f), limit = broadcast(0.625f);
  const Floats q = exponential(broadcast(-2.0f) * magnitude);
  const Floats w = (q + q) / (one + q);
  const Floats square = magnitude * magnitude;
  Floats p = fma(broadcast(-5.70498872745e-3f), square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const Floats small = fma(p * square, magnitude, magnitude);
  const Floats value = select_less(magnitude, limit, small, one - w);
  const Floats slope = select_less(magnitude, limit, one - small * small, w * (two - w));
  return {copy_sign(value, x), slope};
}

// ---- running statistics ------------------------------------------------------------------------

inline bool is_nan(float x) { return x != x; }

// What is taken off before an exponential: the maximum, or 0 where there is nothing but -inf.
inline float finite_shift(float max) { return max == -kInfinity ? 0.0f : max; }

// The one merge of parts of a row; a fold in the order given. An empty part (max = -inf, sum = 0)
// contributes nothing, NaN spreads. `weights`, unless null, receives exp(parts[k].max - max).
inline Part merge_parts(const Part* parts, int64_t count, float* weights) {
  float max = -kInfinity;
  for (int64_t k = 0; k < count; ++k) max = parts[k].max > max ? parts[k].max : max;
  const float shift = finite_shift(max);
  double sum = 0.0;
  for (int64_t k = 0; k < count; k += kWidth) {
    const int64_t lanes = count - k < kWidth ? count - k : kWidth;
    float weight[kWidth] = {};
    for (int64_t i = 0; i < lanes; ++i) weight[i] = parts[k + i].max - shift;
    store(weight, exponential(load(weight)));
    for (int64_t i = 0; i < lanes; ++i) {
      sum += static_cast<double>(weight[i]) * static_cast<double>(parts[k + i].sum);
      if (weights != nullptr) weights[k + i] = weight[i];
    }
  }
  const float rounded = static_cast<float>(sum);
  return {is_nan(rounded) ? kNan : max, rounded};
}

// ---- objectives --------------------------------------------------------------------------------

// log_odds d = z_y - log(sum of the rest), the maximum subtracted first, in double precision.
inline double log_odds(const Part& rest, float target, bool label_exists) {
  if (!label_exists || target == kInfinity) return kNan;
  if (rest.max == -kInfinity) return target == -kInfinity ? kNan : target + kInfinity;
  return (static_cast<double>(target) - rest.max) - std::log(static_cast<double>(rest.sum));
}

// Value and slope of an objective at d, in forms that do not cancel for either sign of d. A clamp
// to +-2e4, where sigmoid(-|d|) is 0 in double precision, keeps 0 * inf out of bounded values.
inline RowResult evaluate_objective(const ObjectiveTerms& terms, double d) {
  if (d != d) return {kNan, kNan};
  const double tail_exp = std::exp(-std::fabs(d));
  const double log1p_term = std::log1p(tail_exp);   // softplus(-|d|)
  const double tail = tail_exp / (1.0 + tail_exp);  // sigmoid(-|d|)
  const double body = 1.0 / (1.0 + tail_exp);       // sigmoid(|d|)
  double value, slope;
  switch (terms.objective) {
    case kUnilogitReverse: {
      constexpr double kSaturated = 2e4;
      const double bounded = d > kSaturated ? kSaturated : d < -kSaturated ? -kSaturated : d;
      const double delta = bounded - terms.uniform_log_odds;
      const double entropy_like = tail * delta;
      value = d > 0 ? (terms.softplus_uniform - terms.uniform_log_odds) - entropy_like - log1p_term
                    : entropy_like - log1p_term + terms.softplus_uniform;
      value = value < 0.0 ? 0.0 : value;
      slope = entropy_like * body;
      break;
    }
    case kUnilogitForward: {
      const double linear = d > 0 ? (1.0 - terms.inverse_vocab) * d : -d * terms.inverse_vocab;
      value = linear +
              (log1p_term + terms.uniform_log_odds * terms.inverse_vocab - terms.softplus_uniform);
      value = value < 0.0 ? 0.0 : value;
      slope = (d > 0 ? body : tail) - terms.inverse_vocab;
      break;
    }
    default: {
      const double cross_entropy = (d < 0 ? -d : 0.0) + log1p_term;
      const double sign = terms.objective == kUnilogitCrossEntropy ? 1.0 : -1.0;
      value = sign * cross_entropy;
      slope = -sign * (d > 0 ? tail : body);
    }
  }
  return {value, slope};
}

inline RowResult finish_row(const Part& rest, float target, bool label_exists,
                            const ObjectiveTerms& terms) {
  return evaluate_objective(terms, log_odds(rest, target, label_exists));
}
