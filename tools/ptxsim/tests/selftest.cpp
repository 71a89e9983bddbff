// Runs the executor's test kernels on the CPU and compares them with float64. Argument: the seed of
// the order, 0 for in sequence.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_kernels.cu"

namespace {

// Memory of its own, so that AddressSanitizer knows where it ends.
template <class T>
std::unique_ptr<T[]> filled(int count, T (*value)(int)) {
    std::unique_ptr<T[]> array(new T[count]);
    for (int i = 0; i < count; i++) array[i] = value(i);
    return array;
}

void check(const char* what, const std::string& fault, double error, double limit) {
    if (fault.empty() && error <= limit) return;
    std::printf("%s: error %.2e, %s\n", what, error, fault.c_str());
    std::exit(1);
}

void check_cross_entropy(unsigned seed) {
    constexpr int rows = 3, v = 1003;
    const auto logits =
        filled<bfloat16>(rows * v, [](int i) { return to_bfloat16(4 * sinf(0.7f * i)); });
    const auto labels = filled<long long>(rows, [](int i) { return (i * 379ll + 5) % v; });
    const auto losses = filled<float>(rows, [](int) { return 0.0f; });
    std::vector<double> exact(rows);
    for (int r = 0; r < rows; r++) {
        double sum = 0;
        for (int i = 0; i < v; i++) sum += exp(double(to_float(logits[r * v + i])));
        exact[r] = log(sum) - to_float(logits[r * v + labels[r]]);
    }
    const std::string fault = cuda_cpu::launch({rows}, {256}, seed, [&] {
        cross_entropy(logits.get(), labels.get(), losses.get(), v, v);
    });
    double error = 0;
    for (int r = 0; r < rows; r++) error = std::max(error, fabs(losses[r] - exact[r]));
    check("cross_entropy", fault, error, 1e-5);
}

void check_matmul(unsigned seed) {
    constexpr int m = 50, n = 29, k = 37;
    const auto a = filled<float>(m * k, [](int i) { return sinf(i); });
    const auto b = filled<float>(k * n, [](int i) { return cosf(i); });
    const auto c = filled<float>(m * n, [](int) { return 0.0f; });
    const std::string fault = cuda_cpu::launch({2, 4}, {16, 16}, seed,
                                               [&] { matmul(a.get(), b.get(), c.get(), m, n, k); });
    double error = 0;
    for (int i = 0; i < m * n; i++) {
        double sum = 0;
        for (int j = 0; j < k; j++) sum += double(a[i / n * k + j]) * b[j * n + i % n];
        error = std::max(error, fabs(sum - c[i]));
    }
    check("matmul", fault, error, 1e-5);
}

void check_histogram(unsigned seed) {
    constexpr int n = 1000;
    const auto x = filled<int>(n, [](int i) { return i * 7919 % 1000; });
    const auto bins = filled<unsigned>(65, [](int) { return 0u; });
    const std::string fault =
        cuda_cpu::launch({4}, {256}, seed, [&] { histogram(x.get(), bins.get(), n); });
    unsigned total = 0;
    for (int i = 0; i < 64; i++) total += bins[i];
    check("histogram", fault, fabs(double(total) - n) + fabs(double(bins[64]) - n), 0);
}

}  // namespace

int main(int, char** arguments) {
    const unsigned seed = static_cast<unsigned>(std::atoi(arguments[1]));
    check_cross_entropy(seed);
    check_matmul(seed);
    check_histogram(seed);
    std::puts("correct");
    return 0;
}
