// More of a row than its sum of exponentials, block by block, and the gradient rows that need it.
// Included after row_kernels.h, inside the instruction set's namespace.
#pragma once

// ---- moments of a block ------------------------------------------------------------------------

// A sum over a block; `add(k, sum)` adds the terms of columns k .. k + kWidth - 1. Short chains, as
// in sum_exponentials.
template <class Add>
inline float sum_in_chains(int64_t padded, const Add& add) {
  constexpr int64_t kChain = 16 * kStep;
  Floats total = broadcast(0.0f);
  for (int64_t first = 0; first < padded; first += kChain) {
    const int64_t last = first + kChain < padded ? first + kChain : padded;
    Floats sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = broadcast(0.0f);
    for (int64_t k = first; k < last; k += kStep) {
      for (int i = 0; i < 4; ++i) sum[i] = add(k + i * kWidth, sum[i]);
    }
    total = total + sum_of_four(sum);
  }
  return reduce_add(total);
}

// The sum of exp(s) (s - mean)^2 with s = x - max: squares about 0 would cancel below one peak.
template <class T>
inline float sum_squares(const T* x, int64_t padded, float max, float mean,
                         const float* exponentials) {
  return sum_in_chains(padded, [&](int64_t k, Floats sum) {
    const Floats t = above_underflow(load(x + k) - broadcast(max)) - broadcast(mean);
    return fma(load(exponentials + k) * t, t, sum);
  });
}

// The sums of s = x - max and of exp(s) s, those that are asked for.
template <bool kLinear, bool kDot>
class MomentSums {
 public:
  MomentSums() { linear_total_ = dot_total_ = broadcast(0.0f); }

  void begin() {
    for (int i = 0; i < 4; ++i) linear_[i] = dot_[i] = broadcast(0.0f);
  }
  void add(int i, Floats s, Floats e) {
    if constexpr (kLinear) linear_[i] = linear_[i] + s;
    if constexpr (kDot) dot_[i] = fma(e, above_underflow(s), dot_[i]);
  }
  void end() {
    if constexpr (kLinear) linear_total_ = linear_total_ + sum_of_four(linear_);
    if constexpr (kDot) dot_total_ = dot_total_ + sum_of_four(dot_);
  }
  float linear() const { return kLinear ? reduce_add(linear_total_) : 0.0f; }
  float dot() const { return kDot ? reduce_add(dot_total_) : 0.0f; }

 private:
  Floats linear_[4], dot_[4], linear_total_, dot_total_;
};

template <bool kStore, bool kLinear, bool kDot, class T, class BeforeStep>
inline Moments sums_of(const T* x, int64_t padded, float max, float* exponentials,
                       const BeforeStep& before_step) {
  MomentSums<kLinear, kDot> more;
  const float shift = finite_shift(max);
  const float sum = sum_exponentials<kStore>(x, padded, shift, exponentials, before_step, more);
  const float count = kLinear ? static_cast<float>(padded) : 0.0f;
  return {max, sum, count, more.linear(), more.dot(), 0.0f};
}

// Moments of the columns of a block without holes; `exponentials` is null unless kStore.
template <bool kStore, class T, class BeforeStep = Nothing>
inline Moments moments_of(const T* x, int64_t padded, std::int32_t needs, float* exponentials,
                          const BeforeStep& before_step = {}) {
  const float max = block_max(x, padded);
  if ((needs & kUnilogitMean) == 0) {
    return sums_of<kStore, false, true>(x, padded, max, exponentials, before_step);
  }
  if ((needs & (kUnilogitEntropy | kUnilogitVariance)) == 0) {
    return sums_of<kStore, true, false>(x, padded, max, exponentials, before_step);
  }
  return sums_of<kStore, true, true>(x, padded, max, exponentials, before_step);
}

template <class T>
inline Moments moments_of(const T* x, int64_t padded, std::int32_t needs, float* exponentials) {
  if (exponentials == nullptr) return moments_of<false>(x, padded, needs, exponentials);
  Moments moments = moments_of<true>(x, padded, needs, exponentials);
  if ((needs & kUnilogitVariance) != 0) {
    const float mean = moments.sum == 0.0f ? 0.0f : moments.dot / moments.sum;
    moments.square = sum_squares(x, padded, finite_shift(moments.max), mean, exponentials);
  }
  return moments;
}

// The sum of z - max over a staged block, which overwrites what stage has put for no column.
inline float sum_excess(float* z, int64_t count, int64_t padded, float max, const Label& label) {
  for (int64_t k = count; k < padded; ++k) z[k] = max;
  if (label.offset >= 0 && label.offset < count) z[label.offset] = max;
  return sum_in_chains(padded,
                       [&](int64_t k, Floats sum) { return sum + (load(z + k) - broadcast(max)); });
}

