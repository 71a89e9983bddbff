// Launches the two-row CUDA kernels, compiled for the CPU, on memory that ends where the tensors
// end, and compares them with double precision. Argument: the seed of the order, 0 for in sequence.
#include "pair_kernels.h"
#include "memory.h"

DIVERGENCE_UPDATE()
MERGE_PAIRS()
DIVERGENCE_GRADIENT()

namespace {

using namespace unilogit;

constexpr int kFields = 7;  // of a state
constexpr float kNone = 0.0f;

unsigned seed = 0;

template <class T>
constexpr int type_of() {
  if (std::is_same_v<T, Float32>) return kFloat32;
  return std::is_same_v<T, Bfloat16> ? kBfloat16 : kFloat16;
}

// `z = scale * x`, or with a cap `z = cap * tanh(scale * x / cap)`.
struct Transformed {
  float scale, cap;

  float device_scale() const { return cap == kNone ? scale : scale / cap; }
  double value(double x) const {
    return cap == kNone ? scale * x : cap * std::tanh(scale * x / cap);
  }
  double slope(double x) const {
    const double t = cap == kNone ? 0 : std::tanh(scale * x / cap);
    return scale * (1 - t * t);
  }
};

// Statistics of one row without the label, in double precision.
struct Exact {
  std::vector<double> z;
  double max = -HUGE_VAL, sum = 0;

