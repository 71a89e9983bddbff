// The log-odds kernels: running statistics of rows, and gradient rows from complete ones.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "rows.h"

namespace unilogit {
namespace {

// ---- update ------------------------------------------------------------------------------------

// Rows of a state, `[3, n]`, `[4, n]` or `[8, n]`.
enum StateRow { kMax, kSum, kTarget, kRunnerUp, kCount, kLinear, kDot, kSquare };

// Of blocks whose statistics are a Piece: a Part, or Moments where any are asked for.
template <class Piece>
class Update {
 public:
  Update(const Kernels& kernels, const UnilogitMatrix& logits, const int64_t* labels,
         int64_t first_column, float* state, int64_t state_stride, std::int32_t needs,
         const UnilogitTransform& transform)
      : kernels_(kernels),
        logits_(logits),
        labels_(labels),
        first_column_(first_column),
        state_(state),
        stride_(state_stride),
        needs_(needs),
        transform_(transform) {}

  std::int32_t run(int threads) {
    return fold_rows<Piece>(logits_, threads,
                            [&](int64_t row, int64_t first, int64_t last, Piece* parts) {
      compute_parts(row, first, last, parts);
    }, [&](int64_t row, Piece* parts, int64_t blocks) { merge_into_state(row, parts, blocks); });
  }

 private:
  float& at(StateRow which, int64_t row) { return state_[which * stride_ + row]; }

  bool needs(std::int32_t any_of) const { return (needs_ & any_of) != 0; }

  void compute_parts(int64_t row, int64_t first, int64_t last, Piece* parts) {
    const int64_t label_column = labels_[row] - first_column_;
    for (int64_t b = first; b < last; ++b) {
      const Columns columns = block_columns(logits_.columns, b);
      Label label{label_column - columns.first, 0.0f, 1.0f};
      const char* x = element(logits_, row, columns.first);
      if constexpr (std::is_same_v<Piece, Part>) {
        parts[b] = kernels_.block_part[logits_.type](x, logits_.column_stride, columns.count,
                                                     transform_, label, nullptr);
      } else {
        parts[b] = kernels_.moments->block_moments[logits_.type](
            x, logits_.column_stride, columns.count, transform_, needs_, label, nullptr);
      }
      // Only the block that holds the label gets here, hence one thread.
      if (label.offset >= 0 && label.offset < columns.count) {
        float& target = at(kTarget, row);
        if (!(label.logit <= target) && target == target) target = label.logit;
      }
    }
  }

  // The earlier state is one more part, the last one.
  void merge_into_state(int64_t row, Piece* parts, int64_t blocks) {
    Piece& earlier = parts[blocks];
    earlier = {at(kMax, row), at(kSum, row)};
    Piece merged;
    if constexpr (std::is_same_v<Piece, Part>) {
      merged = kernels_.merge(parts, blocks + 1, nullptr);
    } else {
      for_moments(row, [&](float Moments::* moment, float& value) { earlier.*moment = value; });
      merged = kernels_.moments->merge(parts, blocks + 1, needs_, nullptr);
      for_moments(row, [&](float Moments::* moment, float& value) { value = merged.*moment; });
    }
    at(kMax, row) = merged.max;
    at(kSum, row) = merged.sum;
    if (needs(kUnilogitRunnerUp)) {
      float& bits = at(kRunnerUp, row);
      std::int32_t column = kNoColumn;
      if (earlier.max == merged.max) std::memcpy(&column, &bits, sizeof column);
      column = std::min(column, runner_up_of(row, parts, blocks, merged.max));
      std::memcpy(&bits, &column, sizeof column);
    }
  }

  // Calls body(moment, its value in the state) for the moments that are asked for.
  template <class Body>
  void for_moments(int64_t row, const Body& body) {
    if (needs(kUnilogitMean)) {
      body(&Moments::count, at(kCount, row));
      body(&Moments::linear, at(kLinear, row));
    }
    if (needs(kUnilogitEntropy | kUnilogitVariance)) body(&Moments::dot, at(kDot, row));
    if (needs(kUnilogitVariance)) body(&Moments::square, at(kSquare, row));
  }

