// The log-odds kernels: running statistics of rows, and gradient rows from complete ones.
#include <algorithm>
#include <cstring>
#include <limits>

#include "rows.h"

namespace unilogit {
namespace {

// ---- update ------------------------------------------------------------------------------------

class Update {
 public:
  Update(const Kernels& kernels, const UnilogitMatrix& logits, const int64_t* labels,
         int64_t first_column, float* state, int64_t state_stride, bool runner_up,
         const UnilogitTransform& transform)
      : kernels_(kernels),
        logits_(logits),
        labels_(labels),
        first_column_(first_column),
        max_(state),
        sum_(state + state_stride),
        target_(state + 2 * state_stride),
        runner_up_(runner_up ? state + 3 * state_stride : nullptr),
        transform_(transform) {}

  std::int32_t run(int threads) {
    return fold_rows<Part>(logits_, threads,
                           [&](int64_t row, int64_t first, int64_t last, Part* parts) {
      compute_parts(row, first, last, parts);
    }, [&](int64_t row, Part* parts, int64_t blocks) { merge_into_state(row, parts, blocks); });
  }

 private:
  void compute_parts(int64_t row, int64_t first, int64_t last, Part* parts) {
    const int64_t label_column = labels_[row] - first_column_;
    for (int64_t b = first; b < last; ++b) {
      const Columns columns = block_columns(logits_.columns, b);
      Label label{label_column - columns.first, 0.0f, 1.0f};
      parts[b] = kernels_.block_part[logits_.type](element(logits_, row, columns.first),
                                                   logits_.column_stride, columns.count, transform_,
                                                   label, nullptr);
      // Only the block that holds the label gets here, hence one thread.
      if (label.offset >= 0 && label.offset < columns.count) {
        const float target = target_[row];
        if (!(label.logit <= target) && target == target) target_[row] = label.logit;
      }
    }
  }

  // The earlier state is one more part, the last one.
  void merge_into_state(int64_t row, Part* parts, int64_t blocks) {
    parts[blocks] = {max_[row], sum_[row]};
    const Part merged = kernels_.merge(parts, blocks + 1, nullptr);
    max_[row] = merged.max;
    sum_[row] = merged.sum;
    if (runner_up_ != nullptr) {
      std::int32_t column = kNoColumn;
      if (parts[blocks].max == merged.max) std::memcpy(&column, runner_up_ + row, sizeof column);
      column = std::min(column, runner_up_of(row, parts, blocks, merged.max));
      std::memcpy(runner_up_ + row, &column, sizeof column);
    }
  }

  // The first column whose logit is the maximum, which only the first block that has it is searched
  // for; so the kernels that pass all columns know nothing of it.
  std::int32_t runner_up_of(int64_t row, const Part* parts, int64_t blocks, float max) const {
    const auto has_max = [max](const Part& part) { return part.max == max; };
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
  float* max_;
  float* sum_;
  float* target_;
  float* runner_up_;  // bits of an int32; null where nobody asks
  const UnilogitTransform& transform_;
};

// ---- gradient ----------------------------------------------------------------------------------

class Gradient {
 public:
  Gradient(const Kernels& kernels, const UnilogitMatrix& logits, const int64_t* labels,
           int64_t first_column, const float* state, int64_t state_stride, const float* slope,
           int64_t slope_stride, const UnilogitMatrix& out, const UnilogitTransform& transform)
      : kernels_(kernels),
        logits_(logits),
        labels_(labels),
        first_column_(first_column),
        max_(state),
        sum_(state + state_stride),
        slope_(slope),
        at_label_(slope + slope_stride),
        at_runner_up_(slope_stride == 0 ? nullptr : slope + 2 * slope_stride),
        runner_up_(slope_stride == 0 ? nullptr : state + 3 * state_stride),
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
  void write_blocks(int64_t row, int64_t first_block, int64_t last_block) {
    alignas(kCacheLine) float exponentials[kGradientBlock] = {};
    const double scale = transform_.scale;
    const auto factor = static_cast<float>(-(slope_[row] * scale) / sum_[row]);
    const RunnerUp runner_up = runner_up_of(row);
    const bool counts = slope_[row] != 0.0f || at_label_[row] != 0.0f || runner_up.entry != 0.0f;
    const int64_t last = std::min(last_block * kBlock, logits_.columns);
    int64_t first = first_block * kBlock;
    RowWriter writer = make_writer(out_, row, first, stream_);
    for (; first < last; first += kGradientBlock) {
      const int64_t count = std::min(kGradientBlock, last - first);
      GradientBlock block{exponentials, count, 0.0f, -1, 0.0f, first + count == last};
      if (counts) {
        Label label{labels_[row] - first_column_ - first, 0.0f, 1.0f};
        kernels_.block_exponentials[logits_.type](element(logits_, row, first),
                                                  logits_.column_stride, count, transform_,
                                                  max_[row], label, exponentials);
        block.factor = factor;
        block.label = label.offset;
        block.label_value = static_cast<float>(at_label_[row] * scale * label.cap_slope);
      }
      const int64_t offset = runner_up.column - first_column_ - first;
      if (counts && offset >= 0 && offset < count) {
        // exp(z - max) is 1 there, times the cap's slope.
        const double entry = runner_up.entry * scale * exponentials[offset];
        write_two_entries(writer, block, offset, static_cast<float>(entry));
      } else {
        kernels_.write_block[out_.type](writer, block);
      }
    }
  }

  // The runner-up's column, and its entry but for dz/dx.
  struct RunnerUp {
    int64_t column;
    float entry;
  };

  RunnerUp runner_up_of(int64_t row) const {
    if (runner_up_ == nullptr) return {kNoColumn, 0.0f};
    std::int32_t column;
    std::memcpy(&column, runner_up_ + row, sizeof column);
    return {column, at_runner_up_[row]};
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
  const float* max_;
  const float* sum_;
  const float* slope_;  // of the rest
  const float* at_label_;
  const float* at_runner_up_;  // null where the runner-up is as the rest
  const float* runner_up_;     // bits of an int32; null likewise
  const UnilogitMatrix& out_;
  const UnilogitTransform& transform_;
  bool stream_;
};

}  // namespace
}  // namespace unilogit

using namespace unilogit;

std::int32_t unilogit_log_odds_update(const UnilogitMatrix* logits, const int64_t* labels,
                                      int64_t first_column, float* state, int64_t state_stride,
                                      std::int32_t runner_up, const UnilogitTransform* transform,
                                      std::int32_t threads) {
  if (logits->rows == 0 || logits->columns == 0) return kUnilogitOk;
  return Update(current_kernels(), *logits, labels, first_column, state, state_stride,
                runner_up != 0, *transform)
      .run(useful_threads(*logits, threads));
}

std::int32_t unilogit_log_odds_gradient(const UnilogitMatrix* logits, const int64_t* labels,
                                        int64_t first_column, const float* state,
                                        int64_t state_stride, const float* slope,
                                        int64_t slope_stride, const UnilogitMatrix* out,
                                        const UnilogitTransform* transform, std::int32_t threads) {
  if (logits->rows == 0 || logits->columns == 0) return kUnilogitOk;
  return Gradient(current_kernels(), *logits, labels, first_column, state, state_stride, slope,
                  slope_stride, *out, *transform)
      .run(useful_threads(*logits, threads));
}
