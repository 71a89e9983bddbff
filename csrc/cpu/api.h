// What the library offers to its callers, and what each instruction set offers to the library.
#pragma once

#include <cstdint>

// Which functions these are and what they take: one more with every change. A caller that counts on
// another number must not call them.
#define UNILOGIT_INTERFACE 2

// Everything else stays inside the library.
#pragma GCC visibility push(default)
extern "C" {

// Element types of logits and gradients.
enum UnilogitType : std::int32_t {
  kUnilogitFloat32 = 0,
  kUnilogitBfloat16 = 1,
  kUnilogitFloat16 = 2,
};

// Objectives whose gradient row can follow in the same sweep as the statistics.
enum UnilogitObjective : std::int32_t {
  kUnilogitReverse = 0,
  kUnilogitForward = 1,
  kUnilogitCrossEntropy = 2,
  kUnilogitGradientAscent = 3,
  kUnilogitWeightedStatistics = 4,
};

// What is asked of a row beside the log-odds of its label, as bits: `RowNeeds` of row_state.py.
enum UnilogitNeeds : std::int32_t {
  kUnilogitRunnerUp = 1,
  kUnilogitLogsumexp = 2,
  kUnilogitMean = 4,
  kUnilogitEntropy = 8,
  kUnilogitVariance = 16,
};

// z = softcap * tanh(scale * x / softcap), or scale * x where softcap is 0.
struct UnilogitTransform {
  float scale;
  float softcap;
};

// A [rows, columns] tensor; strides count elements and may have any sign.
struct UnilogitMatrix {
  void* data;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t row_stride;
  std::int64_t column_stride;
  std::int32_t type;
};

// 0 where the function succeeded, else one of these.
enum UnilogitStatus : std::int32_t {
  kUnilogitOk = 0,
  kUnilogitOutOfMemory = 1,
  kUnilogitUnsupported = 2,
};

std::int32_t unilogit_interface(void);

// Selects "avx512bf16", "avx512", "avx2" or "baseline"; the empty string means the best one of this
// machine.
std::int32_t unilogit_select_instruction_set(const char* name);
const char* unilogit_instruction_set(void);

// Folds the columns of `logits` into `state`, rows `state_stride` apart, those of row_state.py:
// max, sum, target, and of the others those that `needs` (UnilogitNeeds) asks for. The runner-up is
// the column of the maximum, of equal ones the lowest, as the bits of an int32.
std::int32_t unilogit_log_odds_update(const UnilogitMatrix* logits, const std::int64_t* labels,
                                      std::int64_t first_column, float* state,
                                      std::int64_t state_stride, std::int32_t needs,
                                      const UnilogitTransform* transform, std::int32_t threads);

// Gradient rows from a complete state and `slope_rows` rows of `slope`, `slope_stride` apart:
//   1: slope * (1[j == label] - exp(z - max) / sum) * dz/dx;
//   3: the second replaces `slope * 1[...]` at the label, the third the whole but for dz/dx at the
//      column of the state's fourth row;
//   5: (uniform - exp(z - max) / sum * (slope + tilt (z - max))) * dz/dx but at these two columns,
//      with a maximum of -inf taken as 0 and a sum of 0 as 1; the fourth is tilt, the fifth
//      uniform.
std::int32_t unilogit_log_odds_gradient(const UnilogitMatrix* logits, const std::int64_t* labels,
                                        std::int64_t first_column, const float* state,
                                        std::int64_t state_stride, const float* slope,
                                        std::int64_t slope_stride, std::int32_t slope_rows,
                                        const UnilogitMatrix* out,
                                        const UnilogitTransform* transform, std::int32_t threads);

// Statistics, objective and gradient of whole rows; `out` may be null. Rows of weight 0 are not
// read. `weights`, null but for kUnilogitWeightedStatistics, are its five, of which a 0 leaves its
// term out: of the cross-entropy, the cross-entropy of the uniform distribution, the squared
// logsumexp, the entropy, and 1. Where the third is not 0, `loss` has a second row: that term.
std::int32_t unilogit_log_odds_sweep(const UnilogitMatrix* logits, const std::int64_t* labels,
                                     const float* row_weight, std::int32_t objective,
                                     const float* weights, std::int64_t vocab_size,
                                     const UnilogitMatrix* out, float* loss,
                                     const UnilogitTransform* transform, std::int32_t threads);

// The student's logits, whose gradient is written, are those of row a.
constexpr std::int32_t kUnilogitStudentIsA = 0;

// Folds the columns of two models' logits into `state` (seven rows, as in pair_state.py).
std::int32_t unilogit_divergence_update(const UnilogitMatrix* a, const UnilogitMatrix* b,
                                        const std::int64_t* labels, std::int64_t first_column,
                                        float* state, std::int64_t state_stride,
                                        const UnilogitTransform* a_transform,
                                        const UnilogitTransform* b_transform, std::int32_t threads);

// The student's gradient rows from a complete state and coefficients alpha, beta, gamma, at_label:
//   (exp(a - a_max) (alpha + beta ((a - a_max) - (b - b_max))) + gamma exp(b - b_max)) * dz/dx,
// at_label * dz/dx at the label. `out` may be the student's logits.
std::int32_t unilogit_divergence_gradient(
    const UnilogitMatrix* a, const UnilogitMatrix* b, const std::int64_t* labels,
    std::int64_t first_column, const float* state, std::int64_t state_stride,
    const float* coefficients, std::int64_t coefficients_stride, std::int32_t student,
    const UnilogitMatrix* out, const UnilogitTransform* a_transform,
    const UnilogitTransform* b_transform, std::int32_t threads);

// One read and one non-temporal write of every byte: the floor that the kernels are timed against.
void unilogit_stream_copy(const void* source, void* destination, std::int64_t bytes,
                          std::int32_t threads);

// Has the system back new memory with pages, all threads at once, where it can do so ahead of the
// first write; the memory's contents stay as they are.
void unilogit_populate(void* memory, std::int64_t bytes, std::int32_t threads);

// The vector functions by themselves, for tests over all arguments.
void unilogit_exp(const float* x, float* result, std::int64_t count);
void unilogit_tanh(const float* x, float* result, float* slope, std::int64_t count);
}

