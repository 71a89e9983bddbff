// The row kernels for NVIDIA GPUs: statistics of rows and their merge, gradient rows, both in one
// pass, and a scale. The contract of unilogit_kernels/backends says what they compute.
//
// Any number of threads that is a multiple of a warp and at most 1024 will do for a block. Rows are
// blockIdx.x; where gridDim.y is more than 1, so many blocks share a row.
//
// This header defines no kernel by itself: each macro at its end defines one, so that a compilation
// takes what it needs. kernels.cu takes all of them.
#pragma once

#include "row_walk.h"

namespace unilogit {

// ---- a block -----------------------------------------------------------------------------------

template <bool kRunnerUp>
UNILOGIT_DEVICE Part merge_warp(Part part) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Part other = {__shfl_xor_sync(kAllLanes, part.max, distance),
                  __shfl_xor_sync(kAllLanes, part.sum, distance)};
    if (kRunnerUp) other.column = __shfl_xor_sync(kAllLanes, part.column, distance);
    part = merge(part, other);
  }
  return part;
}

// Merges the parts of a block's threads in one fixed order; the result is valid in thread 0.
template <bool kRunnerUp>
UNILOGIT_DEVICE Part merge_block(Part part) {
  __shared__ float max[kMostThreads / kWarp];
  __shared__ float sum[kMostThreads / kWarp];
  __shared__ int column[kRunnerUp ? kMostThreads / kWarp : 1];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  part = merge_warp<kRunnerUp>(part);
  if (lane == 0) {
    max[warp] = part.max;
    sum[warp] = part.sum;
    if (kRunnerUp) column[warp] = part.column;
  }
  __syncthreads();
  if (warp == 0) {
    const bool exists = lane < static_cast<int>(blockDim.x) / kWarp;
    part = exists ? Part{max[lane], sum[lane]} : empty_part();
    if (kRunnerUp && exists) part.column = column[lane];
    part = merge_warp<kRunnerUp>(part);
  }
  return part;
}

// The label's z, for a label that exists.
template <class Logits, bool kCapped>
UNILOGIT_DEVICE float target_of(const Matrix<Logits>& row, int label,
                                const Transform<kCapped>& transform) {
  return transform.finished(transform.staged(Logits::load(*row.column(label))));
}

// ---- statistics --------------------------------------------------------------------------------

// Folds `v` columns into `state` (`[3, n]`). Where several blocks share a row they leave maximum
// and sum in `parts` (`[2, n, gridDim.y]`) for merge_parts; a row of weight 0 is then not read.
// With `kRunnerUp` both have one row more: the column of the maximum, as the bits of an int.
template <class Logits, bool kCapped, bool kRunnerUp = false>
UNILOGIT_DEVICE void update(const Matrix<Logits>& logits, const int64* labels,
                            const float* row_weight, float* state, int64 state_stride, float* parts,
                            int64 first_column, int v, const Transform<kCapped>& transform) {
  const int64 row_index = blockIdx.x;
  const Team team = {static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
  const Matrix<Logits> row = logits.at_row(row_index);
  const int label = label_column(labels, row_index, first_column, v);
  const bool is_read = row_weight == nullptr || row_weight[row_index] != 0.0f;
  Part part = empty_part();
  if (is_read) {
    part = RestStatistics<Logits, kCapped, kRunnerUp>(row, v, label, transform).walk(part, team);
  }
  part = merge_block<kRunnerUp>(part);
  if (threadIdx.x != 0) return;
  float* max = state + row_index;
  float* sum = max + state_stride;
  float* column = max + 3 * state_stride;
  if (kRunnerUp && part.column != kNoColumn) part.column += static_cast<int>(first_column);
  if (parts == nullptr) {
    Part so_far = {*max, *sum};
    if (kRunnerUp) so_far.column = int_of_bits(*column);
    part = spread_nan(merge(so_far, part));
    *max = part.max;
    *sum = part.sum;
    if (kRunnerUp) *column = bits_of_int(part.column);
  } else {
    const int64 index = row_index * team.parts + team.part;
    const int64 plane = static_cast<int64>(gridDim.x) * team.parts;
    parts[index] = part.max;
    parts[plane + index] = part.sum;
    if (kRunnerUp) parts[2 * plane + index] = bits_of_int(part.column);
  }
  if (team.part == 0 && label >= 0 && is_read) {
    max[2 * state_stride] = target_of(row, label, transform);
  }
}

// Merges the `count` parts of each row into `state`. With an objective, `values` receives f(d) and
// `slopes` row_weight * f'(d), both 0 where the weight is.
template <bool kRunnerUp = false>
UNILOGIT_DEVICE void merge_parts(const float* parts, int count, const int64* labels,
                                 const float* row_weight, float* state, int64 state_stride,
                                 float* values, float* slopes, int64 vocab_size,
                                 const ObjectiveTerms& terms) {
  const int64 row_index = blockIdx.x;
  const float* max = parts + row_index * count;
  const float* sum = max + static_cast<int64>(gridDim.x) * count;
  const float* column = sum + static_cast<int64>(gridDim.x) * count;
  Part part = empty_part();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    Part other = {max[i], sum[i]};
    if (kRunnerUp) other.column = int_of_bits(column[i]);
    part = merge(part, other);
  }
  part = merge_block<kRunnerUp>(part);
  if (threadIdx.x != 0) return;
  state += row_index;
  Part so_far = {state[0], state[state_stride]};
  if (kRunnerUp) so_far.column = int_of_bits(state[3 * state_stride]);
  part = spread_nan(merge(so_far, part));
  state[0] = part.max;
  state[state_stride] = part.sum;
  if (kRunnerUp) state[3 * state_stride] = bits_of_int(part.column);
  if (terms.objective == kNoObjective) return;
  const float weight = row_weight[row_index];
  const int64 label = labels[row_index];
  const bool label_exists = label >= 0 && label < vocab_size;
  const float d = log_odds(part, state[2 * state_stride], label_exists);
  const RowResult result = evaluate_objective(terms, d);
  values[row_index] = weight == 0.0f ? 0.0f : result.value;
  slopes[row_index] = weight == 0.0f ? 0.0f : weight * result.slope;
}

