// The maths of a row, shared by all kernels: its running statistics, the objectives, and entries of
// gradient rows. The twin of csrc/cpu/row_math.h and of the Triton kernels' row_maths.py.
#pragma once

#include "row_parts.h"

namespace unilogit {

// ---- objectives --------------------------------------------------------------------------------

// log_odds d = z_y - log(sum of the rest), the maximum subtracted first.
UNILOGIT_DEVICE float log_odds(Part rest, float target, bool label_exists) {
  if (!label_exists || target == infinity()) return not_a_number();
  if (rest.max == -infinity()) {
    return target == -infinity() ? not_a_number() : target + infinity();
  }
  return (target - rest.max) - logf(rest.sum);
}

enum Objective : int {
  kNoObjective = -1,
  kUnilogitReverse = 0,
  kUnilogitForward = 1,
  kCrossEntropy = 2,
  kGradientAscent = 3,
};

// What the objectives know of the vocabulary's size V: u = -log(V - 1), log(1 + exp(u)), 1 / V.
struct ObjectiveTerms {
  int objective;
  float uniform_log_odds;
  float softplus_uniform;
  float inverse_vocab;
};

struct RowResult {
  float value;
  float slope;
};

// Value and slope of an objective at d, in forms that do not cancel for either sign of d. A clamp
// to +-2e4, where sigmoid(-|d|) is 0, keeps 0 * inf out of bounded values.
UNILOGIT_DEVICE RowResult evaluate_objective(const ObjectiveTerms& terms, float d) {
  if (d != d) return {not_a_number(), not_a_number()};
  const float tail_exp = expf(-fabsf(d));
  const float log1p_term = log1pf(tail_exp);    // softplus(-|d|)
  const float body = 1.0f / (1.0f + tail_exp);  // sigmoid(|d|)
  const float tail = tail_exp * body;           // sigmoid(-|d|)
  if (terms.objective == kUnilogitReverse) {
    const float bounded = fminf(fmaxf(d, -2e4f), 2e4f);
    const float entropy_like = tail * (bounded - terms.uniform_log_odds);
    const float value =
        d > 0.0f ? (terms.softplus_uniform - terms.uniform_log_odds) - entropy_like - log1p_term
                 : entropy_like - log1p_term + terms.softplus_uniform;
    return {value < 0.0f ? 0.0f : value, entropy_like * body};
  }
  if (terms.objective == kUnilogitForward) {
    const float linear = d > 0.0f ? (1.0f - terms.inverse_vocab) * d : -d * terms.inverse_vocab;
    const float value =
        linear +
        (log1p_term + (terms.uniform_log_odds * terms.inverse_vocab - terms.softplus_uniform));
    return {value < 0.0f ? 0.0f : value, (d > 0.0f ? body : tail) - terms.inverse_vocab};
  }
  const float sign = terms.objective == kCrossEntropy ? 1.0f : -1.0f;
  const float cross_entropy = (d < 0.0f ? -d : 0.0f) + log1p_term;
  return {sign * cross_entropy, -sign * (d > 0.0f ? tail : body)};
}

// ---- gradient ----------------------------------------------------------------------------------

// Rows of what a gradient kernel is given: a plain one has the first alone, which is the label's
// slope too, and one with the runner-up three.
enum SlopeRow : int {
  kSlopeRest = 0,
  kSlopeAtLabel = 1,
  kSlopeAtRunnerUp = 2,
  kSlopeTilt = 3,
  kSlopeUniform = 4,
};

struct Slopes {
  const float* data;
  int64 stride;
  int64 column;

  UNILOGIT_DEVICE float at(SlopeRow row) const { return data[column + row * stride]; }
};

// A row's complete state, of which `v` columns are wanted.
struct CompleteRow {
  const float* state;
  int64 stride;
  int64 row;
  int64 first_column;
  int v;

  UNILOGIT_DEVICE Part rest() const { return {state[row], state[row + stride]}; }
  // Its column among these, or -1.
  UNILOGIT_DEVICE int runner_up() const {
    const int64 column = int_of_bits(state[row + kStateRunnerUp * stride]) - first_column;
    return column >= 0 && column < v ? static_cast<int>(column) : -1;
  }
};

// A gradient row, but for the cap's slope: `at_label` at the label, elsewhere
// `coefficient * exp(s)` with s = z - max. A row of size 0 is exactly 0.
struct GradientRow {
  static constexpr bool kHasRunnerUp = false;
  static constexpr bool kIsGeneral = false;
  float max;
  float coefficient;
  float at_label;
  float size;

  UNILOGIT_DEVICE float entry(float s) const { return coefficient * exponential(s); }
  // The column with an entry of its own beside the label's, -1 for none; and that entry.
  UNILOGIT_DEVICE int column() const { return -1; }
  UNILOGIT_DEVICE float entry_there() const { return 0.0f; }

  static UNILOGIT_DEVICE GradientRow of(Part rest, float slope, float derivative) {
    const float at_label = slope * derivative;
    return {rest.max, -at_label / rest.sum, at_label, slope};
  }
  static UNILOGIT_DEVICE GradientRow of(const CompleteRow& state, const Slopes& slopes,
                                        float derivative) {
    return of(state.rest(), slopes.at(kSlopeRest), derivative);
  }
};

// One with an entry of its own in the column `runner_up`.
struct RunnerUpRow : GradientRow {
  static constexpr bool kHasRunnerUp = true;
  float at_runner_up;
  int runner_up;

  UNILOGIT_DEVICE int column() const { return runner_up; }
  UNILOGIT_DEVICE float entry_there() const { return at_runner_up; }

  static UNILOGIT_DEVICE RunnerUpRow of(const CompleteRow& state, const Slopes& slopes,
                                        float derivative) {
    return of(GradientRow::of(state, slopes, derivative), state, slopes, derivative);
  }
  static UNILOGIT_DEVICE RunnerUpRow of(const GradientRow& elsewhere, const CompleteRow& state,
                                        const Slopes& slopes, float derivative) {
    const float at_label = slopes.at(kSlopeAtLabel), at_runner_up = slopes.at(kSlopeAtRunnerUp);
    const int runner_up = state.runner_up();
    RunnerUpRow row = {elsewhere, at_runner_up * derivative, runner_up};
    row.size = fabsf(row.size) + fabsf(at_label) + fabsf(at_runner_up);
    row.at_label = at_label * derivative;
    return row;
  }
};

// One whose entries elsewhere are `exp(s) (coefficient + tilt s) + uniform`.
struct GeneralRow : RunnerUpRow {
  static constexpr bool kIsGeneral = true;
  float tilt;
  float uniform;

  UNILOGIT_DEVICE float entry(float s) const {
    return fmaf(exponential(s), fmaf(tilt, bounded(s), coefficient), uniform);
  }

  static UNILOGIT_DEVICE GeneralRow of(const CompleteRow& state, const Slopes& slopes,
                                       float derivative) {
    const float tilt = slopes.at(kSlopeTilt), uniform = slopes.at(kSlopeUniform);
    Part rest = state.rest();
    rest.max = shift_of(rest.max);
    rest.sum = rest.sum == 0.0f ? 1.0f : rest.sum;
    const GradientRow elsewhere = GradientRow::of(rest, slopes.at(kSlopeRest), derivative);
    GeneralRow row = {RunnerUpRow::of(elsewhere, state, slopes, derivative),
                      -tilt * derivative / rest.sum, uniform * derivative};
    row.size += fabsf(tilt) + fabsf(uniform);
    return row;
  }
};

}  // namespace unilogit