#pragma GCC visibility pop

namespace unilogit {

using std::int64_t;

constexpr int kTypes = 3;

// Columns that share one running maximum. Blocks start at fixed columns, so that results do not
// depend on the number of threads. 8 KiB of float32: a block stays in the first-level cache
// between its two reads.
constexpr int64_t kBlock = 2048;

// Columns of a gradient that are computed before they are written; a divisor of kBlock. Stores in
// longer runs fill the store queue and hold up the arithmetic.
constexpr int64_t kGradientBlock = 1024;

// The largest number of values that any instruction set stores at once.
constexpr int64_t kMaxUnit = 32;

// Blocks of a multiple of so many columns can be read where they lie, at every instruction set.
constexpr int64_t kWholeStep = 2 * kMaxUnit;

constexpr int64_t kCacheLine = 64;

// In a state's fourth row, of a row that is -inf but for the label: `NO_COLUMN` of row_state.py.
constexpr std::int32_t kNoColumn = 0x7FFFFFFF;

// Sum of exp(z - max) over some columns, without the label's. Empty: -inf and 0. The sum is NaN
// where a logit was NaN or +inf; a merge makes the maximum NaN too.
struct Part {
  float max;
  float sum;
};

// More of the same columns, with s = z - max (a maximum of -inf is taken as 0): their number, the
// sum of s, the sum of exp(s) s, and that of exp(s) (s - dot / sum)^2. What nobody asks for is 0.
struct Moments {
  float max;
  float sum;
  float count = 0.0f;
  float linear = 0.0f;
  float dot = 0.0f;
  float square = 0.0f;
};

// The same of two rows, and their dot product:
// the sum of exp(a - a_max) ((a - a_max) - (b - b_max)).
struct PairPart {
  float a_max;
  float a_sum;
  float a_dot;
  float b_max;
  float b_sum;
};

// What a gradient row of a pair is made of; the student's scale is in the factors already.
struct PairFactors {
  float a_shift;
  float b_shift;
  float alpha;
  float beta;
  float gamma;
};

// What a block of a general gradient row is made of: with e = exp(z - shift),
// (uniform + e (rest + tilt (z - shift))) times the cap's slope. The scale is in the factors.
struct RowFactors {
  float shift;
  float rest;
  float tilt;
  float uniform;
};

// The label's entry: `offset` counts from the first column of a block and may lie outside of it;
// the others are set by the block that holds it.
struct Label {
  int64_t offset;
  float logit;
  float cap_slope;  // 1 - tanh^2 of the cap, 1 without a cap
};

// Where the next values of a gradient row go.
struct RowWriter {
  void* out;  // next element in memory
  int64_t stride;
  int64_t head;  // elements until `out` is aligned to a cache line
  bool stream;   // bypass the cache
  int64_t pending = 0;
  float values[kMaxUnit];  // `pending` values that do not fill a store yet
  float constant = 0.0f;   // added to all but the label's, by those who know of it
};

// A block's contribution to a gradient row: factor * exponentials[k], and `label_value` at `label`.
struct GradientBlock {
  const float* exponentials;
  int64_t count;
  float factor;
  int64_t label;
  float label_value;
  bool last;  // nothing follows: flush
};

// What an objective needs of the vocabulary, computed once a call.
struct ObjectiveTerms {
  std::int32_t objective;
  double inverse_vocab;     // 1 / V
  double uniform_log_odds;  // u = -log(V - 1)
  double softplus_uniform;  // softplus(u) = log(V / (V - 1))
};

struct RowResult {
  double loss;
  double slope;
};

// The weights of `unilogit_log_odds_sweep`, and the V of the uniform distribution.
struct StatisticsTerms {
  double cross_entropy;
  double uniform;
  double squared_logsumexp;
  double entropy;
  double constant;
  double vocab_size;
};

// The loss of a row, and its gradient row as `unilogit_log_odds_gradient` takes it.
struct StatisticsResult {
  double loss;
  double of_logsumexp;  // the part of the loss that is its square's
  double rest;
  double at_label;
  double tilt;
  double uniform;
};

// More of a row than its log-odds, by one instruction set. Compiled apart from the other kernels,
// so that these are inlined as if there were no more. Arrays are indexed by UnilogitType.
struct MomentKernels {
  // `block_part` with the moments that `needs` asks for, one at least.
  Moments (*block_moments[kTypes])(const void* x, int64_t stride, int64_t count,
                                   const UnilogitTransform& transform, std::int32_t needs,
                                   Label& label, float* exponentials);
  // `write_block`, of the constant too.
  void (*write_block[kTypes])(RowWriter& writer, const GradientBlock& block);
  // write_block, then block_moments; [type of logits][type of gradient].
  Moments (*write_block_and_moments[kTypes][kTypes])(RowWriter& writer, const GradientBlock& block,
                                                     const void* x, int64_t stride, int64_t count,
                                                     const UnilogitTransform& transform,
                                                     std::int32_t needs, Label& label,
                                                     float* exponentials);
  Moments (*merge)(const Moments* parts, int64_t count, std::int32_t needs, float* weights);
  StatisticsResult (*finish_row)(const Moments& rest, float target, bool label_exists,
                                 const StatisticsTerms& terms);
  // Blocks of whole steps of a general gradient row, without its label's entry; `cap_slope` may be
  // null.
  void (*row_values[kTypes])(const void* x, int64_t count, const RowFactors& factors,
                             const float* cap_slope, float* values);
  // The same where `values` holds the exponentials, times the cap's slope, relative to another
  // maximum, whose weight is in the factors.
  void (*finish_values[kTypes])(const void* x, int64_t count, const RowFactors& factors,
                                const float* cap_slope, float* values);
};

// One instruction set. Arrays are indexed by UnilogitType.
struct Kernels {
  const char* name;
  const MomentKernels* moments;
  // Statistics of a block; its exponentials relative to its own maximum, times the cap's slope,
  // go to `exponentials` (kBlock floats) unless that is null.
  Part (*block_part[kTypes])(const void* x, int64_t stride, int64_t count,
                             const UnilogitTransform& transform, Label& label, float* exponentials);
  // The same exponentials relative to a given maximum.
  void (*block_exponentials[kTypes])(const void* x, int64_t stride, int64_t count,
                                     const UnilogitTransform& transform, float max, Label& label,
                                     float* exponentials);
  // Takes no notice of a constant.
  void (*write_block[kTypes])(RowWriter& writer, const GradientBlock& block);
  // write_block, then block_part into the same exponentials; [type of logits][type of gradient].
  Part (*write_block_and_part[kTypes][kTypes])(RowWriter& writer, const GradientBlock& block,
                                               const void* x, int64_t stride, int64_t count,
                                               const UnilogitTransform& transform, Label& label,
                                               float* exponentials);
  // The merge: weights[k] becomes exp(parts[k].max - result.max) and may be null.
  Part (*merge)(const Part* parts, int64_t count, float* weights);
  RowResult (*finish_row)(const Part& rest, float target, bool label_exists,
                          const ObjectiveTerms& terms);
  // A block as float32, its label's column -inf, padded with -inf to whole steps: their number.
  // `cap_slope` (kBlock floats) is written only where there is a cap.
  int64_t (*stage[kTypes])(const void* x, int64_t stride, int64_t count,
                           const UnilogitTransform& transform, Label& label, float* z,
                           float* cap_slope);
  // Blocks of whole steps, without a label; [type of a][type of b].
  PairPart (*pair_part[kTypes][kTypes])(const void* a, const void* b, int64_t count);
  // `cap_slope`, the student's, may be null.
  void (*pair_gradient[kTypes][kTypes])(const void* a, const void* b, int64_t count,
                                        const PairFactors& factors, const float* cap_slope,
                                        float* values);
  PairPart (*merge_pairs)(const PairPart* parts, int64_t count);
  void (*stream_copy)(const char* source, char* destination, int64_t bytes);
  void (*exp)(const float* x, float* result, int64_t count);
  void (*tanh)(const float* x, float* result, float* slope, int64_t count);
};

// Defined by the sources of the instruction sets.
extern const MomentKernels kBaselineMoments;
extern const MomentKernels kAvx2Moments;
extern const MomentKernels kAvx512Moments;
extern const MomentKernels kAvx512Bf16Moments;
extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

}  // namespace unilogit