  template <class T>
  Exact(Tensor<T>& logits, int row, int v, int label, const Transformed& transform) {
    for (int j = 0; j < v; ++j) {
      z.push_back(transform.value(logits.at(row, j)));
      if (j != label) max = std::max(max, z[j]);
    }
    for (int j = 0; j < v; ++j) sum += j == label ? 0 : weight(j);
  }
  double shifted(int j) const { return z[j] - max; }
  double weight(int j) const { return std::exp(shifted(j)); }
};

template <class A, class B, class Out>
void run(const Case& c, int b_beyond, const Transformed& a_transform,
         const Transformed& b_transform, bool a_is_student, bool in_place) {
  Tensor<A> a(c.n, c.v + c.gap, c.v, c.beyond);
  Tensor<B> b(c.n, c.v + c.gap, c.v, c.beyond + b_beyond);
  Tensor<Out> separate(c.n, c.v, c.v, c.beyond);
  auto labels = filled<int64>(c.n, 0);
  auto coefficients = filled<float>(4 * c.n, 0.0f);
  const float given[4] = {0.5f, -0.25f, 0.75f, -1.5f};
  std::vector<Exact> exact_a, exact_b;
  std::vector<double> dots;
  for (int i = 0; i < c.n; ++i) {
    labels[i] = (i * 379 + c.v / 2) % c.v;
    const int label = static_cast<int>(labels[i]);
    for (int j = 0; j < c.v; ++j) {
      a.set(i, j, 4 * std::sin(0.7f * (i * 31 + j)));
      b.set(i, j, 3 * std::sin(0.9f * (i * 17 + j)));
    }
    exact_a.emplace_back(a, i, c.v, label, a_transform);
    exact_b.emplace_back(b, i, c.v, label, b_transform);
    double dot = 0;
    for (int j = 0; j < c.v; ++j) {
      const double difference = exact_a[i].shifted(j) - exact_b[i].shifted(j);
      if (j != label) dot += exact_a[i].weight(j) * difference;
    }
    dots.push_back(dot);
    // The last of several rows is one without a gradient.
    for (int k = 0; k < 4; ++k) coefficients[k * c.n + i] = i > 0 && i == c.n - 1 ? 0.0f : given[k];
  }
  const auto rows = static_cast<unsigned>(c.n), parts = static_cast<unsigned>(c.parts);
  const auto threads = static_cast<unsigned>(c.threads);
  const int64 a_stride = a.stride, b_stride = b.stride;

  auto empty_state = [&] {
    auto state = filled<float>(kFields * c.n, -HUGE_VALF);
    for (const int sum : {1, 2, 4}) std::fill_n(state.get() + sum * c.n, c.n, 0.0f);
    return state;
  };
  auto update = [&](float* state, float* memory, int first, int v, unsigned blocks) {
    check_fault("update", cuda_cpu::launch({rows, blocks}, {threads}, seed, [&] {
      divergence_update(a.data() + first, b.data() + first, labels.get(), state, memory, a_stride,
                        1, b_stride, 1, c.n, first, v, type_of<A>(), type_of<B>(),
                        a_transform.device_scale(), a_transform.cap, b_transform.device_scale(),
                        b_transform.cap);
    }));
  };
  auto compare = [&](const float* state) {
    for (int i = 0; i < c.n; ++i) {
      const int label = static_cast<int>(labels[i]);
      const double expected[kFields] = {exact_a[i].max,     exact_a[i].sum, dots[i],
                                        exact_b[i].max,     exact_b[i].sum, exact_a[i].z[label],
                                        exact_b[i].z[label]};
      for (int k = 0; k < kFields; ++k) {
        check_near("state", state[k * c.n + i], expected[k], 1e-4 * (1 + std::fabs(expected[k])));
      }
    }
  };

  // Several blocks a row, and two chunks of columns one after the other.
  auto state = empty_state(), chunked = empty_state();
  auto memory = filled<float>(kPairFields * c.n * c.parts, 0.0f);
  update(state.get(), memory.get(), 0, c.v, parts);
  check_fault("merge", cuda_cpu::launch({rows}, {threads}, seed, [&] {
    merge_pairs(memory.get(), state.get(), c.n, c.parts);
  }));
  compare(state.get());
  const int cut = c.v / 3;
  update(chunked.get(), nullptr, 0, cut, 1);
  update(chunked.get(), nullptr, cut, c.v - cut, 1);
  compare(chunked.get());

  auto write = [&](auto& out) {
    const Transformed& student = a_is_student ? a_transform : b_transform;
    std::vector<double> slopes;
    for (int i = 0; i < c.n; ++i) {
      for (int j = 0; j < c.v; ++j) {
        slopes.push_back(student.slope(a_is_student ? a.at(i, j) : b.at(i, j)));
      }
    }
    using Written = std::remove_reference_t<decltype(out)>;
    constexpr int type = std::is_same_v<Written, Tensor<A>>   ? type_of<A>()
                         : std::is_same_v<Written, Tensor<B>> ? type_of<B>()
                                                              : type_of<Out>();
    check_fault("gradient", cuda_cpu::launch({rows, parts}, {threads}, seed, [&] {
      divergence_gradient(a.data(), b.data(), labels.get(), state.get(), coefficients.get(),
                          out.data(), a_stride, 1, b_stride, 1, out.stride, 1, c.n, c.n, 0, c.v,
                          type_of<A>(), type_of<B>(), type, a_is_student,
                          a_transform.device_scale(), a_transform.cap, a_transform.scale,
                          b_transform.device_scale(), b_transform.cap, b_transform.scale);
    }));
    for (int i = 0; i < c.n; ++i) {
      const float* by = coefficients.get() + i;
      for (int j = 0; j < c.v; ++j) {
        const double s = exact_a[i].shifted(j), t = exact_b[i].shifted(j);
        double expected = std::exp(s) * (by[0] + by[c.n] * (s - t)) + by[2 * c.n] * std::exp(t);
        if (j == labels[i]) expected = by[3 * c.n];
        expected *= slopes[static_cast<size_t>(i) * c.v + j];
        check_near("gradient", out.at(i, j), expected, 1e-2 * (1 + std::fabs(expected)));
      }
    }
  };
  write(separate);
  if (!in_place) return;
  if (a_is_student) {
    write(a);
  } else {
    write(b);
  }
}

}  // namespace

int main(int, char** arguments) {
  seed = static_cast<unsigned>(std::atoi(arguments[1]));
  const Transformed plain = {0.5f, kNone}, capped = {2.0f, 5.0f};
  for (const Case& c : kCases) {
    run<Bfloat16, Bfloat16, Bfloat16>(c, 0, plain, capped, true, true);
    run<Float32, Bfloat16, Float16>(c, 0, capped, plain, false, true);
    run<Bfloat16, Float32, Bfloat16>(c, 1, plain, plain, true, false);
  }
  std::puts("correct");
}