// ---- gradient rows -----------------------------------------------------------------------------

// `slopes` is `[n]`; with `kRunnerUp` `[3, n]`, see row_state.row_slopes.
template <class Logits, class Out, bool kCapped, bool kRunnerUp = false>
UNILOGIT_DEVICE void gradient(const Matrix<Logits>& logits, const int64* labels, const float* state,
                              int64 state_stride, const float* slopes, const Matrix<Out>& out,
                              int64 first_column, int v, const Transform<kCapped>& transform,
                              int64 slope_stride = 0) {
  const int64 row_index = blockIdx.x;
  const Team team = {static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
  const Matrix<Logits> row = logits.at_row(row_index);
  const Matrix<Out> out_row = out.at_row(row_index);
  const int label = label_column(labels, row_index, first_column, v);
  const Part rest = {state[row_index], state[row_index + state_stride]};
  const GradientRow values = gradient_row(rest, slopes[row_index], transform.derivative);
  if constexpr (kRunnerUp) {
    const float at_label = slopes[row_index + slope_stride];
    const float at_runner_up = slopes[row_index + 2 * slope_stride];
    const int64 column = int_of_bits(state[row_index + 3 * state_stride]) - first_column;
    RunnerUpRow both = {values, at_runner_up * transform.derivative,
                        column >= 0 && column < v ? static_cast<int>(column) : -1};
    both.size = fabsf(values.size) + fabsf(at_label) + fabsf(at_runner_up);
    both.at_label = at_label * transform.derivative;
    GradientWriter<Logits, Out, kCapped, RunnerUpRow>(row, out_row, v, label, transform)
        .walk(both, team);
  } else {
    GradientWriter<Logits, Out, kCapped, GradientRow>(row, out_row, v, label, transform)
        .walk(values, team);
  }
}

// Statistics, objective and gradient of whole rows in one pass: the second read comes from the
// cache. `out` may lie where the logits do; its data is null for the values alone.
template <class Logits, class Out, bool kCapped>
UNILOGIT_DEVICE void sweep(const Matrix<Logits>& logits, const int64* labels,
                           const float* row_weight, const Matrix<Out>& out, float* values, int v,
                           const Transform<kCapped>& transform, const ObjectiveTerms& terms) {
  __shared__ GradientRow shared;
  const int64 row_index = blockIdx.x;
  const Team team = {0, 1};
  const Matrix<Logits> row = logits.at_row(row_index);
  const int label = label_column(labels, row_index, 0, v);
  const float weight = row_weight[row_index];
  GradientRow entries = {0.0f, 0.0f, 0.0f, 0.0f};
  float value = 0.0f;
  if (weight != 0.0f) {
    Part part =
        RestStatistics<Logits, kCapped, false>(row, v, label, transform).walk(empty_part(), team);
    part = merge_block<false>(part);
    if (threadIdx.x == 0) {
      // The label's logit is read before the barrier: behind it others may overwrite the row.
      const float target = label >= 0 ? target_of(row, label, transform) : 0.0f;
      part = spread_nan(part);
      const RowResult result = evaluate_objective(terms, log_odds(part, target, label >= 0));
      value = result.value;
      shared = gradient_row(part, weight * result.slope, transform.derivative);
    }
    __syncthreads();
    entries = shared;
  }
  if (threadIdx.x == 0) values[row_index] = value;
  if (out.data == nullptr) return;
  const Matrix<Out> out_row = out.at_row(row_index);
  GradientWriter<Logits, Out, kCapped, GradientRow>(row, out_row, v, label, transform)
      .walk(entries, team);
}

// ---- scale -------------------------------------------------------------------------------------

// `values *= factor` in place and in float32; nothing else is read where the factor is exactly 1.
template <class T>
UNILOGIT_DEVICE void scale(typename T::Stored* values, const float* factor, int64 count) {
  constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(typename T::Stored));
  const float by = *factor;
  if (by == 1.0f) return;
  const int64 member = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64 team = static_cast<int64>(gridDim.x) * blockDim.x;
  const int beyond =
      static_cast<int>(reinterpret_cast<address>(values) / sizeof(typename T::Stored) % kVector);
  const int64 wanted = (kVector - beyond) % kVector;
  const int64 peeled = wanted < count ? wanted : count;
  const int64 vectors = (count - peeled) / kVector;
  for (int64 i = member; i < vectors; i += team) {
    typename T::Stored* at = values + peeled + i * kVector;
    float x[kVector];
    load_vector<T, kVector>(at, x);
#pragma unroll
    for (float& value : x) value *= by;
    store_vector<T>(at, x);
  }
  const int64 end = peeled + vectors * kVector;
  for (int64 i = member; i < peeled + (count - end); i += team) {
    typename T::Stored* at = values + (i < peeled ? i : end + (i - peeled));
    *at = T::store(T::load(*at) * by);
  }
}

}  // namespace unilogit

