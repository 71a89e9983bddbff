// The library: choice of the instruction set, division of the work among threads, entry points.
#include "api.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rows.h"

namespace unilogit {
namespace {

// ---- instruction sets --------------------------------------------------------------------------

bool processor_supports(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (&kernels == &kAvx2Kernels) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (&kernels == &kAvx512Kernels) return avx512;
  if (&kernels == &kAvx512Bf16Kernels) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return &kernels == &kBaselineKernels;
}

// Best first.
const Kernels* const kInstructionSets[] = {
#if defined(__x86_64__)
    &kAvx512Bf16Kernels,
    &kAvx512Kernels,
    &kAvx2Kernels,
#endif
    &kBaselineKernels,
};

const Kernels* find_kernels(const char* name) {
  for (const Kernels* kernels : kInstructionSets) {
    if ((*name == '\0' || std::strcmp(name, kernels->name) == 0) && processor_supports(*kernels)) {
      return kernels;
    }
  }
  return nullptr;
}

std::atomic<const Kernels*> selected_kernels{nullptr};

}  // namespace

const Kernels& current_kernels() {
  const Kernels* kernels = selected_kernels.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = find_kernels("");
    selected_kernels.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

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
    return fold_rows<Part>(
        logits_, threads,
        [&](int64_t row, int64_t first, int64_t last, Part* parts) {
          compute_parts(row, first, last, parts);
        },
        [&](int64_t row, Part* parts, int64_t blocks) { merge_into_state(row, parts, blocks); });
  }

