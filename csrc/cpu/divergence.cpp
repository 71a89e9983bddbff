// The two-row kernels: statistics and gradient of KL(P_a || P_b) between rows of the same columns.
#include "rows.h"

namespace unilogit {
namespace {

// Rows of a pair's state, `[7, n]`.
enum StateRow { kAMax, kASum, kADot, kBMax, kBSum, kATarget, kBTarget };

void keep_larger(float& target, float logit) {
  if (!(logit <= target) && target == target) target = logit;
}

std::int32_t update(const Kernels& kernels, const Side& a, const Side& b, const int64_t* labels,
                    int64_t first_column, float* state, int64_t stride, int threads) {
  const auto compute = [&](int64_t row, int64_t first, int64_t last, PairPart* parts) {
    Block a_block, b_block;
    for (int64_t k = first; k < last; ++k) {
      const Columns columns = block_columns(a.logits.columns, k);
      const int64_t offset = labels[row] - first_column - columns.first;
      a_block.read(kernels, a, row, columns.first, columns.count, offset);
      b_block.read(kernels, b, row, columns.first, columns.count, offset);
      parts[k] =
          kernels.pair_part[a_block.type][b_block.type](a_block.data, b_block.data, a_block.padded);
      // Only the block that holds the label gets here, hence one thread.
      if (offset >= 0 && offset < columns.count) {
        keep_larger(state[kATarget * stride + row], a_block.label.logit);
        keep_larger(state[kBTarget * stride + row], b_block.label.logit);
      }
    }
  };
  // The earlier state is one more part, the last one.
  const auto merge = [&](int64_t row, PairPart* parts, int64_t blocks) {
    float* s = state + row;
    parts[blocks] = {s[kAMax * stride], s[kASum * stride], s[kADot * stride], s[kBMax * stride],
                     s[kBSum * stride]};
    const PairPart merged = kernels.merge_pairs(parts, blocks + 1);
    s[kAMax * stride] = merged.a_max;
    s[kASum * stride] = merged.a_sum;
    s[kADot * stride] = merged.a_dot;
    s[kBMax * stride] = merged.b_max;
    s[kBSum * stride] = merged.b_sum;
  };
  return fold_rows<PairPart>(a.logits, threads, compute, merge);
}

// alpha, beta, gamma and the label's entry, `[4, n]`.
struct Coefficients {
  const float* data;
  int64_t stride;

  float at(int64_t which, int64_t row) const { return data[which * stride + row]; }

  bool all_zero(int64_t row) const {
    for (int64_t k = 0; k < 4; ++k) {
      if (at(k, row) != 0.0f) return false;
    }
    return true;
  }
};

void gradient(const Kernels& kernels, const Side& a, const Side& b, const int64_t* labels,
              int64_t first_column, const float* state, int64_t state_stride,
              const Coefficients& coefficients, bool student_is_a, const UnilogitMatrix& out,
              int threads) {
  const Side& student = student_is_a ? a : b;
  const bool stream = out.data != student.logits.data && worth_streaming(out);
  const double scale = student.transform.scale;
  for_row_segments(a.logits, threads, [&](int64_t row, int64_t first_block, int64_t last_block) {
    alignas(kCacheLine) float values[kGradientBlock] = {};
    Block a_block, b_block;
    const bool zero = coefficients.all_zero(row);
    const auto scaled = [&](int64_t which) {
      return static_cast<float>(scale * coefficients.at(which, row));
    };
    const auto shift = [&](StateRow which) {
      return finite_shift(state[which * state_stride + row]);
    };
    const PairFactors factors{shift(kAMax), shift(kBMax), scaled(0), scaled(1), scaled(2)};
    const Block& student_block = student_is_a ? a_block : b_block;
    const bool capped = student.transform.softcap != 0.0f;
    const int64_t last = std::min(last_block * kBlock, out.columns);
    int64_t first = first_block * kBlock;
    RowWriter writer = make_writer(out, row, first, stream);
    for (; first < last; first += kGradientBlock) {
      const int64_t count = std::min(kGradientBlock, last - first);
      GradientBlock block{values, count, 1.0f, -1, 0.0f, first + count == last};
      if (!zero) {
        const int64_t offset = labels[row] - first_column - first;
        a_block.read(kernels, a, row, first, count, offset);
        b_block.read(kernels, b, row, first, count, offset);
        kernels.pair_gradient[a_block.type][b_block.type](
            a_block.data, b_block.data, a_block.padded, factors,
            capped ? student_block.cap_slope : nullptr, values);
        block.label = offset;
        block.label_value = scaled(3) * student_block.label.cap_slope;
      }
      kernels.write_block[out.type](writer, block);
    }
  });
}

}  // namespace
}  // namespace unilogit

using namespace unilogit;

std::int32_t unilogit_divergence_update(const UnilogitMatrix* a, const UnilogitMatrix* b,
                                        const int64_t* labels, int64_t first_column, float* state,
                                        int64_t state_stride, const UnilogitTransform* a_transform,
                                        const UnilogitTransform* b_transform,
                                        std::int32_t threads) {
  if (a->rows == 0 || a->columns == 0) return kUnilogitOk;
  return update(current_kernels(), {*a, *a_transform}, {*b, *b_transform}, labels, first_column,
                state, state_stride, useful_threads(*a, threads));
}

std::int32_t unilogit_divergence_gradient(const UnilogitMatrix* a, const UnilogitMatrix* b,
                                          const int64_t* labels, int64_t first_column,
                                          const float* state, int64_t state_stride,
                                          const float* coefficients, int64_t coefficients_stride,
                                          std::int32_t student, const UnilogitMatrix* out,
                                          const UnilogitTransform* a_transform,
                                          const UnilogitTransform* b_transform,
                                          std::int32_t threads) {
  if (a->rows == 0 || a->columns == 0) return kUnilogitOk;
  gradient(current_kernels(), {*a, *a_transform}, {*b, *b_transform}, labels, first_column, state,
           state_stride, {coefficients, coefficients_stride}, student == kUnilogitStudentIsA, *out,
           useful_threads(*a, threads));
  return kUnilogitOk;
}
