// Exercises every entry point of the library over types, layouts, thread counts and instruction
// sets, for the sanitizers: prints a checksum, and fails if results depend on the threads.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "api.h"

namespace {

using std::int64_t;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::uint64_t checksum(std::uint64_t sum, const void* data, std::size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  for (std::size_t i = 0; i < bytes; ++i) sum = (sum ^ p[i]) * 1099511628211u;
  return sum;
}

// Of floats whose infinity has these bits. All NaN count as one: of two in a product either may
// win, as the compiler orders them.
template <class Bits>
std::uint64_t float_checksum(std::uint64_t sum, const void* data, std::size_t bytes,
                             Bits infinity) {
  for (std::size_t i = 0; i + sizeof(Bits) <= bytes; i += sizeof(Bits)) {
    Bits bits;
    std::memcpy(&bits, static_cast<const unsigned char*>(data) + i, sizeof bits);
    const Bits magnitude = bits & static_cast<Bits>(~(Bits{1} << (8 * sizeof(Bits) - 1)));
    if (magnitude > infinity) bits = static_cast<Bits>(infinity + 1);
    sum = checksum(sum, &bits, sizeof bits);
  }
  return sum;
}

std::uint64_t float_checksum(std::uint64_t sum, const std::vector<float>& values) {
  return float_checksum<std::uint32_t>(sum, values.data(), 4 * values.size(), 0x7F800000);
}

// A [rows, columns] matrix in memory of exactly its extent, so that any access beyond is caught.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, int64_t row_gap, int64_t column_stride, int32_t type)
      : size_(type == kUnilogitFloat32 ? 4 : 2), row_stride_(columns * column_stride + row_gap) {
    const int64_t extent = (rows - 1) * row_stride_ + (columns - 1) * column_stride + 1;
    bytes_ = static_cast<std::size_t>(extent) * size_;
    memory_.reset(new unsigned char[bytes_]());
    view_ = {memory_.get(), rows, columns, row_stride_, column_stride, type};
  }

  // The bit pattern of a float in the matrix's type; halves are made of small integers.
  void set(int64_t row, int64_t column, float value) {
    unsigned char* p =
        memory_.get() + (row * row_stride_ + column * view_.column_stride) * int64_t(size_);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (view_.type == kUnilogitFloat32) {
      std::memcpy(p, &bits, 4);
      return;
    }
    std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
    if (view_.type == kUnilogitFloat16) {
      const std::uint32_t exponent = bits >> 23 & 0xFF;
      half = exponent == 0xFF
                 ? static_cast<std::uint16_t>(bits >> 16 & 0x8000) | 0x7C00 |
                       ((bits & 0x7FFFFF) != 0 ? 0x200 : 0)
                 : static_cast<std::uint16_t>(
                       (bits >> 16 & 0x8000) |
                       (exponent < 113 ? 0 : (exponent - 112) << 10 | (bits >> 13 & 0x3FF)));
    }
    std::memcpy(p, &half, 2);
  }

  const UnilogitMatrix* view() const { return &view_; }
  std::uint64_t sum(std::uint64_t s) const {
    if (view_.type == kUnilogitFloat32) {
      return float_checksum<std::uint32_t>(s, memory_.get(), bytes_, 0x7F800000);
    }
    const std::uint16_t infinity = view_.type == kUnilogitBfloat16 ? 0x7F80 : 0x7C00;
    return float_checksum<std::uint16_t>(s, memory_.get(), bytes_, infinity);
  }

 private:
  std::size_t size_;
  int64_t row_stride_;
  std::size_t bytes_;
  std::unique_ptr<unsigned char[]> memory_;
  UnilogitMatrix view_;
};

struct Case {
  int64_t rows, columns, row_gap, column_stride;
  int32_t type, out_type;
  UnilogitTransform transform;
};

Matrix make_logits(const Case& c) {
  Matrix logits(c.rows, c.columns, c.row_gap, c.column_stride, c.type);
  std::uint32_t state = 12345;
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.columns; ++j) {
      state = state * 1664525u + 1013904223u;
      logits.set(i, j, static_cast<float>(state >> 16) / 4096.0f - 8.0f);
    }
  }
  logits.set(0, c.columns - 1, -kInfinity);
  if (c.rows > 2) logits.set(2, 0, kInfinity);
  if (c.rows > 3) logits.set(3, c.columns / 2, std::nanf(""));
  return logits;
}