 private:
  void compute_parts(int64_t row, int64_t first, int64_t last, Part* parts) {
    const int64_t label_column = labels_[row] - first_column_;
    for (int64_t b = first; b < last; ++b) {
      const Columns columns = block_columns(logits_.columns, b);
      Label label{label_column - columns.first, 0.0f, 1.0f};
      parts[b] = kernels_.block_part[logits_.type](element(logits_, row, columns.first),
                                                   logits_.column_stride, columns.count,
                                                   transform_, label, nullptr);
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
  // for; so the kernels that visit all columns know nothing of it.
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
  const float* slope_;         // of the rest
  const float* at_label_;
  const float* at_runner_up_;  // null where the runner-up is as the rest
  const float* runner_up_;     // bits of an int32; null likewise
  const UnilogitMatrix& out_;
  const UnilogitTransform& transform_;
  bool stream_;
};

// ---- sweep -------------------------------------------------------------------------------------

// What one row needs while it is worked on: parts and factors of its blocks, and exponentials.
struct RowScratch {
  Part* parts;
  float* factors;
  float* exponentials;  // null where no gradient is asked for
};

// Lays out `count` RowScratch of rows with `blocks` blocks each.
class RowScratches {
 public:
  RowScratches(int64_t count, int64_t blocks, bool with_exponentials)
      : exponentials_bytes_(with_exponentials ? blocks * kBlock * int64_t{sizeof(float)} : 0),
        parts_bytes_(divide_up(blocks * int64_t{sizeof(Part)}, kCacheLine) * kCacheLine),
        stride_(exponentials_bytes_ + 2 * parts_bytes_),
        base_(static_cast<char*>(scratch.reserve(std::max(count * stride_, kCacheLine)))) {}

  bool ok() const { return base_ != nullptr; }

  RowScratch operator[](int64_t k) const {
    char* base = base_ + k * stride_;
    return {reinterpret_cast<Part*>(base + exponentials_bytes_),
            reinterpret_cast<float*>(base + exponentials_bytes_ + parts_bytes_),
            exponentials_bytes_ == 0 ? nullptr : reinterpret_cast<float*>(base)};
  }

 private:
  int64_t exponentials_bytes_;
  int64_t parts_bytes_;
  int64_t stride_;
  char* base_;
};

ObjectiveTerms make_terms(std::int32_t objective, int64_t vocab_size) {
  const auto v = static_cast<double>(vocab_size);
  return {objective, 1.0 / v, -std::log(v - 1.0), std::log1p(1.0 / (v - 1.0))};
}

class Sweep {
 public:
  Sweep(const Kernels& kernels, const UnilogitMatrix& logits, const int64_t* labels,
        const float* row_weight, const ObjectiveTerms& terms, const UnilogitMatrix* out,
        float* loss, const UnilogitTransform& transform)
      : kernels_(kernels),
        logits_(logits),
        labels_(labels),
        row_weight_(row_weight),
        terms_(terms),
        out_(out),
        loss_(loss),
        transform_(transform),
        blocks_(divide_up(logits.columns, kBlock)),
        stream_(out != nullptr && worth_streaming(*out)) {}

  std::int32_t run(int threads) {
    std::vector<int64_t> active, inactive;
    for (int64_t row = 0; row < logits_.rows; ++row) {
      (row_weight_[row] == 0.0f ? inactive : active).push_back(row);
    }
    const auto rows = static_cast<int64_t>(active.size());
    // Rows beyond a multiple of the threads are cut into segments, so that no thread idles.
    const int64_t cut_rows = rows % threads;
    const int64_t whole_rows = rows - cut_rows;
    const RowScratches scratches(threads, blocks_, out_ != nullptr);
    if (!scratches.ok()) return kUnilogitOutOfMemory;
    if (whole_rows > 0) run_whole(threads, active.data(), whole_rows, scratches);
    if (cut_rows > 0) run_cut(threads, active.data() + whole_rows, cut_rows, scratches);
    parallel_for(threads, static_cast<int64_t>(inactive.size()), grain(),
                 [&](int64_t k) { skip_row(inactive[static_cast<std::size_t>(k)]); });
    return kUnilogitOk;
  }

 private:
  // A row whose statistics are done and whose gradient is still to be written.
  struct PendingRow {
    RowWriter writer;
    int64_t label_column;
    float label_value;
  };

  int64_t grain() const {
    return std::max<int64_t>(1, kGrainColumns / std::max<int64_t>(1, logits_.columns));
  }

  void run_whole(int threads, const int64_t* rows, int64_t count, const RowScratches& scratches) {
    ItemQueue queue(count, grain());
    run_team(threads, [&](int thread) {
      const RowScratch row_scratch = scratches[thread];
      PendingRow pending;
      bool has_pending = false;
      ItemQueue::Cursor cursor;
      int64_t k;
      while (queue.next(cursor, k)) {
        const int64_t row = rows[k];
        Label label = make_label(row);
        // The writes of one row hide behind the arithmetic of the next.
        for (int64_t b = 0; b < blocks_; ++b) {
          compute_block(row, b, label, row_scratch, has_pending ? &pending : nullptr);
        }
        has_pending = finish_row(row, label, row_scratch, pending);
      }
      for (int64_t b = 0; has_pending && b < blocks_; ++b) {
        kernels_.write_block[out_->type](
            pending.writer, gradient_block(pending, row_scratch, b, b + 1 == blocks_));
      }
    });
  }

  // Few rows: every thread works on segments of all of them.
  void run_cut(int threads, const int64_t* rows, int64_t count, const RowScratches& scratches) {
    const Segments cut(count, logits_.columns, threads);
    std::vector<Label> labels(static_cast<std::size_t>(count));
    std::vector<PendingRow> pending(static_cast<std::size_t>(count));
    std::vector<char> has_pending(static_cast<std::size_t>(count));
    for (int64_t k = 0; k < count; ++k) labels[k] = make_label(rows[k]);
    const auto for_segments = [&](const auto& body) {
      parallel_for(threads, count * cut.segments, 1, [&](int64_t item) {
        const int64_t segment = item % cut.segments;
        body(item / cut.segments, cut.first_block(segment), cut.first_block(segment + 1));
      });
    };
    for_segments([&](int64_t k, int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        compute_block(rows[k], b, labels[k], scratches[k], nullptr);
      }
    });
    parallel_for(threads, count, 1, [&](int64_t k) {
      has_pending[k] = finish_row(rows[k], labels[k], scratches[k], pending[k]);
    });
    if (out_ == nullptr) return;
    for_segments([&](int64_t k, int64_t first, int64_t last) {
      if (!has_pending[k]) return;
      PendingRow segment = pending[k];
      segment.writer = make_writer(*out_, rows[k], first * kBlock, stream_);
      for (int64_t b = first; b < last; ++b) {
        kernels_.write_block[out_->type](segment.writer,
                                         gradient_block(segment, scratches[k], b, b + 1 == last));
      }
    });
  }

  // Offsets count from the row's first column here.
  Label make_label(int64_t row) const {
    return {labels_[row], -std::numeric_limits<float>::infinity(), 1.0f};
  }

  // Also writes the same block of `pending`, whose exponentials the new ones replace.
  void compute_block(int64_t row, int64_t b, Label& row_label, const RowScratch& row_scratch,
                     PendingRow* pending) {
    const Columns columns = block_columns(logits_.columns, b);
    // Only the thread that meets the label writes to `row_label`, and nobody else reads it.
    Label label{row_label.offset - columns.first, 0.0f, 1.0f};
    float* exponentials =
        out_ == nullptr ? nullptr : row_scratch.exponentials + columns.first;
    const char* x = element(logits_, row, columns.first);
    row_scratch.parts[b] =
        pending == nullptr
            ? kernels_.block_part[logits_.type](x, logits_.column_stride, columns.count,
                                                transform_, label, exponentials)
            : kernels_.write_block_and_part[logits_.type][out_->type](
                  pending->writer, gradient_block(*pending, row_scratch, b, b + 1 == blocks_), x,
                  logits_.column_stride, columns.count, transform_, label, exponentials);
    if (label.offset >= 0 && label.offset < columns.count) {
      row_label.logit = label.logit;
      row_label.cap_slope = label.cap_slope;
    }
  }

  // True if a gradient that is not zero remains to be written.
  bool finish_row(int64_t row, const Label& label, const RowScratch& row_scratch,
                  PendingRow& pending) {
    const Part rest = kernels_.merge(row_scratch.parts, blocks_, row_scratch.factors);
    const bool exists = label.offset >= 0 && label.offset < logits_.columns;
    const RowResult result = kernels_.finish_row(rest, label.logit, exists, terms_);
    loss_[row] = static_cast<float>(result.loss);
    if (out_ == nullptr) return false;
    const auto slope = static_cast<float>(row_weight_[row] * result.slope);
    if (slope == 0.0f) {
      write_zeros(kernels_, *out_, row, stream_);
      return false;
    }
    const double outer_slope = static_cast<double>(slope) * transform_.scale;
    for (int64_t b = 0; b < blocks_; ++b) {
      row_scratch.factors[b] =
          static_cast<float>(row_scratch.factors[b] * (-outer_slope / rest.sum));
    }
    pending.writer = make_writer(*out_, row, 0, stream_);
    pending.label_column = label.offset;
    pending.label_value = static_cast<float>(outer_slope * label.cap_slope);
    return true;
  }

  GradientBlock gradient_block(const PendingRow& pending, const RowScratch& row_scratch, int64_t b,
                               bool last) const {
    const Columns columns = block_columns(logits_.columns, b);
    return {row_scratch.exponentials + columns.first,
            columns.count,
            row_scratch.factors[b],
            pending.label_column - columns.first,
            pending.label_value,
            last};
  }

  void skip_row(int64_t row) {
    loss_[row] = 0.0f;
    if (out_ != nullptr) write_zeros(kernels_, *out_, row, stream_);
  }

  const Kernels& kernels_;
  const UnilogitMatrix& logits_;
  const int64_t* labels_;
  const float* row_weight_;
  ObjectiveTerms terms_;
  const UnilogitMatrix* out_;
  float* loss_;
  const UnilogitTransform& transform_;
  int64_t blocks_;
  bool stream_;
};

}  // namespace
}  // namespace unilogit

