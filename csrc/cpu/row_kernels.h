// The row kernels of one instruction set, block by block. Included after row_math.h, inside the
// instruction set's namespace.
#pragma once

// Columns between two turns of the unrolled loops; blocks are padded to a multiple of it.
constexpr int64_t kStep = 4 * kWidth;
static_assert(kBlock % kStep == 0 && kGradientBlock % kStep == 0);

// Columns stored at once: two vectors, which are one vector of a 16-bit type.
constexpr int64_t kUnit = 2 * kWidth;
static_assert(kUnit <= kMaxUnit);

// The next `kWidth` columns, `remaining` of which exist; the other lanes are 0.
template <class T>
inline Floats gather(const T* x, int64_t stride, int64_t remaining) {
  if (stride == 1 && remaining >= kWidth) return load(x);
  T lanes[kWidth] = {};
  for (int64_t i = 0; i < kWidth && i < remaining; ++i) lanes[i] = x[i * stride];
  return load(lanes);
}

// Writes z of a block to `z` and the cap's slope to `cap_slope` (left alone without a cap), takes
// the label's column out, and pads with -inf. Returns the padded number of columns.
template <class T>
inline int64_t stage(const T* x, int64_t stride, int64_t count, const UnilogitTransform& transform,
                     Label& label, float* z, float* cap_slope) {
  const bool capped = transform.softcap != 0.0f;
  const Floats scale = broadcast(transform.scale);
  const Floats cap = broadcast(transform.softcap);
  int64_t k = 0;
  if (stride == 1 && !capped) {
    for (; k + kUnit <= count; k += kUnit) {
      store(z + k, load(x + k) * scale);
      store(z + k + kWidth, load(x + k + kWidth) * scale);
    }
  }
  for (; k < count; k += kWidth) {
    Floats value = gather(x + k * stride, stride, count - k) * scale;
    if (capped) {
      const Tanh tanh = hyperbolic_tangent(value / cap);
      value = cap * tanh.value;
      store(cap_slope + k, tanh.slope);
    }
    store(z + k, value);
  }
  const int64_t padded = (count + kStep - 1) / kStep * kStep;
  for (k = count; k < padded; ++k) z[k] = -kInfinity;
  if (capped) {
    for (k = count; k < padded; ++k) cap_slope[k] = 0.0f;
  }
  if (label.offset >= 0 && label.offset < count) {
    label.logit = z[label.offset];
    label.cap_slope = capped ? cap_slope[label.offset] : 1.0f;
    z[label.offset] = -kInfinity;
  }
  return padded;
}

// A block that can be read where it lies: whole steps, contiguous, as it is, without the label.
inline bool is_plain(int64_t stride, int64_t count, const UnilogitTransform& transform,
                     const Label& label) {
  return stride == 1 && count % kStep == 0 && transform.scale == 1.0f &&
         transform.softcap == 0.0f && (label.offset < 0 || label.offset >= count);
}

// The largest of many values, kUnit at a time; NaN is left out.
template <class T>
class RunningMax {
 public:
  RunningMax() { max_[0] = max_[1] = broadcast(-kInfinity); }

  void add(const T* p) {
    for (int i = 0; i < 2; ++i) max_[i] = max_or_second(load(p + i * kWidth), max_[i]);
  }
  float result() const { return reduce_max(max_or_second(max_[0], max_[1])); }

 private:
  Floats max_[2];
};

#if defined(UNILOGIT_ORDERED_BFLOAT16)
template <>
class RunningMax<bfloat16> : public OrderedBfloat16Max {
 public:
  RunningMax() {}
};
#endif

// The largest of the columns; if one is NaN, NaN or the largest of the others.
template <class T>
inline float block_max(const T* x, int64_t padded) {
  RunningMax<T> max[2];
  for (int64_t k = 0; k < padded; k += kStep) {
    for (int i = 0; i < 2; ++i) max[i].add(x + k + i * kUnit);
  }
  const float a = max[0].result(), b = max[1].result();
  return a > b || is_nan(a) ? a : b;
}

// Fetches what lies one block ahead of a step's columns: hardware prefetching stops at the end of
// a page, which is the end of a block of float32.
template <class T>
inline void prefetch(const T* x) {
  const auto first = reinterpret_cast<std::uintptr_t>(x) + kBlock * sizeof(T);
  for (std::uintptr_t k = 0; k < kStep * sizeof(T); k += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + k));
  }
}

struct Nothing {
  void operator()(int64_t) const {}
};

inline Floats sum_of_four(const Floats* a) { return (a[0] + a[1]) + (a[2] + a[3]); }