std::uint64_t run(const Case& c, int32_t threads) {
  const auto n = static_cast<std::size_t>(c.rows);
  const Matrix logits = make_logits(c);
  std::vector<int64_t> labels(n);
  // Rows of a state: max, sum, target, runner-up, count, linear, dot, square.
  std::vector<float> weight(n), loss(2 * n), state(8 * n, -kInfinity), slopes(5 * n);
  constexpr std::int32_t kNoColumn = 0x7FFFFFFF;
  for (std::size_t i = 0; i < n; ++i) {
    labels[i] = i % 5 == 4 ? -100 : static_cast<int64_t>(i * 7919) % c.columns;
    weight[i] = i % 5 == 4 ? 0.0f : 1.0f + static_cast<float>(i);
    state[n + i] = 0.0f;
    std::memcpy(&state[3 * n + i], &kNoColumn, 4);
    for (std::size_t k = 4; k < 8; ++k) state[k * n + i] = 0.0f;
    for (std::size_t k = 0; k < 5; ++k) slopes[k * n + i] = weight[i] * (0.5f - float(k));
  }
  std::uint64_t sum = 14695981039346656037u;
  int32_t status = 0;
  Matrix out(c.rows, c.columns, c.row_gap, c.column_stride, c.out_type);
  for (int32_t objective = 0; objective < 4; ++objective) {
    for (const UnilogitMatrix* target : {out.view(), static_cast<const UnilogitMatrix*>(nullptr)}) {
      if (target == nullptr && objective > 0) continue;  // the loss alone is the same for all
      status |=
          unilogit_log_odds_sweep(logits.view(), labels.data(), weight.data(), objective, nullptr,
                                  c.columns, target, loss.data(), &c.transform, threads);
      sum = float_checksum(out.sum(sum), loss);
    }
  }
  const Matrix overwritten = make_logits(c);
  constexpr float kWeights[][5] = {{1.0f, 0.0f, 1e-3f, 0.0f, 0.0f},
                                   {1.0f, 0.1f, 1e-3f, 0.0f, -0.5f},
                                   {1.0f, 0.0f, 0.0f, -0.5f, 0.0f},
                                   {0.5f, 0.1f, 1e-3f, 0.5f, 0.0f}};
  for (const auto& weights : kWeights) {
    for (const UnilogitMatrix* target : {out.view(), static_cast<const UnilogitMatrix*>(nullptr)}) {
      status |= unilogit_log_odds_sweep(logits.view(), labels.data(), weight.data(),
                                        kUnilogitWeightedStatistics, weights, c.columns, target,
                                        loss.data(), &c.transform, threads);
      sum = float_checksum(out.sum(sum), loss);
    }
  }
  status |= unilogit_log_odds_sweep(overwritten.view(), labels.data(), weight.data(),
                                    kUnilogitWeightedStatistics, kWeights[3], c.columns,
                                    overwritten.view(), loss.data(), &c.transform, threads);
  sum = overwritten.sum(sum);
  // Two chunks of columns, folded into one state, the second with all that can be asked for.
  const int64_t first = c.columns / 3;
  constexpr int32_t kEverything =
      kUnilogitRunnerUp | kUnilogitLogsumexp | kUnilogitMean | kUnilogitEntropy | kUnilogitVariance;
  for (int part = 0; part < 2; ++part) {
    UnilogitMatrix chunk = *logits.view();
    chunk.columns = part == 0 ? first : c.columns - first;
    if (part == 1) {
      chunk.data = static_cast<unsigned char*>(chunk.data) +
                   first * c.column_stride * (c.type == kUnilogitFloat32 ? 4 : 2);
    }
    status |= unilogit_log_odds_update(&chunk, labels.data(), part == 0 ? 0 : first, state.data(),
                                       c.rows, part == 0 ? kUnilogitRunnerUp : kEverything,
                                       &c.transform, threads);
  }
  sum = float_checksum(sum, state);
  for (const int32_t rows : {1, 3, 5}) {
    status |= unilogit_log_odds_gradient(logits.view(), labels.data(), 0, state.data(), c.rows,
                                         rows == 1 ? weight.data() : slopes.data(), c.rows, rows,
                                         out.view(), &c.transform, threads);
    sum = out.sum(sum);
  }
  // Two rows: the logits against another model's, of the other type and in another layout.
  const Matrix other = make_logits({c.rows, c.columns, 3, 1, c.out_type, c.out_type, {1.0f, 0.0f}});
  const UnilogitTransform plain = {1.0f, 0.0f};
  std::vector<float> pair_state(7 * n, -kInfinity), coefficients(4 * n);
  for (std::size_t i = 0; i < n; ++i) {
    for (const std::size_t row : {1, 2, 4}) pair_state[row * n + i] = 0.0f;
    for (std::size_t k = 0; k < 4; ++k) {
      coefficients[k * n + i] = i % 5 == 4 ? 0.0f : 0.25f * static_cast<float>(k * i + 1);
    }
  }
  for (int part = 0; part < 2; ++part) {
    const auto columns_of = [&](const UnilogitMatrix& whole) {
      UnilogitMatrix chunk = whole;
      chunk.columns = part == 0 ? first : c.columns - first;
      if (part == 1) {
        chunk.data = static_cast<unsigned char*>(chunk.data) +
                     first * whole.column_stride * (whole.type == kUnilogitFloat32 ? 4 : 2);
      }
      return chunk;
    };
    const UnilogitMatrix a = columns_of(*logits.view()), b = columns_of(*other.view());
    status |= unilogit_divergence_update(&a, &b, labels.data(), part == 0 ? 0 : first,
                                         pair_state.data(), c.rows, &c.transform, &plain, threads);
  }
  sum = float_checksum(sum, pair_state);
  for (int32_t student : {0, 1}) {
    status |= unilogit_divergence_gradient(logits.view(), other.view(), labels.data(), 0,
                                           pair_state.data(), c.rows, coefficients.data(), c.rows,
                                           student, out.view(), &c.transform, &plain, threads);
    sum = out.sum(sum);
  }
  status |= unilogit_divergence_gradient(logits.view(), other.view(), labels.data(), 0,
                                         pair_state.data(), c.rows, coefficients.data(), c.rows, 0,
                                         logits.view(), &c.transform, &plain, threads);
  sum = logits.sum(sum);
  const Matrix again = make_logits(c);
  status |=
      unilogit_log_odds_gradient(again.view(), labels.data(), 0, state.data(), c.rows,
                                 slopes.data(), c.rows, 5, again.view(), &c.transform, threads);
  sum = again.sum(sum);
  return status == 0 ? sum : 0;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {1, 2, 0, 1, 0, 0, {1.0f, 0.0f}},      {7, 33, 3, 1, 1, 1, {1.0f, 0.0f}},
      {5, 1024, 0, 1, 2, 2, {1.0f, 30.0f}},  {9, 1025, 1, 2, 0, 1, {-0.5f, 0.0f}},
      {1, 70001, 0, 1, 1, 1, {1.0f, 0.0f}},  {3, 50257, 0, 1, 0, 0, {1.0f, 0.0f}},
      {33, 4099, 1, 1, 1, 0, {0.7f, 5.0f}},  {7, 12289, 5, 3, 2, 0, {1.0f, 0.0f}},
      {26, 40960, 0, 1, 0, 0, {1.0f, 0.0f}}, {53, 40961, 0, 1, 1, 1, {1.0f, 0.0f}},
      {27, 40963, 0, 1, 0, 0, {1.0f, 0.0f}}, {53, 40962, 1, 1, 2, 2, {1.0f, 0.0f}},
  };
