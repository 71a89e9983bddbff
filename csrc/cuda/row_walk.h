// The walk over a row. Its threads form one team, be they of one block or of several: a member
// takes vectors of 16 bytes in turn with the others, several of them at a time so that their loads
// are in flight together, and the few columns at both ends of a row that fill no vector singly.
// Where the row begins decides what is peeled, so accesses are whole at any alignment.
#pragma once

#include "row_math.h"

namespace unilogit {

// Bytes of logits that a thread has in flight. The tanh of a cap needs the registers of half, and
// so does a general gradient row.
constexpr int kFlightBytes = 64;
constexpr int kFewerFlightBytes = 32;

// Columns at a time for which a thread has the registers when it sums moments; for squares, which
// need the exponentials a second time, it has those of half a tile.
constexpr int kMomentColumns = 16;

// ---- vectors -----------------------------------------------------------------------------------

// Loads `kCount` neighbours from a boundary of as many bytes, 16 at most.
template <class T, int kCount>
UNILOGIT_DEVICE void load_vector(const typename T::Stored* from, float* values) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(typename T::Stored));
  if constexpr (kBytes > kAccessBytes) {
    load_vector<T, kCount / 2>(from, values);
    load_vector<T, kCount / 2>(from + kCount / 2, values + kCount / 2);
  } else if constexpr (kBytes == 16) {
    const Words4 raw = *reinterpret_cast<const Words4*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) T::unpack(raw.words[i], values + i * T::kPerWord);
  } else {
    static_assert(kBytes == 8, "a vector is 16 bytes of one of its types, and 8 at least");
    const Words2 raw = *reinterpret_cast<const Words2*>(from);
#pragma unroll
    for (int i = 0; i < 2; ++i) T::unpack(raw.words[i], values + i * T::kPerWord);
  }
}

// Stores 16 bytes at a 16-byte boundary.
template <class T>
UNILOGIT_DEVICE void store_vector(typename T::Stored* to, const float* values) {
  Words4 packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed.words[i] = T::pack(values + i * T::kPerWord);
  *reinterpret_cast<Words4*>(to) = packed;
}

// ---- rows --------------------------------------------------------------------------------------

// Where a matrix is; strides in elements.
template <class T>
struct Matrix {
  typename T::Stored* data;
  int64 row_stride;
  int64 column_stride;

  UNILOGIT_DEVICE Matrix at_row(int64 row) const {
    return {data + row * row_stride, row_stride, column_stride};
  }
  UNILOGIT_DEVICE typename T::Stored* column(int j) const { return data + j * column_stride; }
};

// The threads that walk over one row together.
struct Team {
  int part;  // of the row: one block each
  int parts;

  UNILOGIT_DEVICE int member() const {
    return part * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  UNILOGIT_DEVICE int size() const { return parts * static_cast<int>(blockDim.x); }
};

// Elements from a boundary of `kVector` of them to this address.
template <int kVector, class Stored>
UNILOGIT_DEVICE int beyond_boundary(const Stored* at) {
  return static_cast<int>(reinterpret_cast<address>(at) / sizeof(Stored) % kVector);
}

// A label's column among these `v`, or -1: no label becomes an address unchecked.
UNILOGIT_DEVICE int label_column(const int64* labels, int64 row, int64 first_column, int v) {
  const int64 column = labels[row] - first_column;
  return column >= 0 && column < v ? static_cast<int>(column) : -1;
}

// The columns of a row in kinds: `peeled` before the first boundary; tiles of `kVectors` vectors
// for each thread of a block; single vectors; the rest. A row whose columns are not neighbours in
// memory is peeled altogether.
template <int kVector, int kVectors>
struct Layout {
  int peeled;
  int tiles;
  int tail;  // first column of the single vectors
  int tail_vectors;
  int end;  // first column after the last vector
  int columns;

  UNILOGIT_DEVICE Layout(int beyond, int v, bool strided) : columns(v) {
    peeled = strided ? v : min_of((kVector - beyond) % kVector, v);
    divide(true);
  }

