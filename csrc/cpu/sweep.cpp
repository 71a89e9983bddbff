// Statistics, objective and gradient of whole rows, each row while it is in the cache.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "rows.h"

namespace unilogit {
namespace {

// What one row needs while it is worked on: parts of its blocks, their weights, and exponentials.
template <class Piece>
struct RowScratch {
  Piece* parts;
  float* weights;
  float* exponentials;  // null where no gradient is asked for
};

// Lays out `count` RowScratch of rows with `blocks` blocks each.
template <class Piece>
class RowScratches {
 public:
  RowScratches(int64_t count, int64_t blocks, bool with_exponentials)
      : exponentials_bytes_(with_exponentials ? blocks * kBlock * int64_t{sizeof(float)} : 0),
        parts_bytes_(divide_up(blocks * int64_t{sizeof(Piece)}, kCacheLine) * kCacheLine),
        stride_(exponentials_bytes_ + 2 * parts_bytes_),
        base_(static_cast<char*>(scratch.reserve(std::max(count * stride_, kCacheLine)))) {}

  bool ok() const { return base_ != nullptr; }

  RowScratch<Piece> operator[](int64_t k) const {
    char* base = base_ + k * stride_;
    return {reinterpret_cast<Piece*>(base + exponentials_bytes_),
            reinterpret_cast<float*>(base + exponentials_bytes_ + parts_bytes_),
            exponentials_bytes_ == 0 ? nullptr : reinterpret_cast<float*>(base)};
  }

 private:
  int64_t exponentials_bytes_;
  int64_t parts_bytes_;
  int64_t stride_;
  char* base_;
};

ObjectiveTerms objective_terms(std::int32_t objective, int64_t vocab_size) {
  const auto v = static_cast<double>(vocab_size);
  return {objective, 1.0 / v, -std::log(v - 1.0), std::log1p(1.0 / (v - 1.0))};
}

StatisticsTerms statistics_terms(const float* weights, int64_t vocab_size) {
  return {weights[0], weights[1], weights[2],
          weights[3], weights[4], static_cast<double>(vocab_size)};
}

// The moments that a loss needs of a row: what its weights leave out is not computed.
std::int32_t moment_needs(const ObjectiveTerms&) { return 0; }

std::int32_t moment_needs(const StatisticsTerms& terms) {
  return (terms.uniform != 0.0 ? kUnilogitMean : 0) | (terms.entropy != 0.0 ? kUnilogitEntropy : 0);
}

// Of a loss by its Terms: an objective of the log-odds, whose gradient rows are multiples of
// `onehot - softmax of the rest`, or weighted statistics, whose rows are general.
template <class Terms>
class Sweep {
 public:
  Sweep(const Kernels& kernels, const UnilogitMatrix& logits, const int64_t* labels,
        const float* row_weight, const Terms& terms, const UnilogitMatrix* out, float* loss,
        const UnilogitTransform& transform)
      : kernels_(kernels),
        logits_(logits),
        labels_(labels),
        row_weight_(row_weight),
        terms_(terms),
        needs_(moment_needs(terms)),
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
    const Scratches scratches(threads, blocks_, out_ != nullptr);
    if (!scratches.ok()) return kUnilogitOutOfMemory;
    if (whole_rows > 0) run_whole(threads, active.data(), whole_rows, scratches);
    if (cut_rows > 0) run_cut(threads, active.data() + whole_rows, cut_rows, scratches);
    parallel_for(threads, static_cast<int64_t>(inactive.size()), grain(),
                 [&](int64_t k) { skip_row(inactive[static_cast<std::size_t>(k)]); });
    return kUnilogitOk;
  }

 private:
  static constexpr bool kGeneral = std::is_same_v<Terms, StatisticsTerms>;
  using Piece = std::conditional_t<kGeneral, Moments, Part>;
  using Scratch = RowScratch<Piece>;
  using Scratches = RowScratches<Piece>;

  // A row whose statistics are done and whose gradient is still to be written: factors of the
  // exponentials relative to the row's maximum, and, of a general row, of these times z - maximum,
  // and a constant.
  struct PendingRow {
    RowWriter writer;
    int64_t label_column;
    float label_value;
    double factor;
    double tilt = 0.0;
    float constant = 0.0f;
    float shift = 0.0f;
    int64_t row = 0;
  };

