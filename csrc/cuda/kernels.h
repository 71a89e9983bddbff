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

template <class Needs>
UNILOGIT_DEVICE PartOf<Needs> merge_warp(PartOf<Needs> part, Needs needs) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    PartOf<Needs> other = part;
    visit_fields(other, needs,
                 [=](auto& field, int) { field = __shfl_xor_sync(kAllLanes, field, distance); });
    part = merge(part, other, needs);
  }
  return part;
}

// Merges the parts of a block's threads in one fixed order; the result is valid in thread 0.
template <class Needs>
UNILOGIT_DEVICE PartOf<Needs> merge_block(PartOf<Needs> part, Needs needs) {
  constexpr int kWarps = kMostThreads / kWarp;
  __shared__ float max[kWarps];
  __shared__ float sum[kWarps];
  __shared__ int column[Needs::kMayNeedColumn ? kWarps : 1];
  __shared__ float moments[Needs::kIsGeneral ? kMoments : 1][kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  part = merge_warp(part, needs);
  if (lane == 0) {
    max[warp] = part.max;
    sum[warp] = part.sum;
    if (needs.has(kNeedsRunnerUp)) column[warp] = part.column;
    visit_moments(part, needs,
                  [=](float& field, int row) { moments[row - kStateCount][warp] = field; });
  }
  __syncthreads();
  if (warp == 0) {
    const bool exists = lane < static_cast<int>(blockDim.x) / kWarp;
    part = exists ? PartOf<Needs>{max[lane], sum[lane]} : PartOf<Needs>{};
    if (exists) {
      if (needs.has(kNeedsRunnerUp)) part.column = column[lane];
      visit_moments(part, needs,
                    [=](float& field, int row) { field = moments[row - kStateCount][lane]; });
    }
    part = merge_warp(part, needs);
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

// Folds `v` columns into `state`, of which only the rows that are needed are touched. Where several
// blocks share a row they leave their parts in `parts` (`[planes, n, gridDim.y]`) for merge_parts;
// a row of weight 0 is then not read.
template <class Logits, bool kCapped, class Needs>
UNILOGIT_DEVICE void update(const Matrix<Logits>& logits, const int64* labels,
                            const float* row_weight, float* state, int64 state_stride, float* parts,
                            int64 first_column, int v, const Transform<kCapped>& transform,
                            Needs needs) {
  const int64 row_index = blockIdx.x;
  const Team team = {static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
  const Matrix<Logits> row = logits.at_row(row_index);
  const int label = label_column(labels, row_index, first_column, v);
  const bool is_read = row_weight == nullptr || row_weight[row_index] != 0.0f;
  PartOf<Needs> part;
  if (is_read) {
    const RestStatistics<Logits, kCapped, Needs> rest(row, v, label, transform, needs);
    part = rest.walk(team);
  }
  part = merge_block(part, needs);
  if (threadIdx.x != 0) return;
  const RowState own(state, state_stride, row_index);
  if (needs.has(kNeedsRunnerUp) && part.column != kNoColumn) {
    part.column += static_cast<int>(first_column);
  }
  if (parts == nullptr) {
    own.merge_in(part, needs);
  } else {
    const int64 index = row_index * team.parts + team.part;
    const int64 plane = static_cast<int64>(gridDim.x) * team.parts;
    store_part(part, parts, plane, index, needs);
  }
  if (team.part == 0 && label >= 0 && is_read) {
    own.at(kStateTarget) = target_of(row, label, transform);
  }
}

// Merges the `count` parts of each row into `state`. With an objective, `values` receives f(d) and
// `slopes` row_weight * f'(d), both 0 where the weight is.
template <class Needs>
UNILOGIT_DEVICE void merge_parts(const float* parts, int count, const int64* labels,
                                 const float* row_weight, float* state, int64 state_stride,
                                 float* values, float* slopes, int64 vocab_size,
                                 const ObjectiveTerms& terms, Needs needs) {
  const int64 row_index = blockIdx.x;
  const int64 plane = static_cast<int64>(gridDim.x) * count;
  parts += row_index * count;
  PartOf<Needs> part;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    part = merge(part, load_part(parts, plane, i, needs), needs);
  }
  part = merge_block(part, needs);
  if (threadIdx.x != 0) return;
  const RowState own(state, state_stride, row_index);
  part = own.merge_in(part, needs);
  if (terms.objective == kNoObjective) return;
  const float weight = row_weight[row_index];
  const int64 label = labels[row_index];
  const bool label_exists = label >= 0 && label < vocab_size;
  const float d = log_odds(part, own.at(kStateTarget), label_exists);
  const RowResult result = evaluate_objective(terms, d);
  values[row_index] = weight == 0.0f ? 0.0f : result.value;
  slopes[row_index] = weight == 0.0f ? 0.0f : weight * result.slope;
}

// ---- gradient rows -----------------------------------------------------------------------------

// `slopes` has the rows that `Row` asks for, of n numbers each.
template <class Row, class Logits, class Out, bool kCapped>
UNILOGIT_DEVICE void gradient(const Matrix<Logits>& logits, const int64* labels, const float* state,
                              int64 state_stride, const float* slopes, int64 slope_stride,
                              const Matrix<Out>& out, int64 first_column, int v,
                              const Transform<kCapped>& transform) {
  const int64 row_index = blockIdx.x;
  const Team team = {static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
  const Matrix<Logits> row = logits.at_row(row_index);
  const Matrix<Out> out_row = out.at_row(row_index);
  const int label = label_column(labels, row_index, first_column, v);
  const Row values = Row::of({state, state_stride, row_index, first_column, v},
                             {slopes, slope_stride, row_index}, transform.derivative);
  GradientWriter<Logits, Out, kCapped, Row>(row, out_row, v, label, transform).walk(values, team);
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
    const PlainNeeds needs;
    const RestStatistics<Logits, kCapped, PlainNeeds> rest(row, v, label, transform, needs);
    Part part = merge_block(rest.walk(team), needs);
    if (threadIdx.x == 0) {
      // The label's logit is read before the barrier: behind it others may overwrite the row.
      const float target = label >= 0 ? target_of(row, label, transform) : 0.0f;
      part = spread_nan(part);
      const RowResult result = evaluate_objective(terms, log_odds(part, target, label >= 0));
      value = result.value;
      shared = GradientRow::of(part, weight * result.slope, transform.derivative);
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
        first_column, v, {scale, softcap, 1.0f}, unilogit::PlainNeeds{});                          \
  }

// The same with the runner-up.
#define RUNNER_UP_UPDATE(LOGITS, CAP)                                                              \
  UNILOGIT_GLOBAL runner_up_update_##LOGITS##_##CAP(                                               \
      unilogit::LOGITS::Stored* logits, const unilogit::int64* labels, float* state, float* parts, \
      unilogit::int64 row_stride, unilogit::int64 column_stride, unilogit::int64 state_stride,     \
      unilogit::int64 first_column, int v, float scale, float softcap) {                           \
    unilogit::update<unilogit::LOGITS, UNILOGIT_IS_##CAP>(                                         \
        {logits, row_stride, column_stride}, labels, nullptr, state, state_stride, parts,          \
        first_column, v, {scale, softcap, 1.0f}, unilogit::RunnerUpNeeds{});                       \
  }

// The same with whatever a launch needs.
#define GENERAL_UPDATE(LOGITS, CAP)                                                                \
  UNILOGIT_GLOBAL general_update_##LOGITS##_##CAP(                                                 \
      unilogit::LOGITS::Stored* logits, const unilogit::int64* labels, float* state, float* parts, \
      unilogit::int64 row_stride, unilogit::int64 column_stride, unilogit::int64 state_stride,     \
      unilogit::int64 first_column, int v, float scale, float softcap, int needs) {                \
    unilogit::update<unilogit::LOGITS, UNILOGIT_IS_##CAP>(                                         \
        {logits, row_stride, column_stride}, labels, nullptr, state, state_stride, parts,          \
        first_column, v, {scale, softcap, 1.0f}, unilogit::LaunchNeeds{needs});                    \
  }

