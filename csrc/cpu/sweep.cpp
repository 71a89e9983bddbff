// Statistics, objective and gradient of whole rows, each row while it is in the cache.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "rows.h"

namespace unilogit {
namespace {

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
        kernels_.write_block[out_->type](pending.writer,
                                         gradient_block(pending, row_scratch, b, b + 1 == blocks_));
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
    float* exponentials = out_ == nullptr ? nullptr : row_scratch.exponentials + columns.first;
    const char* x = element(logits_, row, columns.first);
    row_scratch.parts[b] =
        pending == nullptr
            ? kernels_.block_part[logits_.type](x, logits_.column_stride, columns.count, transform_,
                                                label, exponentials)
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
    return {row_scratch.exponentials + columns.first, columns.count,       row_scratch.factors[b],
            pending.label_column - columns.first,     pending.label_value, last};
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

std::int32_t unilogit_log_odds_sweep(const UnilogitMatrix* logits, const int64_t* labels,
                                     const float* row_weight, std::int32_t objective,
                                     int64_t vocab_size, const UnilogitMatrix* out, float* loss,
                                     const UnilogitTransform* transform, std::int32_t threads) {
  if (logits->rows == 0) return kUnilogitOk;
  return Sweep(current_kernels(), *logits, labels, row_weight, make_terms(objective, vocab_size),
               out, loss, *transform)
      .run(useful_threads(*logits, threads));
}
