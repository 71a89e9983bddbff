// Launches the kernels of sums, moments and general gradient rows, compiled for the CPU, on memory
// that ends where the tensors end, and compares them with double precision. Argument: the seed of
// the order, 0 for in sequence.
#include "kernels.h"
#include "memory.h"

GENERAL_MERGE()
GENERAL_UPDATE(Bfloat16, plain)
GENERAL_UPDATE(Float32, capped)
GENERAL_GRADIENT(Bfloat16, Bfloat16, plain)
GENERAL_GRADIENT(Float32, Float16, capped)

namespace {

using namespace unilogit;

constexpr float kCap = 5.0f;
constexpr int kRows = 8;  // of a state
constexpr int kSlopes = 5;
constexpr int kEverything =
    kNeedsRunnerUp | kNeedsLogsumexp | kNeedsMean | kNeedsEntropy | kNeedsVariance;
constexpr float kUntouched = -77.0f;

unsigned seed = 0;

// A state of one row without the label's column, in double precision.
struct Exact {
  std::vector<double> z, cap_slope;
  double row[kRows] = {-HUGE_VAL, 0, 0, 0, 0, 0, 0, 0};
  int label, runner_up = -1;

  template <class T>
  Exact(Tensor<T>& logits, int i, int v, int label, bool capped) : label(label) {
    for (int j = 0; j < v; ++j) {
      const double x = logits.at(i, j), t = std::tanh(x / kCap);
      z.push_back(capped ? kCap * t : x);
      cap_slope.push_back(capped ? 1 - t * t : 1);
      if (j == label || z[j] <= row[kStateRowMax]) continue;
      row[kStateRowMax] = z[j];
      runner_up = j;
    }
    row[kStateTarget] = z[label];
    row[kStateCount] = v - 1;
    for (int j = 0; j < v; ++j) {
      if (j == label) continue;
      row[kStateRowSum] += std::exp(s(j));
      row[kStateLinear] += s(j);
      row[kStateDot] += std::exp(s(j)) * s(j);
    }
    const double mean = row[kStateDot] / row[kStateRowSum];
    for (int j = 0; j < v; ++j) {
      if (j != label) row[kStateSquare] += std::exp(s(j)) * (s(j) - mean) * (s(j) - mean);
    }
  }
  double s(int j) const { return z[j] - row[kStateRowMax]; }
  double gradient(int j, const float* slopes) const {
    const double r = std::exp(s(j)) / row[kStateRowSum];
    double entry = slopes[kSlopeUniform] - r * (slopes[kSlopeRest] + slopes[kSlopeTilt] * s(j));
    if (j == runner_up) entry = slopes[kSlopeAtRunnerUp];
    if (j == label) entry = slopes[kSlopeAtLabel];
    return cap_slope[j] * entry;
  }
};

std::unique_ptr<float[]> empty_state(int n) {
  auto state = filled<float>(kRows * n, 0.0f);
  std::fill_n(state.get(), n, -HUGE_VALF);
  std::fill_n(state.get() + kStateRunnerUp * n, n, bits_of_int(kNoColumn));
  return state;
}

void check_states(const float* state, const std::vector<Exact>& exact) {
  const int n = static_cast<int>(exact.size());
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < kRows; ++k) {
      const float found = state[k * n + i];
      if (k == kStateRunnerUp) {
        // Caps and float32 make logits equal that are not.
        check_near("runner-up", exact[i].z[int_of_bits(found)], exact[i].row[kStateRowMax], 1e-6);
      } else {
        check_near("state", found, exact[i].row[k], 1e-4 * (1 + std::fabs(exact[i].row[k])));
      }
    }
  }
}

// The kernels of a pair of types, as functions of the launch.
template <class Logits, class Out, class Update, class Gradient>
void run(const Case& c, bool capped, Update update, Gradient gradient) {
  Tensor<Logits> logits(c.n, c.v + c.gap, c.v, c.beyond);
  auto labels = filled<int64>(c.n, 0);
  std::vector<Exact> exact;
  for (int i = 0; i < c.n; ++i) {
    labels[i] = (i * 379 + c.v / 2) % c.v;
    for (int j = 0; j < c.v; ++j) logits.set(i, j, 4 * std::sin(0.7f * (i * 31 + j)));
    exact.emplace_back(logits, i, c.v, static_cast<int>(labels[i]), capped);
  }
  const float scale = capped ? 1 / kCap : 1.0f;
  const auto rows = static_cast<unsigned>(c.n), blocks = static_cast<unsigned>(c.parts);
  const auto threads = static_cast<unsigned>(c.threads);
  auto fold = [&](float* state, float* parts, int first, int v, unsigned share, int needs) {
    check_fault("update", cuda_cpu::launch({rows, share}, {threads}, seed, [&] {
      update(logits.data() + first, labels.get(), state, parts, logits.stride, 1, c.n, first, v,
             scale, kCap, needs);
    }));
  };

  // Several blocks a row; two chunks of columns one after the other; and the mean alone.
  auto state = empty_state(c.n), chunked = empty_state(c.n);
  auto parts = filled<float>((kRows - 1) * c.n * c.parts, 0.0f);
  fold(state.get(), parts.get(), 0, c.v, blocks, kEverything);
  check_fault("merge", cuda_cpu::launch({rows}, {threads}, seed, [&] {
    general_merge(parts.get(), state.get(), c.n, c.parts, kEverything);
  }));
  check_states(state.get(), exact);
  const int cut = c.v / 3;
  fold(chunked.get(), nullptr, 0, cut, 1, kEverything);
  fold(chunked.get(), nullptr, cut, c.v - cut, 1, kEverything);
  check_states(chunked.get(), exact);
  std::fill_n(chunked.get() + kStateDot * c.n, 2 * c.n, kUntouched);
  fold(chunked.get(), nullptr, 0, cut, 1, kNeedsMean);
  for (int i = 0; i < 2 * c.n; ++i) {
    check_near("a row that nobody needs", chunked[kStateDot * c.n + i], kUntouched, 0);
  }

  const float given[kSlopes] = {0.75f, -0.5f, 0.25f, 0.5f, -0.125f};
  auto slopes = filled<float>(kSlopes * c.n, 0.0f);
  for (int i = 0; i < kSlopes * c.n; ++i) slopes[i] = given[i / c.n];
  auto write = [&](auto& out) {
    check_fault("gradient", cuda_cpu::launch({rows, blocks}, {threads}, seed, [&] {
      gradient(logits.data(), labels.get(), state.get(), slopes.get(), out.data(), logits.stride, 1,
               out.stride, 1, c.n, c.n, 0, c.v, scale, kCap, 1.0f);
    }));
    for (int i = 0; i < c.n; ++i) {
      const int runner_up = int_of_bits(state[kStateRunnerUp * c.n + i]);
      exact[i].runner_up = runner_up;
      for (int j = 0; j < c.v; ++j) {
        check_near("gradient", out.at(i, j), exact[i].gradient(j, given), 1e-2);
      }
    }
  };
  Tensor<Out> out(c.n, c.v, c.v, 1);
  write(out);
  if constexpr (std::is_same_v<Logits, Out>) write(logits);
}

}  // namespace

int main(int, char** arguments) {
  seed = static_cast<unsigned>(std::atoi(arguments[1]));
  for (const Case& c : kCases) {
    run<Bfloat16, Bfloat16>(c, false, general_update_Bfloat16_plain,
                            general_gradient_Bfloat16_Bfloat16_plain);
    run<Float32, Float16>(c, true, general_update_Float32_capped,
                          general_gradient_Float32_Float16_capped);
  }
  std::puts("correct");
}