  // The first column whose logit is the maximum, which only the first block that has it is searched
  // for; so the kernels that pass all columns know nothing of it.
  std::int32_t runner_up_of(int64_t row, const Piece* parts, int64_t blocks, float max) const {
    const auto has_max = [max](const Piece& part) { return part.max == max; };
    const int64_t b = std::find_if(parts, parts + blocks, has_max) - parts;
    if (b == blocks || !(max > -std::numeric_limits<float>::infinity())) return kNoColumn;
    alignas(kCacheLine) float z[kBlock];
    alignas(kCacheLine) float cap_slope[kBlock];
    const Columns columns = block_columns(logits_.columns, b);
    Label label{labels_[row] - first_column_ - columns.first, 0.0f, 1.0f};
    kernels_.stage[logits_.type](element(logits_, row, columns.first), logits_.column_stride,
                                 columns.count, transform_, label, z, cap_slope);
    const int64_t offset = std::find(z, z + columns.count, max) - z;
    if (offset == columns.count) return kNoColumn;  // a thread that flushes subnormal numbers
    return static_cast<std::int32_t>(first_column_ + columns.first + offset);
  }

  const Kernels& kernels_;
  const UnilogitMatrix& logits_;
  const int64_t* labels_;
  int64_t first_column_;
  float* state_;
  int64_t stride_;
  std::int32_t needs_;
  const UnilogitTransform& transform_;
};

// ---- gradient ----------------------------------------------------------------------------------

// Rows of what a gradient is made of: one, three or all.
enum SlopeRow { kRest, kAtLabel, kAtRunnerUp, kTilt, kUniform };

class Gradient {
 public:
  Gradient(const Kernels& kernels, const UnilogitMatrix& logits, const int64_t* labels,
           int64_t first_column, const float* state, int64_t state_stride, const float* slope,
           int64_t slope_stride, std::int32_t slope_rows, const UnilogitMatrix& out,
           const UnilogitTransform& transform)
      : kernels_(kernels),
        logits_(logits),
        labels_(labels),
        first_column_(first_column),
        state_(state),
        state_stride_(state_stride),
        slope_(slope),
        slope_stride_(slope_stride),
        slope_rows_(slope_rows),
        out_(out),
        transform_(transform),
        stream_(out.data != logits.data && worth_streaming(out)) {}

  std::int32_t run(int threads) {
    for_row_segments(logits_, threads, [&](int64_t row, int64_t first, int64_t last) {
      write_blocks(row, first, last);
    });
    return kUnilogitOk;
  }

 private:
  bool is_general() const { return slope_rows_ > kTilt; }

  bool has_runner_up() const { return slope_rows_ > kAtRunnerUp; }

  float slope(int which, int64_t row) const { return slope_[which * slope_stride_ + row]; }

  bool is_zero(int64_t row) const {
    for (int which = 0; which < slope_rows_; ++which) {
      if (slope(which, row) != 0.0f) return false;
    }
    return true;
  }

  void write_blocks(int64_t row, int64_t first_block, int64_t last_block) {
    alignas(kCacheLine) float values[kGradientBlock] = {};
    Block staged;
    const double scale = transform_.scale;
    const RowFactors factors = factors_of(row);
    const bool zero = is_zero(row);
    const int64_t runner_up = has_runner_up() && !zero ? runner_up_of(row) : kNoColumn;
    const float at_label = slope(has_runner_up() ? kAtLabel : kRest, row);
    const int64_t last = std::min(last_block * kBlock, logits_.columns);
    int64_t first = first_block * kBlock;
    RowWriter writer = make_writer(out_, row, first, stream_);
    for (; first < last; first += kGradientBlock) {
      const int64_t count = std::min(kGradientBlock, last - first);
      GradientBlock block{values, count, 0.0f, -1, 0.0f, first + count == last};
      // Where the exponential is 1, as at the runner-up, it is the cap's slope.
      const float* cap_slope = values;
      if (!zero) {
        Label label{labels_[row] - first_column_ - first, 0.0f, 1.0f};
        if (is_general()) {
          cap_slope = general_values(row, first, count, factors, staged, label, values);
          block.factor = 1.0f;
        } else {
          kernels_.block_exponentials[logits_.type](element(logits_, row, first),
                                                    logits_.column_stride, count, transform_,
                                                    factors.shift, label, values);
          block.factor = factors.rest;
        }
        block.label = label.offset;
        block.label_value = static_cast<float>(at_label * scale * label.cap_slope);
      }
      const int64_t offset = runner_up - first_column_ - first;
      if (offset >= 0 && offset < count) {
        const double entry =
            slope(kAtRunnerUp, row) * scale * (cap_slope == nullptr ? 1.0f : cap_slope[offset]);
        write_two_entries(writer, block, offset, static_cast<float>(entry));
      } else {
        kernels_.write_block[out_.type](writer, block);
      }
    }
  }