#define MERGE_PARTS()                                                                              \
  UNILOGIT_GLOBAL merge_parts(const float* parts, const unilogit::int64* labels,                   \
                              const float* row_weight, float* state, float* values, float* slopes, \
                              unilogit::int64 state_stride, unilogit::int64 vocab_size, int count, \
                              int objective, float uniform_log_odds, float softplus_uniform,       \
                              float inverse_vocab) {                                               \
    unilogit::merge_parts(                                                                         \
        parts, count, labels, row_weight, state, state_stride, values, slopes, vocab_size,         \
        {objective, uniform_log_odds, softplus_uniform, inverse_vocab}, unilogit::PlainNeeds{});   \
  }

#define RUNNER_UP_MERGE()                                                                          \
  UNILOGIT_GLOBAL runner_up_merge(const float* parts, float* state, unilogit::int64 state_stride,  \
                                  int count) {                                                     \
    unilogit::merge_parts(parts, count, nullptr, nullptr, state, state_stride, nullptr, nullptr,   \
                          0, {unilogit::kNoObjective, 0.0f, 0.0f, 0.0f},                           \
                          unilogit::RunnerUpNeeds{});                                              \
  }

#define GENERAL_MERGE()                                                                            \
  UNILOGIT_GLOBAL general_merge(const float* parts, float* state, unilogit::int64 state_stride,    \
                                int count, int needs) {                                            \
    unilogit::merge_parts(parts, count, nullptr, nullptr, state, state_stride, nullptr, nullptr,   \
                          0, {unilogit::kNoObjective, 0.0f, 0.0f, 0.0f},                           \
                          unilogit::LaunchNeeds{needs});                                           \
  }

