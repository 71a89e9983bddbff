// The running statistics of a row and their one merge. The twin of `merge_parts` of
// unilogit_kernels/maths/row_state.py.
#pragma once

#include "transform.h"

namespace unilogit {

// ---- what is kept ------------------------------------------------------------------------------

// What a loss sees of a row beside its log-odds: `RowNeeds.bits`.
enum Need : int {
  kNeedsRunnerUp = 1,
  kNeedsLogsumexp = 2,
  kNeedsMean = 4,
  kNeedsEntropy = 8,
  kNeedsVariance = 16,
};

constexpr int kNeedsDot = kNeedsEntropy | kNeedsVariance;

// Rows of a state.
enum StateRow : int {
  kStateRowMax = 0,
  kStateRowSum = 1,
  kStateTarget = 2,
  kStateRunnerUp = 3,
  kStateCount = 4,
  kStateLinear = 5,
  kStateDot = 6,
  kStateSquare = 7,
};

constexpr int kMoments = kStateSquare + 1 - kStateCount;

// Parts have these rows but the label's.
UNILOGIT_DEVICE constexpr int plane_of(int row) { return row < kStateTarget ? row : row - 1; }

// In a state, of a row that is -inf but for the label: `NO_COLUMN` of row_state.py.
constexpr int kNoColumn = 0x7fffffff;

// Of some columns without the label's: the largest z, and the sum of exp(z - max). The column of
// the largest, of equal ones the lowest, is kept only by kernels that need it; the others never
// look at it, so that it costs them nothing. It begins as empty.
struct Part {
  float max = -infinity();
  float sum = 0.0f;
  int column = kNoColumn;
};

// One with more of the same columns, where s = z - max (a maximum of -inf is taken as 0).
struct GeneralPart : Part {
  float count = 0.0f;   // of the columns
  float linear = 0.0f;  // the sum of s
  float dot = 0.0f;     // the sum of exp(s) s
  float square = 0.0f;  // the sum of exp(s) (s - dot / sum)^2
};

// Needs that are known when a kernel is compiled: what is not among them costs nothing.
template <int kBits>
struct FixedNeeds {
  using Part = unilogit::Part;
  static constexpr bool kIsGeneral = false;
  static constexpr bool kMayNeedColumn = (kBits & kNeedsRunnerUp) != 0;
  static UNILOGIT_DEVICE constexpr bool has(int any) { return (kBits & any) != 0; }
};

using PlainNeeds = FixedNeeds<0>;
using RunnerUpNeeds = FixedNeeds<kNeedsRunnerUp>;

// Needs that a launch knows, so that its threads branch as one.
struct LaunchNeeds {
  using Part = GeneralPart;
  static constexpr bool kIsGeneral = true;
  static constexpr bool kMayNeedColumn = true;
  int bits;

