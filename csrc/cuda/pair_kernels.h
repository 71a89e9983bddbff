// The two-row kernels: statistics of KL(P_a || P_b) and their merge, and gradient rows. Types and
// transforms are values here, the same for a whole launch: with two reads for each column a branch
// for each tile is nothing, and one kernel serves every combination.
#pragma once

#include "kernels.h"
#include "pair_math.h"

namespace unilogit {

// Columns of a vector: 16 bytes of a 16-bit type, two accesses of float32.
constexpr int kPairVector = 8;
constexpr int kPairVectors = 2;

enum Type : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// ---- rows of any type --------------------------------------------------------------------------

// A row of logits as its model means them: `z = scale * x`, or with a cap (softcap is not 0)
// `z = softcap * tanh(scale * x)`, whose scale the host has divided by the cap.
struct AnyRow {
  void* data;
  int type;
  int64 column_stride;
  float scale;
  float softcap;
  float derivative;

  UNILOGIT_DEVICE AnyRow at_row(int64 row, int64 row_stride) const {
    AnyRow moved = *this;
    moved.data = static_cast<char*>(data) + row * row_stride * (type == kFloat32 ? 4 : 2);
    return moved;
  }

  // Elements from a boundary of a vector to column 0.
  UNILOGIT_DEVICE int beyond() const {
    return type == kFloat32 ? beyond_boundary<kPairVector>(static_cast<float*>(data))
                            : beyond_boundary<kPairVector>(static_cast<uint16*>(data));
  }

  // Raw logits of one column, or of vectors `step` columns apart.
  UNILOGIT_DEVICE float load(int column) const {
    const int64 i = column * column_stride;
    if (type == kFloat32) return Float32::load(static_cast<const float*>(data)[i]);
    const uint16 stored = static_cast<const uint16*>(data)[i];
    return type == kBfloat16 ? Bfloat16::load(stored) : Float16::load(stored);
  }
  template <int kCount>
  UNILOGIT_DEVICE void load(int first, int step, float (&x)[kCount * kPairVector]) const {
    if (type == kFloat32) {
      load_columns<Float32, kCount, kPairVector>(static_cast<const float*>(data) + first, step, x);
    } else if (type == kBfloat16) {
      load_columns<Bfloat16, kCount, kPairVector>(static_cast<const uint16*>(data) + first, step,
                                                  x);
    } else {
      load_columns<Float16, kCount, kPairVector>(static_cast<const uint16*>(data) + first, step, x);
    }
  }

  UNILOGIT_DEVICE void store(int column, float value) const {
    const int64 i = column * column_stride;
    if (type == kFloat32) {
      static_cast<float*>(data)[i] = value;
    } else {
      static_cast<uint16*>(data)[i] =
          type == kBfloat16 ? Bfloat16::store(value) : Float16::store(value);
    }
  }
  UNILOGIT_DEVICE void store_vector(int first, const float* values) const {
    if (type == kFloat32) {
      float* to = static_cast<float*>(data) + first;
      unilogit::store_vector<Float32>(to, values);
      unilogit::store_vector<Float32>(to + 4, values + 4);
    } else if (type == kBfloat16) {
      unilogit::store_vector<Bfloat16>(static_cast<uint16*>(data) + first, values);
    } else {
      unilogit::store_vector<Float16>(static_cast<uint16*>(data) + first, values);
    }
  }