  // Tiles as far as they go, or none of them.
  UNILOGIT_DEVICE void divide(bool into_tiles) {
    const int v = columns;
    tiles = into_tiles ? (v - peeled) / tile_columns() : 0;
    tail = peeled + tiles * tile_columns();
    tail_vectors = (v - tail) / kVector;
    end = tail + tail_vectors * kVector;
  }

  static UNILOGIT_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
  static UNILOGIT_DEVICE int tile_columns() {
    return kVectors * kVector * static_cast<int>(blockDim.x);
  }

  // First column of this thread in a tile, and from one of its vectors there to the next.
  UNILOGIT_DEVICE int tile_column(int tile) const {
    return peeled + tile * tile_columns() + static_cast<int>(threadIdx.x) * kVector;
  }
  static UNILOGIT_DEVICE int vector_step() { return kVector * static_cast<int>(blockDim.x); }

  UNILOGIT_DEVICE int tail_column(int i) const { return tail + i * kVector; }

  UNILOGIT_DEVICE int singles() const { return peeled + (columns - end); }
  UNILOGIT_DEVICE int single_column(int i) const { return i < peeled ? i : end + (i - peeled); }
};

// Loads `kVectors` vectors of `kVector` columns each.
template <class T, int kVectors, int kVector>
UNILOGIT_DEVICE void load_columns(const typename T::Stored* from, int step,
                                  float (&x)[kVectors * kVector]) {
#pragma unroll
  for (int u = 0; u < kVectors; ++u) load_vector<T, kVector>(from + u * step, x + u * kVector);
}

// The same one by one, where the logits are not aligned as the output is.
template <class T, int kVector>
UNILOGIT_DEVICE void load_singly(const typename T::Stored* from, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = T::load(from[i]);
}

// ---- statistics --------------------------------------------------------------------------------

// Folds this thread's share of a row into `part`, without the label's column.
template <class Logits, bool kCapped, class Needs>
class RestStatistics {
 public:
  static constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(typename Logits::Stored));
  static constexpr int kVectors = (kCapped ? kFewerFlightBytes : kFlightBytes) / kAccessBytes;

  UNILOGIT_DEVICE RestStatistics(const Matrix<Logits>& row, int v, int label,
                                 const Transform<kCapped>& transform, Needs needs)
      : row_(row),
        label_(label),
        transform_(transform),
        needs_(needs),
        layout_(beyond_boundary<kVector>(row.data), v, row.column_stride != 1) {}

  UNILOGIT_DEVICE PartOf<Needs> walk(Team team) const {
    PartOf<Needs> part = begun<kCapped, Needs>({});
#pragma unroll 1
    for (int tile = team.part; tile < layout_.tiles; tile += team.parts) {
      part = add_tile(part, layout_.tile_column(tile), layout_.vector_step());
    }
#pragma unroll 1
    for (int i = team.member(); i < layout_.tail_vectors; i += team.size()) {
      part = add<1>(part, layout_.tail_column(i), 0, needs_);
    }
#pragma unroll 1
    for (int i = team.member(); i < layout_.singles(); i += team.size()) {
      const int column = layout_.single_column(i);
      if (column == label_) continue;
      const float kept[1] = {transform_.staged(Logits::load(*row_.column(column)))};
      if constexpr (Needs::kMayNeedColumn) {
        if (needs_.has(kNeedsRunnerUp)) {
          part.column = fold_column(part, kept, transform_, [=](int) { return column; });
        }
      }
      if constexpr (Needs::kIsGeneral) {
        part = fold(part, kept, transform_, needs_, false, [](int) { return false; });
      } else {
        part = fold(part, kept, transform_);
      }
    }
    return settled<Needs>(part, transform_);
  }

