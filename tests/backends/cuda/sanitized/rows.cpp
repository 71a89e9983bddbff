// Launches the CUDA kernels, compiled for the CPU, on memory that ends where the tensors end, and
// compares them with double precision. Argument: the seed of the order, 0 for in sequence.
#include "kernels.h"
#include "memory.h"

MERGE_PARTS()
LOG_ODDS_UPDATE(Bfloat16, plain)
LOG_ODDS_UPDATE(Float32, capped)
LOG_ODDS_GRADIENT(Bfloat16, Bfloat16, plain)
LOG_ODDS_GRADIENT(Float32, Float16, capped)
LOG_ODDS_SWEEP(Bfloat16, Bfloat16, plain)
LOG_ODDS_SWEEP(Float32, Float16, capped)
RUNNER_UP_MERGE()
RUNNER_UP_UPDATE(Bfloat16, plain)
RUNNER_UP_UPDATE(Float32, capped)
RUNNER_UP_GRADIENT(Bfloat16, Bfloat16, plain)
RUNNER_UP_GRADIENT(Float32, Float16, capped)
SCALE(Bfloat16)

namespace {

using namespace unilogit;

constexpr float kCap = 5.0f;
constexpr int kUnilogit = 0;

unsigned seed = 0;

// Everything that the kernels compute of a row, in double precision.
struct Exact {
  std::vector<double> z, cap_slope;
  double max = -HUGE_VAL, sum = 0, d = 0, value = 0, slope = 0;
  int label, runner_up = -1;