  // Raw logits to z.
  template <int kCount>
  UNILOGIT_DEVICE void transform(float (&x)[kCount]) const {
    if (softcap == 0.0f) {
#pragma unroll
      for (float& value : x) value *= scale;
    } else {
#pragma unroll
      for (float& value : x) value = softcap * hyperbolic_tangent(value * scale).value;
    }
  }
  UNILOGIT_DEVICE float target(int label) const {
    float z[1] = {load(label)};
    transform(z);
    return z[0];
  }
  // dz/dx of a raw logit.
  UNILOGIT_DEVICE float slope(float x) const {
    return softcap == 0.0f ? derivative : derivative * hyperbolic_tangent(x * scale).slope;
  }
};

using PairLayout = Layout<kPairVector, kPairVectors>;

// Rows whose vectors begin at the same columns are walked in vectors, others in single columns.
UNILOGIT_DEVICE PairLayout pair_layout(const AnyRow& a, const AnyRow& b, const AnyRow& out, int v) {
  const int beyond = out.beyond();
  const bool singly = a.column_stride != 1 || b.column_stride != 1 || out.column_stride != 1 ||
                      a.beyond() != beyond || b.beyond() != beyond;
  return {beyond, v, singly};
}

// ---- statistics --------------------------------------------------------------------------------

template <int kCount>
UNILOGIT_DEVICE PairPart add_vectors(const PairPart& part, const AnyRow& a, const AnyRow& b,
                                     int label, int first, int step) {
  float x[kCount * kPairVector], y[kCount * kPairVector];
  a.load<kCount>(first, step, x);
  b.load<kCount>(first, step, y);
  a.transform(x);
  b.transform(y);
  const int before = label - first;
  if (before >= 0 && before < (kCount - 1) * step + kPairVector) {
#pragma unroll
    for (int i = 0; i < kCount * kPairVector; ++i) {
      if (before == i / kPairVector * step + i % kPairVector) x[i] = y[i] = -infinity();
    }
  }
  return fold(part, x, y);
}

UNILOGIT_DEVICE PairPart pair_statistics(const AnyRow& a, const AnyRow& b, int v, int label,
                                         Team team) {
  const PairLayout layout = pair_layout(a, b, a, v);
  PairPart part = empty_pair();
#pragma unroll 1
  for (int tile = team.part; tile < layout.tiles; tile += team.parts) {
    part = add_vectors<kPairVectors>(part, a, b, label, layout.tile_column(tile),
                                     layout.vector_step());
  }
#pragma unroll 1
  for (int i = team.member(); i < layout.tail_vectors; i += team.size()) {
    part = add_vectors<1>(part, a, b, label, layout.tail_column(i), 0);
  }
#pragma unroll 1
  for (int i = team.member(); i < layout.singles(); i += team.size()) {
    const int column = layout.single_column(i);
    if (column == label) continue;
    const float x[1] = {a.target(column)}, y[1] = {b.target(column)};
    part = fold(part, x, y);
  }
  return part;
}

UNILOGIT_DEVICE PairPart merge_warp(PairPart part) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const PairPart other = {__shfl_xor_sync(kAllLanes, part.a_max, distance),
                            __shfl_xor_sync(kAllLanes, part.a_sum, distance),
                            __shfl_xor_sync(kAllLanes, part.a_dot, distance),
                            __shfl_xor_sync(kAllLanes, part.b_max, distance),
                            __shfl_xor_sync(kAllLanes, part.b_sum, distance)};
    part = merge(part, other);
  }
  return part;
}