// No other sums beside that of exponentials; see MomentSums.
struct NoSums {
  void begin() const {}
  void add(int, Floats, Floats) const {}
  void end() const {}
};

// Sum of exp(x - max); the terms go to `exponentials` if asked for, which may be `x` itself.
// `before_step(k)` runs before the terms of columns k .. k + kStep - 1 are stored. `more` adds up
// other sums of x - max and its exponential, in chains as short.
template <bool kStore, class T, class BeforeStep = Nothing, class More = const NoSums>
inline float sum_exponentials(const T* x, int64_t padded, float max, float* exponentials,
                              const BeforeStep& before_step = {}, More& more = {}) {
  // Short chains of additions keep the rounding of the sum small, whatever the vectors' width.
  constexpr int64_t kChain = 16 * kStep;
  const Floats shift = broadcast(max);
  Floats total = broadcast(0.0f);
  for (int64_t first = 0; first < padded; first += kChain) {
    const int64_t last = first + kChain < padded ? first + kChain : padded;
    Floats sum[4];
    for (Floats& lane : sum) lane = broadcast(0.0f);
    more.begin();
    for (int64_t k = first; k < last; k += kStep) {
      Floats z[4];
      for (int i = 0; i < 4; ++i) z[i] = load(x + k + i * kWidth);
      prefetch(x + k);
      before_step(k);
      for (int i = 0; i < 4; ++i) {
        const Floats s = z[i] - shift;
        const Floats e = exponential(s);
        sum[i] = sum[i] + e;
        more.add(i, s, e);
        if constexpr (kStore) store(exponentials + k + i * kWidth, e);
      }
    }
    total = total + sum_of_four(sum);
    more.end();
  }
  return reduce_add(total);
}

inline void multiply(float* a, const float* b, int64_t padded) {
  for (int64_t k = 0; k < padded; k += kWidth) store(a + k, load(a + k) * load(b + k));
}

template <bool kStore, class T, class BeforeStep = Nothing>
inline Part part_of(const T* x, int64_t padded, float* exponentials,
                    const BeforeStep& before_step = {}) {
  const float max = block_max(x, padded);
  return {max, sum_exponentials<kStore>(x, padded, finite_shift(max), exponentials, before_step)};
}

template <class T>
Part block_part(const void* data, int64_t stride, int64_t count, const UnilogitTransform& transform,
                Label& label, float* exponentials) {
  const T* x = static_cast<const T*>(data);
  if (is_plain(stride, count, transform, label)) {
    return exponentials != nullptr ? part_of<true>(x, count, exponentials)
                                   : part_of<false>(x, count, exponentials);
  }
  alignas(kCacheLine) float scratch[kBlock];
  alignas(kCacheLine) float cap_slope[kBlock];
  float* z = exponentials != nullptr ? exponentials : scratch;
  const int64_t padded = stage(x, stride, count, transform, label, z, cap_slope);
  if (exponentials == nullptr) return part_of<false>(z, padded, z);
  const Part part = part_of<true>(z, padded, z);
  if (transform.softcap != 0.0f) multiply(z, cap_slope, padded);
  return part;
}

template <class T>
void block_exponentials(const void* data, int64_t stride, int64_t count,
                        const UnilogitTransform& transform, float max, Label& label,
                        float* exponentials) {
  const T* x = static_cast<const T*>(data);
  if (is_plain(stride, count, transform, label)) {
    sum_exponentials<true>(x, count, max, exponentials);
    return;
  }
  alignas(kCacheLine) float cap_slope[kBlock];
  const int64_t padded = stage(x, stride, count, transform, label, exponentials, cap_slope);
  sum_exponentials<true>(exponentials, padded, max, exponentials);
  if (transform.softcap != 0.0f) multiply(exponentials, cap_slope, padded);
}

// Stores the pending values one by one.
template <class Out>
inline void flush(RowWriter& writer) {
  Out converted[kUnit];
  put<false>(converted, load(writer.values), load(writer.values + kWidth));
  Out* out = static_cast<Out*>(writer.out);
  for (int64_t i = 0; i < writer.pending; ++i) out[i * writer.stride] = converted[i];
  writer.out = out + writer.pending * writer.stride;
  writer.head -= writer.head < writer.pending ? writer.head : writer.pending;
  writer.pending = 0;
}

// A gradient row's values, the same one by one as side by side.
template <bool kConstant, class Values>
inline Values gradient_value(Values exponential, Values factor, Values constant) {
  return kConstant ? fma(exponential, factor, constant) : exponential * factor;
}