  // Whether a row's values are more than a factor and a constant make of exponentials.
  bool is_unfinished(const PendingRow& pending) const {
    return kGeneral && (pending.tilt != 0.0 || (capped() && pending.constant != 0.0f));
  }

  bool capped() const { return transform_.softcap != 0.0f; }

  RowWriter writer_of(const PendingRow& pending, int64_t column) const {
    RowWriter writer = make_writer(*out_, pending.row, column, stream_);
    if (!is_unfinished(pending)) writer.constant = pending.constant;
    return writer;
  }

  int64_t grain() const {
    return std::max<int64_t>(1, kGrainColumns / std::max<int64_t>(1, logits_.columns));
  }

  void run_whole(int threads, const int64_t* rows, int64_t count, const Scratches& scratches) {
    ItemQueue queue(count, grain());
    run_team(threads, [&](int thread) {
      const Scratch row_scratch = scratches[thread];
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
        write(pending, row_scratch, b, b + 1 == blocks_);
      }
    });
  }

  // Few rows: every thread works on segments of all of them.
  void run_cut(int threads, const int64_t* rows, int64_t count, const Scratches& scratches) {
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
      segment.writer = writer_of(segment, first * kBlock);
      for (int64_t b = first; b < last; ++b) write(segment, scratches[k], b, b + 1 == last);
    });
  }

  // Offsets count from the row's first column here.
  Label make_label(int64_t row) const {
    return {labels_[row], -std::numeric_limits<float>::infinity(), 1.0f};
  }

  // Also writes the same block of `pending`, whose exponentials the new ones replace.
  void compute_block(int64_t row, int64_t b, Label& row_label, const Scratch& row_scratch,
                     PendingRow* pending) {
    const Columns columns = block_columns(logits_.columns, b);
    // Only the thread that meets the label writes to `row_label`, and nobody else reads it.
    Label label{row_label.offset - columns.first, 0.0f, 1.0f};
    float* exponentials = out_ == nullptr ? nullptr : row_scratch.exponentials + columns.first;
    const char* x = element(logits_, row, columns.first);
    Piece& part = row_scratch.parts[b];
    if (pending == nullptr) {
      part = read_block(x, columns.count, label, exponentials);
    } else {
      const GradientBlock block = gradient_block(*pending, row_scratch, b, b + 1 == blocks_);
      part = write_and_read(pending->writer, block, x, columns.count, label, exponentials);
    }
    if (label.offset >= 0 && label.offset < columns.count) {
      row_label.logit = label.logit;
      row_label.cap_slope = label.cap_slope;
    }
  }

  Piece read_block(const char* x, int64_t count, Label& label, float* exponentials) const {
    if constexpr (kGeneral) {
      if (needs_ != 0) {
        return kernels_.moments->block_moments[logits_.type](
            x, logits_.column_stride, count, transform_, needs_, label, exponentials);
      }
    }
    const Part part = kernels_.block_part[logits_.type](x, logits_.column_stride, count, transform_,
                                                        label, exponentials);
    return {part.max, part.sum};
  }

  Piece write_and_read(RowWriter& writer, const GradientBlock& block, const char* x, int64_t count,
                       Label& label, float* exponentials) const {
    if constexpr (kGeneral) {
      if (needs_ != 0) {
        return kernels_.moments->write_block_and_moments[logits_.type][out_->type](
            writer, block, x, logits_.column_stride, count, transform_, needs_, label,
            exponentials);
      }
    }
    // Without a mean there is no constant.
    const Part part = kernels_.write_block_and_part[logits_.type][out_->type](
        writer, block, x, logits_.column_stride, count, transform_, label, exponentials);
    return {part.max, part.sum};
  }

  void write(PendingRow& pending, const Scratch& row_scratch, int64_t b, bool last) const {
    const auto* write_block = kGeneral ? kernels_.moments->write_block : kernels_.write_block;
    write_block[out_->type](pending.writer, gradient_block(pending, row_scratch, b, last));
  }

  // True if a gradient that is not zero remains to be written.
  bool finish_row(int64_t row, const Label& label, const Scratch& row_scratch,
                  PendingRow& pending) {
    const bool exists = label.offset >= 0 && label.offset < logits_.columns;
    bool counts;
    if constexpr (kGeneral) {
      counts = finish_statistics(row, label, exists, row_scratch, pending);
    } else {
      counts = finish_objective(row, label, exists, row_scratch, pending);
    }
    if (out_ == nullptr) return false;
    if (!counts) {
      write_zeros(kernels_, *out_, row, stream_);
      return false;
    }
    pending.row = row;
    pending.label_column = label.offset;
    pending.writer = writer_of(pending, 0);
    return true;
  }

  // Whether the gradient row is not zero.
  bool finish_objective(int64_t row, const Label& label, bool exists, const Scratch& row_scratch,
                        PendingRow& pending) {
    const Part rest = kernels_.merge(row_scratch.parts, blocks_, row_scratch.weights);
    const RowResult result = kernels_.finish_row(rest, label.logit, exists, terms_);
    loss_[row] = static_cast<float>(result.loss);
    const auto slope = static_cast<float>(row_weight_[row] * result.slope);
    const double outer_slope = static_cast<double>(slope) * transform_.scale;
    pending.factor = -outer_slope / rest.sum;
    pending.label_value = static_cast<float>(outer_slope * label.cap_slope);
    return slope != 0.0f;
  }

  bool finish_statistics(int64_t row, const Label& label, bool exists, const Scratch& row_scratch,
                         PendingRow& pending) {
    const Moments rest =
        kernels_.moments->merge(row_scratch.parts, blocks_, needs_, row_scratch.weights);
    const StatisticsResult result = kernels_.moments->finish_row(rest, label.logit, exists, terms_);
    loss_[row] = static_cast<float>(result.loss);
    if (terms_.squared_logsumexp != 0.0) {
      loss_[logits_.rows + row] = static_cast<float>(result.of_logsumexp);
    }
    const double scale = static_cast<double>(row_weight_[row]) * transform_.scale;
    const double sum = rest.sum == 0.0f ? 1.0 : rest.sum;
    pending.factor = -scale * result.rest / sum;
    pending.tilt = -scale * result.tilt / sum;
    pending.constant = static_cast<float>(scale * result.uniform);
    pending.label_value = static_cast<float>(scale * result.at_label * label.cap_slope);
    pending.shift = finite_shift(rest.max);
    return result.rest != 0.0 || result.at_label != 0.0 || result.tilt != 0.0 ||
           result.uniform != 0.0;
  }

  // Of the exponentials, which it turns into finished values where they take more than a factor.
  GradientBlock gradient_block(const PendingRow& pending, const Scratch& row_scratch, int64_t b,
                               bool last) const {
    const Columns columns = block_columns(logits_.columns, b);
    float* exponentials = row_scratch.exponentials + columns.first;
    const double weight = row_scratch.weights[b];
    GradientBlock block{exponentials,
                        columns.count,
                        static_cast<float>(weight * pending.factor),
                        pending.label_column - columns.first,
                        pending.label_value,
                        last};
    if (is_unfinished(pending)) {
      // The logits are read again, before anything is written in their place.
      Block staged;
      staged.read(kernels_, {logits_, transform_}, pending.row, columns.first, columns.count,
                  block.label);
      kernels_.moments->finish_values[staged.type](
          staged.data, staged.padded,
          {pending.shift, block.factor, static_cast<float>(weight * pending.tilt),
           pending.constant},
          capped() ? staged.cap_slope : nullptr, exponentials);
      block.factor = 1.0f;
    }
    return block;
  }

  void skip_row(int64_t row) {
    loss_[row] = 0.0f;
    if constexpr (kGeneral) {
      if (terms_.squared_logsumexp != 0.0) loss_[logits_.rows + row] = 0.0f;
    }
    if (out_ != nullptr) write_zeros(kernels_, *out_, row, stream_);
  }

  const Kernels& kernels_;
  const UnilogitMatrix& logits_;
  const int64_t* labels_;
  const float* row_weight_;
  Terms terms_;
  std::int32_t needs_;
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
                                     const float* weights, int64_t vocab_size,
                                     const UnilogitMatrix* out, float* loss,
                                     const UnilogitTransform* transform, std::int32_t threads) {
  if (logits->rows == 0) return kUnilogitOk;
  const auto run = [&](const auto& terms) {
    return Sweep(current_kernels(), *logits, labels, row_weight, terms, out, loss, *transform)
        .run(useful_threads(*logits, threads));
  };
  return objective == kUnilogitWeightedStatistics ? run(statistics_terms(weights, vocab_size))
                                                  : run(objective_terms(objective, vocab_size));
}