#define LOG_ODDS_GRADIENT(LOGITS, OUT, CAP)                                                        \
  UNILOGIT_GLOBAL log_odds_gradient_##LOGITS##_##OUT##_##CAP(                                      \
      unilogit::LOGITS::Stored* logits, const unilogit::int64* labels, const float* state,         \
      const float* slopes, unilogit::OUT::Stored* out, unilogit::int64 row_stride,                 \
      unilogit::int64 column_stride, unilogit::int64 out_row_stride,                               \
      unilogit::int64 out_column_stride, unilogit::int64 state_stride,                             \
      unilogit::int64 first_column, int v, float scale, float softcap, float derivative) {         \
    unilogit::gradient<unilogit::GradientRow, unilogit::LOGITS, unilogit::OUT, UNILOGIT_IS_##CAP>( \
        {logits, row_stride, column_stride}, labels, state, state_stride, slopes, 0,               \
        {out, out_row_stride, out_column_stride}, first_column, v, {scale, softcap, derivative});  \
  }

// Of slopes that are several rows, one for each of them.
#define UNILOGIT_SLOPES_GRADIENT(NAME, ROW, LOGITS, OUT, CAP)                                      \
  UNILOGIT_GLOBAL NAME(unilogit::LOGITS::Stored* logits, const unilogit::int64* labels,            \
                       const float* state, const float* slopes, unilogit::OUT::Stored* out,        \
                       unilogit::int64 row_stride, unilogit::int64 column_stride,                  \
                       unilogit::int64 out_row_stride, unilogit::int64 out_column_stride,          \
                       unilogit::int64 state_stride, unilogit::int64 slope_stride,                 \
                       unilogit::int64 first_column, int v, float scale, float softcap,            \
                       float derivative) {                                                         \
    unilogit::gradient<unilogit::ROW, unilogit::LOGITS, unilogit::OUT, UNILOGIT_IS_##CAP>(         \
        {logits, row_stride, column_stride}, labels, state, state_stride, slopes, slope_stride,    \
        {out, out_row_stride, out_column_stride}, first_column, v, {scale, softcap, derivative});  \
  }

#define RUNNER_UP_GRADIENT(LOGITS, OUT, CAP)                                                       \
  UNILOGIT_SLOPES_GRADIENT(runner_up_gradient_##LOGITS##_##OUT##_##CAP, RunnerUpRow, LOGITS, OUT,  \
                           CAP)

#define GENERAL_GRADIENT(LOGITS, OUT, CAP)                                                         \
  UNILOGIT_SLOPES_GRADIENT(general_gradient_##LOGITS##_##OUT##_##CAP, GeneralRow, LOGITS, OUT, CAP)

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