  UNILOGIT_DEVICE bool has(int any) const { return (bits & any) != 0; }
  UNILOGIT_DEVICE LaunchNeeds without(int some) const { return {bits & ~some}; }
};

template <class Needs>
using PartOf = typename Needs::Part;

// Calls `visit` with each field that is needed beside the first three and with its row in a state.
template <class Needs, class Visit>
UNILOGIT_DEVICE void visit_moments(PartOf<Needs>& part, Needs needs, const Visit& visit) {
  if constexpr (Needs::kIsGeneral) {
    if (needs.has(kNeedsMean)) {
      visit(part.count, kStateCount);
      visit(part.linear, kStateLinear);
    }
    if (needs.has(kNeedsDot)) visit(part.dot, kStateDot);
    if (needs.has(kNeedsVariance)) visit(part.square, kStateSquare);
  }
}

// The same for every field.
template <class Needs, class Visit>
UNILOGIT_DEVICE void visit_fields(PartOf<Needs>& part, Needs needs, const Visit& visit) {
  visit(part.max, kStateRowMax);
  visit(part.sum, kStateRowSum);
  if (needs.has(kNeedsRunnerUp)) visit(part.column, kStateRunnerUp);
  visit_moments(part, needs, visit);
}

// ---- merge -------------------------------------------------------------------------------------

// -inf minus -inf must not happen in a part that is still empty; +inf minus +inf gives NaN on
// purpose: overflow is never laundered.
UNILOGIT_DEVICE float shift_of(float max) { return max == -infinity() ? 0.0f : max; }

// s, or a number where exp(s) is 0 too: their product is then 0, however far below the maximum.
UNILOGIT_DEVICE float bounded(float s) { return fmaxf(s, -1e4f); }

// 0 where nothing has weight.
UNILOGIT_DEVICE float ratio(float a, float b) { return b == 0.0f ? 0.0f : quick_quotient(a, b); }

// A part as it is seen from a larger maximum, where it has the weight `weight`.
struct Moved {
  float weight;
  float sum;
  float dot;
};

UNILOGIT_DEVICE Moved moved(const GeneralPart& part, float shift) {
  const float weight = exponential(part.max - shift);
  const float dot = fmaf(part.sum, bounded(shift_of(part.max) - shift), part.dot);
  return {weight, weight * part.sum, weight * dot};
}

// What the distance of two parts' means adds to the square about the mean of both.
UNILOGIT_DEVICE float square_between(const Moved& a, const Moved& b) {
  const float gap = ratio(a.dot, a.sum) - ratio(b.dot, b.sum);
  return a.sum * ratio(b.sum, a.sum + b.sum) * gap * gap;
}

// Fills in the sums and moments of `merged`, whose maximum is `shift`, from its two parts.
UNILOGIT_DEVICE void merge_moments(GeneralPart& merged, float shift, const GeneralPart& a,
                                   const GeneralPart& b, LaunchNeeds needs) {
  if (needs.has(kNeedsMean)) {
    merged.count = a.count + b.count;
    merged.linear = fmaf(a.count, shift_of(a.max) - shift, a.linear) +
                    fmaf(b.count, shift_of(b.max) - shift, b.linear);
  }
  if (needs.has(kNeedsDot)) {
    const Moved p = moved(a, shift), q = moved(b, shift);
    merged.dot = p.dot + q.dot;
    if (needs.has(kNeedsVariance)) {
      const float within = fmaf(p.weight, a.square, q.weight * b.square);
      merged.square = within + square_between(p, q);
    }
  }
}

// The one merge of parts of a row: threads, blocks, and the state of earlier columns. NaN spreads
// through the sum, since a GPU's maximum drops it.
template <class Needs>
UNILOGIT_DEVICE PartOf<Needs> merge(PartOf<Needs> a, PartOf<Needs> b, Needs needs) {
  const float max = fmaxf(a.max, b.max);
  const float shift = shift_of(max);
  const int lower = a.column < b.column ? a.column : b.column;
  PartOf<Needs> merged = {
      max, fmaf(a.sum, exponential(a.max - shift), b.sum * exponential(b.max - shift)),
      a.max > b.max   ? a.column
      : a.max < b.max ? b.column
                      : lower};
  if constexpr (Needs::kIsGeneral) merge_moments(merged, shift, a, b, needs);
  return merged;
}

// A part as others may see it: NaN in the sum is NaN in the maximum.
template <class AnyPart>
UNILOGIT_DEVICE AnyPart spread_nan(AnyPart part) {
  const bool nowhere = part.max == -infinity();
  part.column = nowhere ? kNoColumn : part.column;
  part.max = part.sum != part.sum ? not_a_number() : part.max;
  return part;
}

// ---- in memory ---------------------------------------------------------------------------------

// A part whose planes are `stride` apart.
template <class Needs>
UNILOGIT_DEVICE PartOf<Needs> load_part(const float* planes, int64 stride, int64 index,
                                        Needs needs) {
  PartOf<Needs> part;
  visit_fields(part, needs, [=](auto& field, int row) {
    read_word(field, planes[plane_of(row) * stride + index]);
  });
  return part;
}

template <class Needs>
UNILOGIT_DEVICE void store_part(PartOf<Needs> part, float* planes, int64 stride, int64 index,
                                Needs needs) {
  visit_fields(part, needs, [=](auto& field, int row) {
    planes[plane_of(row) * stride + index] = word_of(field);
  });
}

// The state of one row.
struct RowState {
  float* max;
  float* sum;
  float* column;
  int64 stride;

  UNILOGIT_DEVICE RowState(float* state, int64 stride, int64 row)
      : max(state + row),
        sum(max + stride),
        column(max + kStateRunnerUp * stride),
        stride(stride) {}
  UNILOGIT_DEVICE float& at(int row) const {
    return row == kStateRowMax     ? *max
           : row == kStateRowSum   ? *sum
           : row == kStateRunnerUp ? *column
                                   : max[row * stride];
  }

  // Adds a part; the result is what the state then holds.
  template <class Needs>
  UNILOGIT_DEVICE PartOf<Needs> merge_in(PartOf<Needs> part, Needs needs) const {
    PartOf<Needs> so_far;
    visit_fields(so_far, needs, [=](auto& field, int row) { read_word(field, at(row)); });
    part = spread_nan(merge(so_far, part, needs));
    visit_fields(part, needs, [=](auto& field, int row) { at(row) = word_of(field); });
    return part;
  }
};

// ---- fold --------------------------------------------------------------------------------------

// A sum of so many terms. Short chains of additions are fast and keep the rounding small.
template <int kCount>
struct Chains {
  static constexpr int kChains = kCount < 4 ? kCount : 4;
  float sums[kChains];