  RowFactors factors_of(int64_t row) const {
    const float max = state_[row], sum = state_[state_stride_ + row];
    const double scale = transform_.scale;
    const double rest = -(slope(kRest, row) * scale);
    if (!is_general()) return {max, static_cast<float>(rest / sum), 0.0f, 0.0f};
    const double whole = sum == 0.0f ? 1.0 : sum;
    return {finite_shift(max), static_cast<float>(rest / whole),
            static_cast<float>(-(slope(kTilt, row) * scale) / whole),
            static_cast<float>(slope(kUniform, row) * scale)};
  }

  // Finished values of a block, and its cap's slope: null without a cap.
  const float* general_values(int64_t row, int64_t first, int64_t count, const RowFactors& factors,
                              Block& staged, Label& label, float* values) const {
    staged.read(kernels_, {logits_, transform_}, row, first, count, label.offset);
    const float* cap_slope = transform_.softcap == 0.0f ? nullptr : staged.cap_slope;
    kernels_.moments->row_values[staged.type](staged.data, staged.padded, factors, cap_slope,
                                              values);
    label = staged.label;
    return cap_slope;
  }

  int64_t runner_up_of(int64_t row) const {
    std::int32_t column;
    std::memcpy(&column, state_ + kRunnerUp * state_stride_ + row, sizeof column);
    return column;
  }

  // A block with a second entry of its own: written in two pieces where it holds the label too.
  void write_two_entries(RowWriter& writer, GradientBlock block, int64_t second, float value) {
    const bool label_is_here = block.label >= 0 && block.label < block.count;
    if (label_is_here) {
      GradientBlock piece = block;
      piece.last = false;
      piece.count = std::min(block.label, second) + 1;
      if (second < block.label) {
        piece.label = second;
        piece.label_value = value;
        second = block.label;
        value = block.label_value;
      }
      kernels_.write_block[out_.type](writer, piece);
      block.exponentials += piece.count;
      block.count -= piece.count;
      second -= piece.count;
    }
    block.label = second;
    block.label_value = value;
    kernels_.write_block[out_.type](writer, block);
  }

  const Kernels& kernels_;
  const UnilogitMatrix& logits_;
  const int64_t* labels_;
  int64_t first_column_;
  const float* state_;
  int64_t state_stride_;
  const float* slope_;
  int64_t slope_stride_;
  std::int32_t slope_rows_;
  const UnilogitMatrix& out_;
  const UnilogitTransform& transform_;
  bool stream_;
};

}  // namespace
}  // namespace unilogit

using namespace unilogit;

std::int32_t unilogit_log_odds_update(const UnilogitMatrix* logits, const int64_t* labels,
                                      int64_t first_column, float* state, int64_t state_stride,
                                      std::int32_t needs, const UnilogitTransform* transform,
                                      std::int32_t threads) {
  if (logits->rows == 0 || logits->columns == 0) return kUnilogitOk;
  const auto run = [&](auto update) { return update.run(useful_threads(*logits, threads)); };
  const Kernels& kernels = current_kernels();
  if ((needs & kMomentNeeds) == 0) {
    return run(Update<Part>(kernels, *logits, labels, first_column, state, state_stride, needs,
                            *transform));
  }
  return run(Update<Moments>(kernels, *logits, labels, first_column, state, state_stride, needs,
                             *transform));
}

std::int32_t unilogit_log_odds_gradient(const UnilogitMatrix* logits, const int64_t* labels,
                                        int64_t first_column, const float* state,
                                        int64_t state_stride, const float* slope,
                                        int64_t slope_stride, std::int32_t slope_rows,
                                        const UnilogitMatrix* out,
                                        const UnilogitTransform* transform, std::int32_t threads) {
  if (logits->rows == 0 || logits->columns == 0) return kUnilogitOk;
  return Gradient(current_kernels(), *logits, labels, first_column, state, state_stride, slope,
                  slope_stride, slope_rows, *out, *transform)
      .run(useful_threads(*logits, threads));
}