  template <class T>
  Exact(Tensor<T>& logits, int row, int v, int label, bool capped) : label(label) {
    for (int j = 0; j < v; ++j) {
      const double x = logits.at(row, j), t = std::tanh(x / kCap);
      z.push_back(capped ? kCap * t : x);
      cap_slope.push_back(capped ? 1 - t * t : 1);
      if (j == label || z[j] <= max) continue;
      max = z[j];
      runner_up = j;
    }
    for (int j = 0; j < v; ++j) sum += j == label ? 0 : std::exp(z[j] - max);
    d = z[label] - max - std::log(sum);
    const double p = 1 / (1 + std::exp(-d)), u = -std::log(v - 1.0);
    value = p * (d - u) - std::log1p(std::exp(d)) + std::log1p(std::exp(u));
    slope = p * (1 - p) * (d - u);
  }
  double gradient(int j, double by) const {
    return by * cap_slope[j] * (j == label ? 1 : -std::exp(z[j] - max) / sum);
  }
};

// The kernels of a pair of types, as functions of the launch.
template <class Logits, class Out, class Update, class Gradient, class Sweep, class RunnerUpUpdate,
          class RunnerUpGradient>
void run(const Case& c, bool capped, Update update, Gradient gradient, Sweep sweep,
         RunnerUpUpdate runner_up_update, RunnerUpGradient runner_up_gradient) {
  Tensor<Logits> logits(c.n, c.v + c.gap, c.v, c.beyond);
  Tensor<Out> out(c.n, c.v, c.v, 1);
  auto labels = filled<int64>(c.n, 0);
  auto weight = filled<float>(c.n, 1.0f);
  auto values = filled<float>(c.n, 0.0f), slopes = filled<float>(c.n, 0.0f);
  auto state = filled<float>(3 * c.n, -HUGE_VALF);
  auto parts = filled<float>(2 * c.n * c.parts, 0.0f);
  std::fill(state.get() + c.n, state.get() + 2 * c.n, 0.0f);
  std::vector<Exact> exact;
  for (int i = 0; i < c.n; ++i) {
    labels[i] = (i * 379 + c.v / 2) % c.v;
    for (int j = 0; j < c.v; ++j) {
      logits.set(i, j, 4 * std::sin(0.7f * (i * 31 + j)));
    }
    exact.emplace_back(logits, i, c.v, static_cast<int>(labels[i]), capped);
  }
  const double v = c.v;
  const float scale = capped ? 1 / kCap : 1.0f;
  const float u = static_cast<float>(-std::log(v - 1)),
              s = static_cast<float>(std::log1p(1 / (v - 1)));
  const auto inverse = static_cast<float>(1 / v);
  const auto rows = static_cast<unsigned>(c.n), parts_ = static_cast<unsigned>(c.parts);
  const auto threads = static_cast<unsigned>(c.threads);

  check_fault("update", cuda_cpu::launch({rows, parts_}, {threads}, seed, [&] {
    update(logits.data(), labels.get(), nullptr, state.get(), parts.get(), logits.stride, 1, c.n, 0,
           c.v, scale, kCap);
  }));
  check_fault("merge", cuda_cpu::launch({rows}, {threads}, seed, [&] {
    merge_parts(parts.get(), labels.get(), weight.get(), state.get(), values.get(), slopes.get(),
                c.n, c.v, c.parts, kUnilogit, u, s, inverse);
  }));
  check_fault("gradient", cuda_cpu::launch({rows, parts_}, {threads}, seed, [&] {
    gradient(logits.data(), labels.get(), state.get(), slopes.get(), out.data(), logits.stride, 1,
             out.stride, 1, c.n, 0, c.v, scale, kCap, 1.0f);
  }));
  auto compare = [&](Tensor<Out>& gradients) {
    for (int i = 0; i < c.n; ++i) {
      const double largest = std::fabs(exact[i].slope);
      check_near("value", values[i], exact[i].value, 1e-5 * (1 + std::fabs(exact[i].value)));
      for (int j = 0; j < c.v; ++j) {
        check_near("gradient", gradients.at(i, j), exact[i].gradient(j, exact[i].slope),
                   1e-2 * largest + 1e-7);
      }
    }
  };
  compare(out);

  auto wide_state = filled<float>(4 * c.n, -HUGE_VALF), wide_slopes = filled<float>(3 * c.n, 0.0f);
  auto wide_parts = filled<float>(3 * c.n * c.parts, 0.0f);
  for (int i = 0; i < c.n; ++i) {
    wide_state[c.n + i] = 0.0f;
    wide_state[3 * c.n + i] = bits_of_int(kNoColumn);
    wide_slopes[i] = 0.75f;
    wide_slopes[c.n + i] = -0.5f;
    wide_slopes[2 * c.n + i] = 0.25f;
  }
  check_fault("runner-up", cuda_cpu::launch({rows, parts_}, {threads}, seed, [&] {
    runner_up_update(logits.data(), labels.get(), wide_state.get(), wide_parts.get(), logits.stride,
                     1, c.n, 0, c.v, scale, kCap);
  }));
  check_fault("runner-up's merge", cuda_cpu::launch({rows}, {threads}, seed, [&] {
    runner_up_merge(wide_parts.get(), wide_state.get(), c.n, c.parts);
  }));
  check_fault("runner-up's gradient", cuda_cpu::launch({rows, parts_}, {threads}, seed, [&] {
    runner_up_gradient(logits.data(), labels.get(), wide_state.get(), wide_slopes.get(), out.data(),
                       logits.stride, 1, out.stride, 1, c.n, c.n, 0, c.v, scale, kCap, 1.0f);
  }));
  for (int i = 0; i < c.n; ++i) {
    const Exact& row = exact[i];
    const int runner_up = int_of_bits(wide_state[3 * c.n + i]);
    // Caps and float32 make logits equal that are not.
    check_near("runner-up", row.z[runner_up], row.max, 1e-6);
    for (int j = 0; j < c.v; ++j) {
      const double special = j == row.label ? -0.5 : j == runner_up ? 0.25 : 0;
      const double expected =
          j == row.label || j == runner_up ? special * row.cap_slope[j] : row.gradient(j, 0.75);
      check_near("runner-up's gradient", out.at(i, j), expected, 1e-2);
    }
  }

  std::fill(values.get(), values.get() + c.n, 0.0f);
  check_fault("sweep", cuda_cpu::launch({rows}, {threads}, seed, [&] {
    sweep(logits.data(), labels.get(), weight.get(), out.data(), values.get(), logits.stride, 1,
          out.stride, 1, c.v, kUnilogit, scale, kCap, 1.0f, u, s, inverse);
  }));
  compare(out);
  if constexpr (std::is_same_v<Logits, Out>) {
    check_fault("sweep in place", cuda_cpu::launch({rows}, {threads}, seed, [&] {
      sweep(logits.data(), labels.get(), weight.get(), logits.data(), values.get(), logits.stride,
            1, logits.stride, 1, c.v, kUnilogit, scale, kCap, 1.0f, u, s, inverse);
    }));
    compare(logits);
  }
}

void check_scale() {
  Tensor<Bfloat16> values(1, 1003, 1003, 3);
  const float factor = 0.5f;
  for (int i = 0; i < 1003; ++i) values.data()[i] = Bfloat16::store(static_cast<float>(i % 100));
  check_fault("scale", cuda_cpu::launch({2}, {64}, seed,
                                        [&] { scale_Bfloat16(values.data(), &factor, 1003); }));
  for (int i = 0; i < 1003; ++i) check_near("scale", values.at(0, i), 0.5 * (i % 100), 0);
}

}  // namespace

int main(int, char** arguments) {
  seed = static_cast<unsigned>(std::atoi(arguments[1]));
  for (const Case& c : kCases) {
    run<Bfloat16, Bfloat16>(c, false, log_odds_update_Bfloat16_plain,
                            log_odds_gradient_Bfloat16_Bfloat16_plain,
                            log_odds_sweep_Bfloat16_Bfloat16_plain, runner_up_update_Bfloat16_plain,
                            runner_up_gradient_Bfloat16_Bfloat16_plain);
    run<Float32, Float16>(c, true, log_odds_update_Float32_capped,
                          log_odds_gradient_Float32_Float16_capped,
                          log_odds_sweep_Float32_Float16_capped, runner_up_update_Float32_capped,
                          runner_up_gradient_Float32_Float16_capped);
  }
  check_scale();
  std::puts("correct");
}