// ---- entry points ------------------------------------------------------------------------------

// The 1 says that half of the registers are not worth a spill.
#define UNILOGIT_GLOBAL extern "C" __global__ void __launch_bounds__(unilogit::kMostThreads, 1)
#define UNILOGIT_IS_capped true
#define UNILOGIT_IS_plain false

#define LOG_ODDS_UPDATE(LOGITS, CAP)                                                               \
  UNILOGIT_GLOBAL log_odds_update_##LOGITS##_##CAP(                                                \
      unilogit::LOGITS::Stored* logits, const unilogit::int64* labels, const float* row_weight,    \
      float* state, float* parts, unilogit::int64 row_stride, unilogit::int64 column_stride,       \
      unilogit::int64 state_stride, unilogit::int64 first_column, int v, float scale,              \
      float softcap) {                                                                             \
    unilogit::update<unilogit::LOGITS, UNILOGIT_IS_##CAP>(                                         \
        {logits, row_stride, column_stride}, labels, row_weight, state, state_stride, parts,       \
        first_column, v, {scale, softcap, 1.0f});                                                  \
  }

// The same with the runner-up.
#define RUNNER_UP_UPDATE(LOGITS, CAP)                                                              \
  UNILOGIT_GLOBAL runner_up_update_##LOGITS##_##CAP(                                               \
      unilogit::LOGITS::Stored* logits, const unilogit::int64* labels, float* state, float* parts, \
      unilogit::int64 row_stride, unilogit::int64 column_stride, unilogit::int64 state_stride,     \
      unilogit::int64 first_column, int v, float scale, float softcap) {                           \
    unilogit::update<unilogit::LOGITS, UNILOGIT_IS_##CAP, true>(                                   \
        {logits, row_stride, column_stride}, labels, nullptr, state, state_stride, parts,          \
        first_column, v, {scale, softcap, 1.0f});                                                  \
  }