#ifdef UNILOGIT_STD_THREADS
  // Threads share work by the same code on every set; ThreadSanitizer takes seconds for each of
  // these.
  constexpr int64_t kLarge = 500000;
#else
  constexpr int64_t kLarge = std::numeric_limits<int64_t>::max();
#endif
  int failures = 0, sets = 0;
  for (const char* name : {"avx512bf16", "avx512", "avx2", "baseline"}) {
    if (unilogit_select_instruction_set(name) != kUnilogitOk) {
      std::printf("%-10s not on this processor\n", name);
      continue;
    }
    ++sets;
    std::uint64_t total = 0;
    for (const Case& c : cases) {
      if (sets > 1 && c.rows * c.columns > kLarge) continue;
      const std::uint64_t expected = run(c, 1);
      for (int32_t threads : {2, 5}) {
        if (expected == 0 || run(c, threads) != expected) {
          std::printf("%s: [%ld, %ld] differs with %d threads\n", name, long(c.rows),
                      long(c.columns), threads);
          ++failures;
        }
      }
      total = checksum(total, &expected, sizeof expected);
    }
    std::vector<float> x(1001, -3.0f), y(1001), z(1001);
    unilogit_exp(x.data(), y.data(), 1001);
    unilogit_tanh(x.data(), y.data(), z.data(), 1001);
    std::vector<char> source(200001, 'x'), copy(200001 + 64);
    char* aligned = copy.data() + (64 - reinterpret_cast<std::uintptr_t>(copy.data()) % 64) % 64;
    unilogit_stream_copy(source.data(), aligned, 200001, 3);
    unilogit_populate(aligned, 4096, 2);  // not at a page: advice that the system refuses
    failures += std::memcmp(source.data(), aligned, 200001) != 0;
    std::printf("%-10s checksum %016lx\n", unilogit_instruction_set(), (unsigned long)total);
  }
  return failures == 0 ? 0 : 1;
}
