// Launches the CUDA kernels, compiled for the CPU, on memory that ends where the tensors end, and
// compares them with double precision. Argument: the seed of the order, 0 for in sequence.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

MERGE_PARTS()
LOG_ODDS_UPDATE(Bfloat16, plain)
LOG_ODDS_UPDATE(Float32, capped)
LOG_ODDS_GRADIENT(Bfloat16, Bfloat16, plain)
LOG_ODDS_GRADIENT(Float32, Float16, capped)
LOG_ODDS_SWEEP(Bfloat16, Bfloat16, plain)
LOG_ODDS_SWEEP(Float32, Float16, capped)
SCALE(Bfloat16)

namespace {

using namespace unilogit;

constexpr float kCap = 5.0f;
constexpr int kUnilogit = 0;

unsigned seed = 0;

template <class T>
struct Tensor {
  // `beyond` elements past a 16-byte boundary; the last element is the last one of the allocation.
  Tensor(int rows, int stride, int columns, int beyond) : stride(stride), beyond(beyond) {
    size = beyond + (rows - 1) * stride + columns;
    memory.reset(new typename T::Stored[size]());
  }
  typename T::Stored* data() { return memory.get() + beyond; }
  float at(int row, int column) { return T::load(data()[row * stride + column]); }

  int stride, beyond, size;
  std::unique_ptr<typename T::Stored[]> memory;
};

template <class T>
std::unique_ptr<T[]> filled(int count, T value) {
  std::unique_ptr<T[]> array(new T[count]);
  std::fill(array.get(), array.get() + count, value);
  return array;
}

void check(bool holds, const char* what, double got, double expected) {
  if (holds) return;
  std::printf("%s: got %.6g, expected %.6g\n", what, got, expected);
  std::exit(1);
}

void check_near(const char* what, double got, double expected, double tolerance) {
  check(std::fabs(got - expected) <= tolerance, what, got, expected);
}

void check_fault(const char* what, const std::string& fault) {
  if (fault.empty()) return;
  std::printf("%s: %s\n", what, fault.c_str());
  std::exit(1);
}

// Everything that the kernels compute of a row, in double precision.
struct Exact {
  std::vector<double> z, cap_slope;
  double max = -HUGE_VAL, sum = 0, d = 0, value = 0, slope = 0;
  int label;

  template <class T>
  Exact(Tensor<T>& logits, int row, int v, int label, bool capped) : label(label) {
    for (int j = 0; j < v; ++j) {
      const double x = logits.at(row, j), t = std::tanh(x / kCap);
      z.push_back(capped ? kCap * t : x);
      cap_slope.push_back(capped ? 1 - t * t : 1);
      if (j != label) max = std::max(max, z[j]);
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

struct Case {
  int n, v, gap, beyond, threads, parts;
};

// The kernels of a pair of types, as functions of the launch.
template <class Logits, class Out, class Update, class Gradient, class Sweep>
void run(const Case& c, bool capped, Update update, Gradient gradient, Sweep sweep) {
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
      logits.data()[i * logits.stride + j] = Logits::store(4 * std::sin(0.7f * (i * 31 + j)));
    }
    exact.emplace_back(logits, i, c.v, static_cast<int>(labels[i]), capped);
  }
  const double v = c.v;
  const float scale = capped ? 1 / kCap : 1.0f;
  const float u = static_cast<float>(-std::log(v - 1)), s = static_cast<float>(std::log1p(1 / (v - 1)));
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
  std::fill(values.get(), values.get() + c.n, 0.0f);
  check_fault("sweep", cuda_cpu::launch({rows}, {threads}, seed, [&] {
    sweep(logits.data(), labels.get(), weight.get(), out.data(), values.get(), logits.stride, 1,
          out.stride, 1, c.v, kUnilogit, scale, kCap, 1.0f, u, s, inverse);
  }));
  compare(out);
  if constexpr (std::is_same_v<Logits, Out>) {
    check_fault("sweep in place", cuda_cpu::launch({rows}, {threads}, seed, [&] {
      sweep(logits.data(), labels.get(), weight.get(), logits.data(), values.get(), logits.stride, 1,
            logits.stride, 1, c.v, kUnilogit, scale, kCap, 1.0f, u, s, inverse);
    }));
    compare(logits);
  }
}

void check_scale() {
  Tensor<Bfloat16> values(1, 1003, 1003, 3);
  const float factor = 0.5f;
  for (int i = 0; i < 1003; ++i) values.data()[i] = Bfloat16::store(static_cast<float>(i % 100));
  check_fault("scale", cuda_cpu::launch({2}, {64}, seed, [&] {
    scale_Bfloat16(values.data(), &factor, 1003);
  }));
  for (int i = 0; i < 1003; ++i) check_near("scale", values.at(0, i), 0.5 * (i % 100), 0);
}

}  // namespace

int main(int, char** arguments) {
  seed = static_cast<unsigned>(std::atoi(arguments[1]));
  // Rows with tiles, single vectors and ends; aligned and not; of one block and of several.
  const Case cases[] = {{3, 5, 0, 0, 32, 1},    {2, 701, 3, 1, 64, 1},   {2, 2501, 0, 5, 64, 1},
                        {1, 3072, 0, 8, 64, 3}, {2, 2085, 11, 2, 32, 2}, {1, 1027, 0, 7, 96, 5}};
  for (const Case& c : cases) {
    run<Bfloat16, Bfloat16>(c, false, log_odds_update_Bfloat16_plain,
                            log_odds_gradient_Bfloat16_Bfloat16_plain,
                            log_odds_sweep_Bfloat16_Bfloat16_plain);
    run<Float32, Float16>(c, true, log_odds_update_Float32_capped,
                          log_odds_gradient_Float32_Float16_capped,
                          log_odds_sweep_Float32_Float16_capped);
  }
  check_scale();
  std::puts("correct");
}