  // Terms come in order, each once.
  UNILOGIT_DEVICE void add(int i, float term) {
    sums[i % kChains] = i < kChains ? term : sums[i % kChains] + term;
  }
  UNILOGIT_DEVICE float total() {
#pragma unroll
    for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
    return sums[0];
  }
};

template <bool kCapped, int kCount>
UNILOGIT_DEVICE float sum_exponentials(const float (&kept)[kCount],
                                       const Transform<kCapped>& transform, float shift) {
  Chains<kCount> sum;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum.add(i, exponential(transform.shifted(kept[i], shift)));
  return sum.total();
}

// Adds kept logits to a part. Without a cap the part is one as `begun`.
template <bool kCapped, int kCount>
UNILOGIT_DEVICE Part fold(Part part, const float (&kept)[kCount],
                          const Transform<kCapped>& transform) {
  const float max = fmaxf(part.max, transform.largest(kept));
  if constexpr (kCapped) {
    const float shift = shift_of(max);
    const float sum = sum_exponentials(kept, transform, shift);
    return {max, fmaf(part.sum, exponential(part.max - shift), sum), part.column};
  } else {
    const Exponents exponents = transform.exponents(max);
    Chains<kCount> sum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum.add(i, power_of_two(exponents.of(kept[i])));
    const float before = part.max * Transform<kCapped>::log_base(max);
    const float weight = power_of_two(sum_of_rounded(before, exponents.shift));
    return {max, fmaf(part.sum, weight, sum.total()), part.column};
  }
}

// An empty part, as it is folded: its maximum is no -inf.
template <bool kCapped, class Needs>
UNILOGIT_DEVICE PartOf<Needs> begun(PartOf<Needs> part) {
  if constexpr (!kCapped && !Needs::kIsGeneral) part.max = kLowest;
  return part;
}

// A part that has been folded, as it is merged: its sum without the excess of its exponents.
template <class Needs, bool kCapped>
UNILOGIT_DEVICE PartOf<Needs> settled(PartOf<Needs> part, const Transform<kCapped>& transform) {
  if constexpr (!kCapped && !Needs::kIsGeneral) {
    part.sum = with_excess(part.sum, -transform.excess(part.max));
    // The maximum's own term is no 0.
    if (part.sum == 0.0f) part.max = -infinity();
  }
  return part;
}

// The same sum, and `dot`.
template <bool kCapped, int kCount>
UNILOGIT_DEVICE void sum_products(GeneralPart& tile, const float (&kept)[kCount],
                                  const Transform<kCapped>& transform, float shift) {
  Chains<kCount> sum, dot;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float s = transform.shifted(kept[i], shift);
    const float weight = exponential(s);
    sum.add(i, weight);
    dot.add(i, weight * bounded(s));
  }
  tile.sum = sum.total();
  tile.dot = dot.total();
}

// `square`, about a mean that is known: no difference of large squares.
template <bool kCapped, int kCount>
UNILOGIT_DEVICE void sum_squares(GeneralPart& tile, const float (&kept)[kCount],
                                 const Transform<kCapped>& transform, float shift) {
  const float mean = ratio(tile.dot, tile.sum);
  Chains<kCount> square;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float s = transform.shifted(kept[i], shift);
    const float weight = exponential(s);
    const float gap = bounded(s) - mean;
    square.add(i, weight * gap * gap);
  }
  tile.square = square.total();
}

// `count` and `linear`, without the label's column.
template <bool kCapped, int kCount, class IsLabel>
UNILOGIT_DEVICE void sum_logits(GeneralPart& tile, const float (&kept)[kCount],
                                const Transform<kCapped>& transform, float shift,
                                const IsLabel& is_label) {
  Chains<kCount> linear;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    linear.add(i, is_label(i) ? 0.0f : transform.shifted(kept[i], shift));
    tile.count += is_label(i) ? 0.0f : 1.0f;
  }
  tile.linear = linear.total();
}

// Adds kept logits to a part, in which the label's is absent: only where `has_label` is it asked
// which one that is.
template <bool kCapped, int kCount, class IsLabel>
UNILOGIT_DEVICE GeneralPart fold(const GeneralPart& part, const float (&kept)[kCount],
                                 const Transform<kCapped>& transform, LaunchNeeds needs,
                                 bool has_label, const IsLabel& is_label) {
  GeneralPart tile = {fmaxf(part.max, transform.largest(kept)), 0.0f};
  const float shift = shift_of(tile.max);
  if (needs.has(kNeedsDot)) {
    sum_products(tile, kept, transform, shift);
  } else {
    tile.sum = sum_exponentials(kept, transform, shift);
  }
  if (needs.has(kNeedsVariance)) sum_squares(tile, kept, transform, shift);
  if (needs.has(kNeedsMean)) {
    if (has_label) {
      sum_logits(tile, kept, transform, shift, is_label);
    } else {
      sum_logits(tile, kept, transform, shift, [](int) { return false; });
    }
  }
  GeneralPart folded = {tile.max, fmaf(part.sum, exponential(part.max - shift), tile.sum),
                        part.column};
  merge_moments(folded, shift, part, tile, needs);
  return folded;
}

// Where the largest of a part and of kept logits is; called before these are folded into it. Few
// tiles have a new maximum: only then is it looked for column by column.
template <bool kCapped, int kCount, class ColumnOf>
UNILOGIT_DEVICE int fold_column(const Part& part, const float (&kept)[kCount],
                                const Transform<kCapped>& transform, const ColumnOf& column_of) {
  const float largest = transform.largest(kept);
  if (largest < part.max) return part.column;
  int lowest = largest == part.max ? part.column : kNoColumn;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (transform.finished(kept[i]) == largest && column_of(i) < lowest) lowest = column_of(i);
  }
  return lowest;
}

}  // namespace unilogit