template <class Out, bool kStream, bool kConstant>
inline void write_units(RowWriter& writer, const float* exponentials, int64_t count, float factor) {
  const Floats factors = broadcast(factor), constants = broadcast(writer.constant);
  const auto values = [&](int64_t k) {
    return gradient_value<kConstant>(load(exponentials + k), factors, constants);
  };
  Out* out = static_cast<Out*>(writer.out);
  for (int64_t k = 0; k < count; k += kUnit) put<kStream>(out + k, values(k), values(k + kWidth));
  writer.out = out + count;
}

// Whole units go out aligned and straight from the vectors. Values at the row's ends, beside the
// label or across two blocks are collected first, so that no cache line is written twice.
template <class Out, bool kConstant = false>
void write_block(RowWriter& writer, const GradientBlock& block) {
  int64_t k = 0;
  while (k < block.count) {
    const bool label_ahead = block.label >= k && block.label < block.count;
    const int64_t run = (label_ahead ? block.label : block.count) - k;
    if (writer.stride == 1 && writer.head == 0 && writer.pending == 0 && run >= kUnit) {
      const int64_t whole = run / kUnit * kUnit;
      const float* exponentials = block.exponentials + k;
      if (writer.stream) {
        write_units<Out, true, kConstant>(writer, exponentials, whole, block.factor);
      } else {
        write_units<Out, false, kConstant>(writer, exponentials, whole, block.factor);
      }
      k += whole;
      continue;
    }
    const int64_t goal = writer.head > 0 && writer.head < kUnit ? writer.head : kUnit;
    for (; writer.pending < goal && k < block.count; ++k) {
      writer.values[writer.pending++] =
          k == block.label
              ? block.label_value
              : gradient_value<kConstant>(block.exponentials[k], block.factor, writer.constant);
    }
    if (writer.pending < goal) break;
    if (writer.stride == 1 && writer.head == 0 && writer.stream) {
      Out* out = static_cast<Out*>(writer.out);
      put<true>(out, load(writer.values), load(writer.values + kWidth));
      writer.out = out + kUnit;
      writer.pending = 0;
    } else {
      flush<Out>(writer);
    }
  }
  if (block.last) flush<Out>(writer);
}

// Whether write_while_reading can take both blocks.
inline bool can_write_while_reading(const RowWriter& writer, const GradientBlock& block,
                                    int64_t stride, int64_t count,
                                    const UnilogitTransform& transform, const Label& label) {
  return is_plain(stride, count, transform, label) && writer.stride == 1 && writer.head <= kUnit &&
         count == kBlock && block.count == kBlock && (block.label < 0 || block.label >= kBlock);
}

// Reads a plain block, by part_of.
template <class T>
struct PartReader {
  const T* x;
  float* exponentials;

  template <class BeforeStep>
  Part read(const BeforeStep& before_step) const {
    return part_of<true>(x, kBlock, exponentials, before_step);
  }
};

// write_block of an earlier row and the reading of a block of the next one, which takes the same
// memory for its exponentials. Step by step, so that the stores drain behind the arithmetic: stores
// in a row fill the store queue, and the two times add up. A function of its own: its loop needs
// all registers.
template <class Out, bool kStream, bool kConstant, class Reader>
[[gnu::noinline]] auto write_while_reading(RowWriter& writer, const GradientBlock& block,
                                           Reader reader) {
  // Columns that complete a unit begun by the block before: reading runs that far ahead.
  const int64_t begun = writer.head > 0 ? writer.head : writer.pending > 0 ? kUnit : 0;
  const int64_t ahead = begun - writer.pending;
  if (ahead > 0) {
    write_block<Out, kConstant>(writer, {block.exponentials, ahead, block.factor, -1, 0.0f, false});
  }
  return reader.read([&](int64_t k) {
    const float* source = block.exponentials + ahead + k;
    if (k + kStep < kBlock) {
      write_units<Out, kStream, kConstant>(writer, source, kStep, block.factor);
    } else {
      write_block<Out, kConstant>(writer,
                                  {source, kStep - ahead, block.factor, -1, 0.0f, block.last});
    }
  });
}

template <class T, class Out>
Part write_block_and_part(RowWriter& writer, const GradientBlock& block, const void* data,
                          int64_t stride, int64_t count, const UnilogitTransform& transform,
                          Label& label, float* exponentials) {
  if (can_write_while_reading(writer, block, stride, count, transform, label)) {
    const PartReader<T> reader{static_cast<const T*>(data), exponentials};
    return writer.stream ? write_while_reading<Out, true, false>(writer, block, reader)
                         : write_while_reading<Out, false, false>(writer, block, reader);
  }
  write_block<Out>(writer, block);
  return block_part<T>(data, stride, count, transform, label, exponentials);
}