// As merge_block of single rows: one fixed order, valid in thread 0.
UNILOGIT_DEVICE PairPart merge_block(PairPart part) {
  __shared__ PairPart parts[kMostThreads / kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  part = merge_warp(part);
  if (lane == 0) parts[warp] = part;
  __syncthreads();
  if (warp == 0) {
    const bool exists = lane < static_cast<int>(blockDim.x) / kWarp;
    part = merge_warp(exists ? parts[lane] : empty_pair());
  }
  return part;
}

UNILOGIT_DEVICE PairPart load_pair(const float* at, int64 stride) {
  return {at[0], at[stride], at[2 * stride], at[3 * stride], at[4 * stride]};
}

UNILOGIT_DEVICE void store_pair(const PairPart& part, float* at, int64 stride) {
  at[0] = part.a_max;
  at[stride] = part.a_sum;
  at[2 * stride] = part.a_dot;
  at[3 * stride] = part.b_max;
  at[4 * stride] = part.b_sum;
}

// Folds `v` columns into `state` (`[7, n]`); where several blocks share a row they leave their
// parts in `parts` (`[5, n, gridDim.y]`) for merge_pairs.
UNILOGIT_DEVICE void divergence_update(AnyRow a, int64 a_row_stride, AnyRow b, int64 b_row_stride,
                                       const int64* labels, float* state, int64 state_stride,
                                       float* parts, int64 first_column, int v) {
  const int64 row_index = blockIdx.x;
  const Team team = {static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
  a = a.at_row(row_index, a_row_stride);
  b = b.at_row(row_index, b_row_stride);
  const int label = label_column(labels, row_index, first_column, v);
  const PairPart part = merge_block(pair_statistics(a, b, v, label, team));
  if (threadIdx.x != 0) return;
  state += row_index;
  if (parts == nullptr) {
    store_pair(spread_nan(merge(load_pair(state, state_stride), part)), state, state_stride);
  } else {
    const int64 count = static_cast<int64>(gridDim.x) * team.parts;
    store_pair(part, parts + row_index * team.parts + team.part, count);
  }
  if (team.part == 0 && label >= 0) {
    state[5 * state_stride] = a.target(label);
    state[6 * state_stride] = b.target(label);
  }
}

UNILOGIT_DEVICE void merge_pairs(const float* parts, int count, float* state, int64 state_stride) {
  const int64 row_index = blockIdx.x;
  const int64 stride = static_cast<int64>(gridDim.x) * count;
  PairPart part = empty_pair();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    part = merge(part, load_pair(parts + row_index * count + i, stride));
  }
  part = merge_block(part);
  if (threadIdx.x != 0) return;
  state += row_index;
  store_pair(spread_nan(merge(load_pair(state, state_stride), part)), state, state_stride);
}

// ---- gradient rows -----------------------------------------------------------------------------

struct PairRows {
  AnyRow a;
  AnyRow b;
  AnyRow student;
  AnyRow out;
  int label;
};

template <int kCount, bool kReads>
UNILOGIT_DEVICE void write_pair(const PairRows& rows, const PairGradient& gradient, int first,
                                int step) {
  float values[kCount * kPairVector] = {};
  float at_label = 0.0f;
  bool owns_label = false;
  if constexpr (kReads) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int before = rows.label - (first + u * step);
      owns_label |= before >= 0 && before < kPairVector;
    }
    // Read before it may be overwritten, by this thread.
    if (owns_label) {
      at_label = gradient.at_label * rows.student.slope(rows.student.load(rows.label));
    }
    float x[kCount * kPairVector], y[kCount * kPairVector];
    rows.a.load<kCount>(first, step, x);
    rows.b.load<kCount>(first, step, y);
    rows.a.transform(x);
    rows.b.transform(y);
#pragma unroll
    for (int i = 0; i < kCount * kPairVector; ++i) values[i] = gradient.entry(x[i], y[i]);
    if (rows.student.softcap == 0.0f) {
#pragma unroll
      for (float& value : values) value *= rows.student.derivative;
    } else {
      rows.student.load<kCount>(first, step, x);
#pragma unroll
      for (int i = 0; i < kCount * kPairVector; ++i) values[i] *= rows.student.slope(x[i]);
    }
  }
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    rows.out.store_vector(first + u * step, values + u * kPairVector);
  }
  if (owns_label) rows.out.store(rows.label, at_label);
}

template <bool kReads>
UNILOGIT_DEVICE void write_pairs(const PairRows& rows, const PairGradient& gradient, int v,
                                 Team team) {
  const PairLayout layout = pair_layout(rows.a, rows.b, rows.out, v);
#pragma unroll 1
  for (int tile = team.part; tile < layout.tiles; tile += team.parts) {
    // One vector of three rows at a time is what 64 registers hold.
#pragma unroll 1
    for (int u = 0; u < kPairVectors; ++u) {
      write_pair<1, kReads>(rows, gradient, layout.tile_column(tile) + u * layout.vector_step(), 0);
    }
  }
#pragma unroll 1
  for (int i = team.member(); i < layout.tail_vectors; i += team.size()) {
    write_pair<1, kReads>(rows, gradient, layout.tail_column(i), 0);
  }
#pragma unroll 1
  for (int i = team.member(); i < layout.singles(); i += team.size()) {
    const int column = layout.single_column(i);
    float value = 0.0f;
    if constexpr (kReads) {
      value = column == rows.label ? gradient.at_label
                                   : gradient.entry(rows.a.target(column), rows.b.target(column));
      value *= rows.student.slope(rows.student.load(column));
    }
    rows.out.store(column, value);
  }
}