template <class T>
Moments block_moments(const void* data, int64_t stride, int64_t count,
                      const UnilogitTransform& transform, std::int32_t needs, Label& label,
                      float* exponentials) {
  const T* x = static_cast<const T*>(data);
  alignas(kCacheLine) float own_exponentials[kBlock];
  float* e = exponentials;
  if (e == nullptr && (needs & kUnilogitVariance) != 0) e = own_exponentials;
  if (is_plain(stride, count, transform, label)) return moments_of(x, count, needs, e);
  alignas(kCacheLine) float z[kBlock];
  alignas(kCacheLine) float cap_slope[kBlock];
  const int64_t padded = stage(x, stride, count, transform, label, z, cap_slope);
  Moments moments = moments_of(z, padded, needs, e);
  if (exponentials != nullptr && transform.softcap != 0.0f) {
    multiply(exponentials, cap_slope, padded);
  }
  if ((needs & kUnilogitMean) != 0) {
    const bool has_label = label.offset >= 0 && label.offset < count;
    moments.count = static_cast<float>(has_label ? count - 1 : count);
    moments.linear = sum_excess(z, count, padded, finite_shift(moments.max), label);
  }
  return moments;
}

// Reads a plain block, by moments_of; squares are for others to ask for.
template <class T>
struct MomentReader {
  const T* x;
  float* exponentials;
  std::int32_t needs;

  template <class BeforeStep>
  Moments read(const BeforeStep& before_step) const {
    return moments_of<true>(x, kBlock, needs, exponentials, before_step);
  }
};

template <class T, class Out>
Moments write_block_and_moments(RowWriter& writer, const GradientBlock& block, const void* data,
                                int64_t stride, int64_t count, const UnilogitTransform& transform,
                                std::int32_t needs, Label& label, float* exponentials) {
  if (can_write_while_reading(writer, block, stride, count, transform, label)) {
    const MomentReader<T> reader{static_cast<const T*>(data), exponentials, needs};
    return writer.stream ? write_while_reading<Out, true, true>(writer, block, reader)
                         : write_while_reading<Out, false, true>(writer, block, reader);
  }
  write_block<Out, true>(writer, block);
  return block_moments<T>(data, stride, count, transform, needs, label, exponentials);
}

// ---- their merge -------------------------------------------------------------------------------

// Calls body(part, weight, move) for all parts in order: exp(part.max - max), and by how much what
// lies about part.max moves when it is counted from `max`.
template <class Body>
inline void for_weighted(const Moments* parts, int64_t count, float max, float* weights,
                         const Body& body) {
  const float shift = finite_shift(max);
  for (int64_t k = 0; k < count; k += kWidth) {
    const int64_t lanes = count - k < kWidth ? count - k : kWidth;
    float weight[kWidth] = {};
    for (int64_t i = 0; i < lanes; ++i) weight[i] = parts[k + i].max - shift;
    store(weight, exponential(load(weight)));
    for (int64_t i = 0; i < lanes; ++i) {
      const Moments& part = parts[k + i];
      body(part, static_cast<double>(weight[i]),
           static_cast<double>(finite_shift(part.max)) - shift);
      if (weights != nullptr) weights[k + i] = weight[i];
    }
  }
}

// The one merge of moments, `merge_parts` with more: a fold in the order given; an empty part adds
// nothing. Squares about means of their own become squares about the mean of all (Chan), so that
// none cancel.
Moments merge_moments(const Moments* parts, int64_t count, std::int32_t needs, float* weights) {
  float max = -kInfinity;
  for (int64_t k = 0; k < count; ++k) max = parts[k].max > max ? parts[k].max : max;
  double sum = 0.0, columns = 0.0, linear = 0.0, dot = 0.0, square = 0.0;
  for_weighted(parts, count, max, weights, [&](const Moments& part, double weight, double move) {
    const double share = weight * static_cast<double>(part.sum);
    sum += share;
    columns += part.count;
    linear += part.linear + part.count * move;
    dot += weight * part.dot + share * move;
  });
  if ((needs & kUnilogitVariance) != 0) {
    const double mean = sum == 0.0 ? 0.0 : dot / sum;
    for_weighted(parts, count, max, nullptr, [&](const Moments& part, double weight, double move) {
      const double share = weight * static_cast<double>(part.sum);
      if (share == 0.0) return;
      const double off = static_cast<double>(part.dot) / part.sum + move - mean;
      square += weight * part.square + share * off * off;
    });
  }
  const auto rounded = static_cast<float>(sum);
  return {is_nan(rounded) ? kNan : max, rounded,
          static_cast<float>(columns),  static_cast<float>(linear),
          static_cast<float>(dot),      static_cast<float>(square)};
}

// ---- weighted statistics of a row --------------------------------------------------------------

// The product, and 0 where the probability is, whatever the other is.
inline double expected(double probability, double x) {
  return probability == 0.0 ? 0.0 : probability * x;
}