#define RUNNER_UP_MERGE()                                                                          \
  UNILOGIT_GLOBAL runner_up_merge(const float* parts, float* state, unilogit::int64 state_stride,  \
                                  int count) {                                                     \
    unilogit::merge_parts<true>(parts, count, nullptr, nullptr, state, state_stride, nullptr,      \
                                nullptr, 0, {unilogit::kNoObjective, 0.0f, 0.0f, 0.0f});           \
  }

#define RUNNER_UP_GRADIENT(LOGITS, OUT, CAP)                                                       \
  UNILOGIT_GLOBAL runner_up_gradient_##LOGITS##_##OUT##_##CAP(                                     \
      unilogit::LOGITS::Stored* logits, const unilogit::int64* labels, const float* state,         \
      const float* slopes, unilogit::OUT::Stored* out, unilogit::int64 row_stride,                 \
      unilogit::int64 column_stride, unilogit::int64 out_row_stride,                               \
      unilogit::int64 out_column_stride, unilogit::int64 state_stride,                             \
      unilogit::int64 slope_stride, unilogit::int64 first_column, int v, float scale,              \
      float softcap, float derivative) {                                                           \
    unilogit::gradient<unilogit::LOGITS, unilogit::OUT, UNILOGIT_IS_##CAP, true>(                  \
        {logits, row_stride, column_stride}, labels, state, state_stride, slopes,                  \
        {out, out_row_stride, out_column_stride}, first_column, v, {scale, softcap, derivative},   \
        slope_stride);                                                                             \
  }

#define MERGE_PARTS()                                                                              \
  UNILOGIT_GLOBAL merge_parts(const float* parts, const unilogit::int64* labels,                   \
                              const float* row_weight, float* state, float* values, float* slopes, \
                              unilogit::int64 state_stride, unilogit::int64 vocab_size, int count, \
                              int objective, float uniform_log_odds, float softplus_uniform,       \
                              float inverse_vocab) {                                               \
    unilogit::merge_parts(parts, count, labels, row_weight, state, state_stride, values, slopes,   \
                          vocab_size,                                                              \
                          {objective, uniform_log_odds, softplus_uniform, inverse_vocab});         \
  }

#define LOG_ODDS_GRADIENT(LOGITS, OUT, CAP)                                                        \
  UNILOGIT_GLOBAL log_odds_gradient_##LOGITS##_##OUT##_##CAP(                                      \
      unilogit::LOGITS::Stored* logits, const unilogit::int64* labels, const float* state,         \
      const float* slopes, unilogit::OUT::Stored* out, unilogit::int64 row_stride,                 \
      unilogit::int64 column_stride, unilogit::int64 out_row_stride,                               \
      unilogit::int64 out_column_stride, unilogit::int64 state_stride,                             \
      unilogit::int64 first_column, int v, float scale, float softcap, float derivative) {         \
    unilogit::gradient<unilogit::LOGITS, unilogit::OUT, UNILOGIT_IS_##CAP>(                        \
        {logits, row_stride, column_stride}, labels, state, state_stride, slopes,                  \
        {out, out_row_stride, out_column_stride}, first_column, v, {scale, softcap, derivative});  \
  }

#define LOG_ODDS_SWEEP(LOGITS, OUT, CAP)                                                           \
  UNILOGIT_GLOBAL log_odds_sweep_##LOGITS##_##OUT##_##CAP(                                         \
      unilogit::LOGITS::Stored* logits, const unilogit::int64* labels, const float* row_weight,    \
      unilogit::OUT::Stored* out, float* values, unilogit::int64 row_stride,                       \
      unilogit::int64 column_stride, unilogit::int64 out_row_stride,                               \
      unilogit::int64 out_column_stride, int v, int objective, float scale, float softcap,         \
      float derivative, float uniform_log_odds, float softplus_uniform, float inverse_vocab) {     \
    unilogit::sweep<unilogit::LOGITS, unilogit::OUT, UNILOGIT_IS_##CAP>(                           \
        {logits, row_stride, column_stride}, labels, row_weight,                                   \
        {out, out_row_stride, out_column_stride}, values, v, {scale, softcap, derivative},         \
        {objective, uniform_log_odds, softplus_uniform, inverse_vocab});                           \
  }

#define SCALE(VALUES)                                                                              \
  UNILOGIT_GLOBAL scale_##VALUES(unilogit::VALUES::Stored* values, const float* factor,            \
                                 unilogit::int64 count) {                                          \
    unilogit::scale<unilogit::VALUES>(values, factor, count);                                      \
  }