using namespace unilogit;

std::int32_t unilogit_select_instruction_set(const char* name) {
  const Kernels* kernels = find_kernels(name);
  if (kernels == nullptr) return kUnilogitUnsupported;
  selected_kernels.store(kernels, std::memory_order_release);
  return kUnilogitOk;
}

std::int32_t unilogit_interface(void) { return UNILOGIT_INTERFACE; }

const char* unilogit_instruction_set(void) { return current_kernels().name; }

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
                                        const UnilogitTransform* transform,
                                        std::int32_t threads) {
  if (logits->rows == 0 || logits->columns == 0) return kUnilogitOk;
  return Gradient(current_kernels(), *logits, labels, first_column, state, state_stride, slope,
                  slope_stride, *out, *transform)
      .run(useful_threads(*logits, threads));
}

std::int32_t unilogit_log_odds_sweep(const UnilogitMatrix* logits, const int64_t* labels,
                                     const float* row_weight, std::int32_t objective,
                                     int64_t vocab_size, const UnilogitMatrix* out, float* loss,
                                     const UnilogitTransform* transform, std::int32_t threads) {
  if (logits->rows == 0) return kUnilogitOk;
  return Sweep(current_kernels(), *logits, labels, row_weight, make_terms(objective, vocab_size),
               out, loss, *transform)
      .run(useful_threads(*logits, threads));
}

void unilogit_stream_copy(const void* source, void* destination, int64_t bytes,
                          std::int32_t threads) {
  const Kernels& kernels = current_kernels();
  constexpr int64_t kPiece = int64_t{1} << 16;
  parallel_for(std::max(threads, 1), divide_up(bytes, kPiece), 1, [&](int64_t piece) {
    const int64_t first = piece * kPiece;
    kernels.stream_copy(static_cast<const char*>(source) + first,
                        static_cast<char*>(destination) + first, std::min(kPiece, bytes - first));
  });
}

void unilogit_populate([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes,
                       [[maybe_unused]] std::int32_t threads) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, newer than many headers
  constexpr int64_t kPiece = int64_t{2} << 20;  // a huge page, which two threads must not share
  parallel_for(std::max(threads, 1), divide_up(bytes, kPiece), 1, [&](int64_t piece) {
    const int64_t first = piece * kPiece;
    madvise(static_cast<char*>(memory) + first,
            static_cast<std::size_t>(std::min(kPiece, bytes - first)), kPopulateWrite);
  });
#endif
}

void unilogit_exp(const float* x, float* result, int64_t count) {
  current_kernels().exp(x, result, count);
}

void unilogit_tanh(const float* x, float* result, float* slope, int64_t count) {
  current_kernels().tanh(x, result, slope, count);
}