 private:
  UNILOGIT_DEVICE PartOf<Needs> add_tile(PartOf<Needs> part, int first, int step) const {
    if constexpr (Needs::kIsGeneral) {
      constexpr int kHalf = kVectors / 2;
      constexpr bool kIsLarge = kVectors * kVector > kMomentColumns;
      if (!kIsLarge && !needs_.has(kNeedsVariance)) {
        return add<kVectors>(part, first, step, needs_.without(kNeedsVariance));
      }
      part = add<kHalf>(part, first, step, needs_);
      return add<kHalf>(part, first + kHalf * step, step, needs_);
    } else {
      return add<kVectors>(part, first, step, needs_);
    }
  }

  template <int kCount>
  UNILOGIT_DEVICE PartOf<Needs> add(PartOf<Needs> part, int first, int step, Needs needs) const {
    float kept[kCount * kVector];
    load_columns<Logits, kCount, kVector>(row_.data + first, step, kept);
#pragma unroll
    for (float& value : kept) value = transform_.staged(value);
    // One thread of the row meets the label once: only then is it looked for column by column.
    const int before = label_ - first;
    const bool may_hold_it = before >= 0 && before < (kCount - 1) * step + kVector;
    if (may_hold_it) {
#pragma unroll
      for (int i = 0; i < kCount * kVector; ++i) {
        if (before == i / kVector * step + i % kVector) kept[i] = transform_.absent();
      }
    }
    if constexpr (Needs::kMayNeedColumn) {
      if (needs.has(kNeedsRunnerUp)) {
        part.column = fold_column(part, kept, transform_,
                                  [=](int i) { return first + i / kVector * step + i % kVector; });
      }
    }
    if constexpr (Needs::kIsGeneral) {
      return fold(part, kept, transform_, needs, may_hold_it,
                  [=](int i) { return before == i / kVector * step + i % kVector; });
    } else {
      return fold(part, kept, transform_);
    }
  }

  const Matrix<Logits>& row_;
  int label_;
  const Transform<kCapped>& transform_;
  Needs needs_;
  Layout<kVector, kVectors> layout_;
};

// ---- gradient rows -----------------------------------------------------------------------------

