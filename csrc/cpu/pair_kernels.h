// Two rows at once, block by block, for KL(P_a || P_b). Included after row_kernels.h, inside the
// instruction set's namespace. A block is read where it lies, or staged as float32 where it holds
// the label, is incomplete, strided, scaled or capped.
#pragma once

static_assert(kWholeStep % kStep == 0);

inline Floats zero_where_not_positive(Floats condition, Floats a) {
  return select_less(broadcast(0.0f), condition, a, broadcast(0.0f));
}

// Statistics of a block, both maxima taken off: a term without weight (exp(a - a_max) == 0) adds
// nothing to the dot product, whatever b holds. NaN or +inf in a row makes its sum NaN.
template <class A, class B>
PairPart pair_part(const void* a_data, const void* b_data, int64_t padded) {
  const A* a = static_cast<const A*>(a_data);
  const B* b = static_cast<const B*>(b_data);
  // Short chains of additions, as in sum_exponentials.
  constexpr int64_t kChain = 16 * kStep;
  constexpr int kLanes = 2;
  const float a_max = block_max(a, padded), b_max = block_max(b, padded);
  const Floats a_shift = broadcast(finite_shift(a_max));
  const Floats b_shift = broadcast(finite_shift(b_max));
  const Floats zero = broadcast(0.0f);
  Floats a_total = zero, dot_total = zero, b_total = zero;
  for (int64_t first = 0; first < padded; first += kChain) {
    const int64_t last = first + kChain < padded ? first + kChain : padded;
    Floats a_sum[kLanes], dot[kLanes], b_sum[kLanes];
    for (int i = 0; i < kLanes; ++i) a_sum[i] = dot[i] = b_sum[i] = zero;
    for (int64_t k = first; k < last; k += kLanes * kWidth) {
      if (k % kStep == 0) {
        prefetch(a + k);
        prefetch(b + k);
      }
      for (int i = 0; i < kLanes; ++i) {
        const Floats s = load(a + k + i * kWidth) - a_shift;
        const Floats t = load(b + k + i * kWidth) - b_shift;
        const Floats p = exponential(s);
        a_sum[i] = a_sum[i] + p;
        dot[i] = fma(p, zero_where_not_positive(p, s - t), dot[i]);
        b_sum[i] = b_sum[i] + exponential(t);
      }
    }
    a_total = a_total + (a_sum[0] + a_sum[1]);
    dot_total = dot_total + (dot[0] + dot[1]);
    b_total = b_total + (b_sum[0] + b_sum[1]);
  }
  return {a_max, reduce_add(a_total), reduce_add(dot_total), b_max, reduce_add(b_total)};
}

// The one merge of parts of a pair of rows; a fold in the order given. Empty parts add nothing, a
// part of no weight in the whole adds nothing to the dot product, NaN spreads.
PairPart merge_pairs(const PairPart* parts, int64_t count) {
  float a_max = -kInfinity, b_max = -kInfinity;
  for (int64_t k = 0; k < count; ++k) {
    a_max = parts[k].a_max > a_max ? parts[k].a_max : a_max;
    b_max = parts[k].b_max > b_max ? parts[k].b_max : b_max;
  }
  const float a_shift = finite_shift(a_max), b_shift = finite_shift(b_max);
  double a_sum = 0.0, a_dot = 0.0, b_sum = 0.0;
  for (int64_t k = 0; k < count; k += kWidth) {
    const int64_t lanes = count - k < kWidth ? count - k : kWidth;
    float a_weight[kWidth] = {}, b_weight[kWidth] = {};
    for (int64_t i = 0; i < lanes; ++i) {
      a_weight[i] = parts[k + i].a_max - a_shift;
      b_weight[i] = parts[k + i].b_max - b_shift;
    }
    store(a_weight, exponential(load(a_weight)));
    store(b_weight, exponential(load(b_weight)));
    for (int64_t i = 0; i < lanes; ++i) {
      const PairPart& part = parts[k + i];
      const double weight = a_weight[i], sum = part.a_sum;
      a_sum += weight * sum;
      b_sum += static_cast<double>(b_weight[i]) * part.b_sum;
      if (weight == 0.0) continue;
      const double a_move = static_cast<double>(part.a_max) - a_shift;
      const double b_move = static_cast<double>(part.b_max) - b_shift;
      a_dot += weight * (part.a_dot + sum * (a_move - b_move));
    }
  }
  const auto a_rounded = static_cast<float>(a_sum), b_rounded = static_cast<float>(b_sum);
  return {is_nan(a_rounded) ? kNan : a_max, a_rounded, static_cast<float>(a_dot),
          is_nan(b_rounded) ? kNan : b_max, b_rounded};
}

// Both terms are rounded before they are added (the library is compiled without contraction), so
// that equal rows with alpha = -gamma give exactly 0.
template <bool kWithDot, bool kWithOther, class A, class B>
inline void pair_values(const A* a, const B* b, int64_t padded, const PairFactors& factors,
                        const float* cap_slope, float* values) {
  const Floats a_shift = broadcast(factors.a_shift), b_shift = broadcast(factors.b_shift);
  const Floats alpha = broadcast(factors.alpha), beta = broadcast(factors.beta);
  const Floats gamma = broadcast(factors.gamma);
  // Where a has no weight its term is 0, also for an infinite alpha; a NaN still spreads.
  const Floats without_weight =
      broadcast(is_nan(factors.alpha) || is_nan(factors.beta) ? kNan : 0.0f);
  for (int64_t k = 0; k < padded; k += kWidth) {
    const Floats s = load(a + k) - a_shift;
    const Floats p = exponential(s);
    Floats factor = alpha;
    Floats t = b_shift;
    if constexpr (kWithDot || kWithOther) t = load(b + k) - b_shift;
    if constexpr (kWithDot) factor = fma(beta, zero_where_not_positive(p, s - t), alpha);
    Floats value = select_less(broadcast(0.0f), p, p * factor, p + without_weight);
    if constexpr (kWithOther) value = value + gamma * exponential(t);
    if (cap_slope != nullptr) value = value * load(cap_slope + k);
    store(values + k, value);
  }
}

template <class A, class B>
void pair_gradient(const void* a_data, const void* b_data, int64_t padded,
                   const PairFactors& factors, const float* cap_slope, float* values) {
  const A* a = static_cast<const A*>(a_data);
  const B* b = static_cast<const B*>(b_data);
  // A term whose factor is exactly 0 is left out, so that its row's infinities do not matter.
  if (factors.beta == 0.0f) {
    pair_values<false, true>(a, b, padded, factors, cap_slope, values);
  } else if (factors.gamma == 0.0f) {
    pair_values<true, false>(a, b, padded, factors, cap_slope, values);
  } else {
    pair_values<true, true>(a, b, padded, factors, cap_slope, values);
  }
}