// `out` may lie where the student's logits do. A row of four zeros is exactly 0 and not read.
UNILOGIT_DEVICE void divergence_gradient(AnyRow a, int64 a_row_stride, AnyRow b, int64 b_row_stride,
                                         AnyRow out, int64 out_row_stride, bool a_is_student,
                                         const int64* labels, const float* state,
                                         int64 state_stride, const float* coefficients,
                                         int64 coefficient_stride, int64 first_column, int v) {
  const int64 row_index = blockIdx.x;
  const Team team = {static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
  a = a.at_row(row_index, a_row_stride);
  b = b.at_row(row_index, b_row_stride);
  const PairRows rows = {a, b, a_is_student ? a : b, out.at_row(row_index, out_row_stride),
                         label_column(labels, row_index, first_column, v)};
  state += row_index;
  coefficients += row_index;
  const PairGradient gradient = {shift_of(state[0]),
                                 shift_of(state[3 * state_stride]),
                                 coefficients[0],
                                 coefficients[coefficient_stride],
                                 coefficients[2 * coefficient_stride],
                                 coefficients[3 * coefficient_stride]};
  if (gradient.is_zero()) {
    write_pairs<false>(rows, gradient, v, team);
  } else {
    write_pairs<true>(rows, gradient, v, team);
  }
}

}  // namespace unilogit

// ---- entry points ------------------------------------------------------------------------------

#define DIVERGENCE_UPDATE()                                                                        \
  UNILOGIT_GLOBAL divergence_update(                                                               \
      void* a, void* b, const unilogit::int64* labels, float* state, float* parts,                 \
      unilogit::int64 a_row_stride, unilogit::int64 a_column_stride, unilogit::int64 b_row_stride, \
      unilogit::int64 b_column_stride, unilogit::int64 state_stride, unilogit::int64 first_column, \
      int v, int a_type, int b_type, float a_scale, float a_softcap, float b_scale,                \
      float b_softcap) {                                                                           \
    unilogit::divergence_update(                                                                   \
        {a, a_type, a_column_stride, a_scale, a_softcap, 1.0f}, a_row_stride,                      \
        {b, b_type, b_column_stride, b_scale, b_softcap, 1.0f}, b_row_stride, labels, state,       \
        state_stride, parts, first_column, v);                                                     \
  }

#define MERGE_PAIRS()                                                                              \
  UNILOGIT_GLOBAL merge_pairs(const float* parts, float* state, unilogit::int64 state_stride,      \
                              int count) {                                                         \
    unilogit::merge_pairs(parts, count, state, state_stride);                                      \
  }

#define DIVERGENCE_GRADIENT()                                                                      \
  UNILOGIT_GLOBAL divergence_gradient(                                                             \
      void* a, void* b, const unilogit::int64* labels, const float* state,                         \
      const float* coefficients, void* out, unilogit::int64 a_row_stride,                          \
      unilogit::int64 a_column_stride, unilogit::int64 b_row_stride,                               \
      unilogit::int64 b_column_stride, unilogit::int64 out_row_stride,                             \
      unilogit::int64 out_column_stride, unilogit::int64 state_stride,                             \
      unilogit::int64 coefficient_stride, unilogit::int64 first_column, int v, int a_type,         \
      int b_type, int out_type, int a_is_student, float a_scale, float a_softcap,                  \
      float a_derivative, float b_scale, float b_softcap, float b_derivative) {                    \
    unilogit::divergence_gradient(                                                                 \
        {a, a_type, a_column_stride, a_scale, a_softcap, a_derivative}, a_row_stride,              \
        {b, b_type, b_column_stride, b_scale, b_softcap, b_derivative}, b_row_stride,              \
        {out, out_type, out_column_stride, 1.0f, 0.0f, 1.0f}, out_row_stride, a_is_student != 0,   \
        labels, state, state_stride, coefficients, coefficient_stride, first_column, v);           \
  }