// Writes this thread's share of a gradient row, which may lie where the logits do. From the end to
// the start: what an earlier pass read last is still in the cache.
template <class Logits, class Out, bool kCapped, class Row>
class GradientWriter {
 public:
  static constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(typename Out::Stored));
  static constexpr int kVectors = (kCapped || Row::kIsGeneral ? kFewerFlightBytes : kFlightBytes) /
                                  (kVector * static_cast<int>(sizeof(typename Logits::Stored)));

  static constexpr bool kBinary = !kCapped && !Row::kIsGeneral;

  UNILOGIT_DEVICE GradientWriter(const Matrix<Logits>& row, const Matrix<Out>& out, int v,
                                 int label, const Transform<kCapped>& transform)
      : row_(row),
        out_(out),
        label_(label),
        transform_(transform),
        layout_(beyond_boundary<kVector>(out.data), v,
                row.column_stride != 1 || out.column_stride != 1) {
    constexpr int kBytes = kVector * static_cast<int>(sizeof(typename Logits::Stored));
    constexpr int kBoundary = kBytes < kAccessBytes ? kBytes : kAccessBytes;
    whole_ = reinterpret_cast<address>(row.data + layout_.peeled) % kBoundary == 0;
    layout_.divide(whole_);
  }

  UNILOGIT_DEVICE void walk(Row gradient, Team team) const {
    if constexpr (kBinary) {
      const float excess = transform_.excess(gradient.max);
      gradient.coefficient = with_excess(gradient.coefficient, -excess);
    }
    // A row of slope 0 is exactly 0, whatever its logits hold: they are not read.
    if (gradient.size == 0.0f) {
      walk<false>(gradient, team);
    } else {
      walk<true>(gradient, team);
    }
  }

 private:
  template <bool kReads>
  UNILOGIT_DEVICE void walk(const Row& gradient, Team team) const {
#pragma unroll 1
    for (int i = team.member(); i < layout_.singles(); i += team.size()) {
      const int column = layout_.single_column(i);
      float x[1] = {};
      if constexpr (kReads) {
        x[0] = Logits::load(*row_.column(column));
        if (column == label_) {
          x[0] = entry_of(gradient.at_label, label_);
        } else if (Row::kHasRunnerUp && column == gradient.column()) {
          x[0] = entry_of(gradient.entry_there(), column);
        } else {
          differentiate(gradient, x);
        }
      }
      *out_.column(column) = Out::store(x[0]);
    }
#pragma unroll 1
    for (int i = team.member(); i < layout_.tail_vectors; i += team.size()) {
      write<1, kReads>(gradient, layout_.tail_column(i), 0);
    }
    // The tiles of a part, last one first.
    const int turns = (layout_.tiles - team.part + team.parts - 1) / team.parts;
#pragma unroll 1
    for (int turn = turns - 1; turn >= 0; --turn) {
      const int tile = team.part + turn * team.parts;
      write<kVectors, kReads>(gradient, layout_.tile_column(tile), layout_.vector_step());
    }
  }

  template <int kCount, bool kReads>
  UNILOGIT_DEVICE void write(const Row& gradient, int first, int step) const {
    float values[kCount * kVector] = {};
    float at_label = 0.0f, at_runner_up = 0.0f;
    const int runner_up = gradient.column();
    if constexpr (kReads) {
      if (kCount > 1 || whole_) {
        load_columns<Logits, kCount, kVector>(row_.data + first, step, values);
      } else if constexpr (kCount == 1) {
        load_singly<Logits, kVector>(row_.data + first, values);
      }
      // Read before it may be overwritten, by this thread.
      if (owns<kCount>(label_, first, step)) at_label = entry_of(gradient.at_label, label_);
      if (Row::kHasRunnerUp && owns<kCount>(runner_up, first, step)) {
        at_runner_up = entry_of(gradient.entry_there(), runner_up);
      }
      differentiate(gradient, values);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      store_vector<Out>(out_.data + first + u * step, values + u * kVector);
    }
    if (kReads && owns<kCount>(label_, first, step)) out_.data[label_] = Out::store(at_label);
    if (kReads && Row::kHasRunnerUp && owns<kCount>(runner_up, first, step)) {
      out_.data[runner_up] = Out::store(at_runner_up);
    }
  }

  // Whether a column is in a vector of this thread.
  template <int kCount>
  UNILOGIT_DEVICE bool owns(int column, int first, int step) const {
    const int before = column - first;
    if (before < 0 || before >= (kCount - 1) * step + kVector) return false;
    bool owns = false;
#pragma unroll
    for (int u = 0; u < kCount; ++u) owns |= before >= u * step && before < u * step + kVector;
    return owns;
  }

  UNILOGIT_DEVICE float entry_of(float entry, int column) const {
    float cap_slope = 1.0f;
    if (kCapped) transform_.staged(Logits::load(*row_.column(column)), cap_slope);
    return entry * cap_slope;
  }

  // Raw logits to entries of the gradient row.
  template <int kCount>
  UNILOGIT_DEVICE void differentiate(const Row& gradient, float (&x)[kCount]) const {
#pragma unroll
    for (float& entry : x) {
      float cap_slope;
      const float kept = transform_.staged(entry, cap_slope);
      if constexpr (kBinary) {
        const Exponents exponents = transform_.exponents(gradient.max);
        entry = gradient.coefficient * power_of_two(exponents.of(kept));
      } else {
        const float value = gradient.entry(transform_.shifted(kept, gradient.max));
        entry = kCapped ? value * cap_slope : value;
      }
    }
  }

  const Matrix<Logits>& row_;
  const Matrix<Out>& out_;
  int label_;
  const Transform<kCapped>& transform_;
  Layout<kVector, kVectors> layout_;
  bool whole_;
};

}  // namespace unilogit