// The forms of maths/statistics.py, which says why nothing in them cancels. A weight of 0 leaves
// its term out of the loss; a derivative by it is 0 then.
inline StatisticsResult finish_statistics(const Moments& rest, float target, bool label_exists,
                                          const StatisticsTerms& terms) {
  const double d = log_odds({rest.max, rest.sum}, target, label_exists);
  if (d != d) return {kNan, kNan, kNan, kNan, kNan, kNan};
  const bool empty = rest.max == -kInfinity;
  const double size = std::fabs(d);
  const double tail_exp = std::exp(-size);
  const double tail = tail_exp / (1.0 + tail_exp), body = 1.0 / (1.0 + tail_exp);
  const double p = d > 0 ? body : tail, q = d > 0 ? tail : body;
  const double sum = rest.sum < 1.0f ? 1.0 : rest.sum;
  const double shift = finite_shift(rest.max);
  const double label_excess = static_cast<double>(target) - shift;
  const double rest_mean = rest.dot / sum;
  // logsumexp - shift
  const double total = empty ? target : std::log(sum) + ((d > 0 ? d : 0.0) + std::log1p(tail_exp));
  double loss = terms.constant, of_logsumexp = 0.0, by_d = 0.0, by_logsumexp = 0.0, tilt = 0.0;
  if (terms.cross_entropy != 0.0) {
    loss += terms.cross_entropy * ((d < 0 ? -d : 0.0) + std::log1p(tail_exp));
    by_d = -terms.cross_entropy * q;
  }
  if (terms.uniform != 0.0) {
    loss += terms.uniform * (total - (rest.linear + label_excess) / terms.vocab_size);
    by_logsumexp += terms.uniform;
  }
  if (terms.squared_logsumexp != 0.0) {
    const double logsumexp = shift + total;
    of_logsumexp = terms.squared_logsumexp * logsumexp * logsumexp;
    loss += of_logsumexp;
    by_logsumexp += 2.0 * terms.squared_logsumexp * logsumexp;
  }
  if (terms.entropy != 0.0) {
    constexpr double kSaturated = 2e4;  // where the tail is 0 in double precision
    const double of_label = std::log1p(tail_exp) + (size < kSaturated ? size : kSaturated) * tail;
    loss += terms.entropy * (of_label + q * (std::log(sum) - rest_mean));
    tilt = terms.entropy * q;
  }
  const double uniform = -terms.uniform / terms.vocab_size;
  const double mean = expected(p, label_excess) + q * rest_mean;
  const double label_above_rest = empty ? 0.0 : label_excess - rest_mean;
  return {loss,
          of_logsumexp,
          by_d - by_logsumexp * q - tilt * mean,
          by_d + by_logsumexp * p - expected(p, tilt * label_above_rest) + uniform,
          tilt,
          uniform};
}

// ---- general gradient rows ---------------------------------------------------------------------

// Values of a block; with kStored they hold exponentials times the cap's slope. Where an
// exponential is 0 the product with it is 0, also where z is -inf.
template <bool kStored, bool kTilt, bool kCapped, class T>
inline void values_of(const T* x, int64_t padded, const RowFactors& factors, const float* cap_slope,
                      float* values) {
  const Floats shift = broadcast(factors.shift), rest = broadcast(factors.rest);
  const Floats tilt = broadcast(factors.tilt), constant = broadcast(factors.uniform);
  const auto value = [&](int64_t k) {
    Floats factor = rest, uniform = constant, e;
    if constexpr (kTilt) factor = fma(tilt, above_underflow(load(x + k) - shift), rest);
    if constexpr (kStored) e = load(values + k);
    if constexpr (!kStored) e = exponential(load(x + k) - shift);
    if constexpr (kCapped) {
      const Floats slope = load(cap_slope + k);
      uniform = uniform * slope;
      if constexpr (!kStored) e = e * slope;
    }
    return fma(e, factor, uniform);
  };
  for (int64_t step = 0; step < padded; step += kStep) {
    for (int i = 0; i < 4; ++i) store(values + step + i * kWidth, value(step + i * kWidth));
  }
}

template <bool kStored, class T>
void row_values(const void* data, int64_t padded, const RowFactors& factors, const float* cap_slope,
                float* values) {
  const T* x = static_cast<const T*>(data);
  const bool has_tilt = factors.tilt != 0.0f;
  if (cap_slope == nullptr) {
    has_tilt ? values_of<kStored, true, false>(x, padded, factors, cap_slope, values)
             : values_of<kStored, false, false>(x, padded, factors, cap_slope, values);
  } else {
    has_tilt ? values_of<kStored, true, true>(x, padded, factors, cap_slope, values)
             : values_of<kStored, false, true>(x, padded, factors, cap_slope, values);
  }
}

constexpr MomentKernels make_moment_kernels() {
  return {{block_moments<float>, block_moments<bfloat16>, block_moments<float16>},
          {write_block<float, true>, write_block<bfloat16, true>, write_block<float16, true>},
          {{write_block_and_moments<float, float>, write_block_and_moments<float, bfloat16>,
            write_block_and_moments<float, float16>},
           {write_block_and_moments<bfloat16, float>, write_block_and_moments<bfloat16, bfloat16>,
            write_block_and_moments<bfloat16, float16>},
           {write_block_and_moments<float16, float>, write_block_and_moments<float16, bfloat16>,
            write_block_and_moments<float16, float16>}},
          merge_moments,
          finish_statistics,
          {row_values<false, float>, row_values<false, bfloat16>, row_values<false, float16>},
          {row_values<true, float>, row_values<true, bfloat16>, row_values<true, float16>}};
}
