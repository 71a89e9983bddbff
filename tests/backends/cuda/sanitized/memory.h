// Tensors that end where their memory ends, and checks that end the program.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

template <class T>
struct Tensor {
  // `beyond` elements past a 16-byte boundary; the last element is the last one of the allocation.
  Tensor(int rows, int stride, int columns, int beyond) : stride(stride), beyond(beyond) {
    size = beyond + (rows - 1) * stride + columns;
    memory.reset(new typename T::Stored[size]());
  }
  typename T::Stored* data() { return memory.get() + beyond; }
  float at(int row, int column) { return T::load(data()[row * stride + column]); }
  void set(int row, int column, float value) { data()[row * stride + column] = T::store(value); }

  int stride, beyond, size;
  std::unique_ptr<typename T::Stored[]> memory;
};

template <class T>
std::unique_ptr<T[]> filled(int count, T value) {
  std::unique_ptr<T[]> array(new T[count]);
  std::fill(array.get(), array.get() + count, value);
  return array;
}

inline void check(bool holds, const char* what, double got, double expected) {
  if (holds) return;
  std::printf("%s: got %.6g, expected %.6g\n", what, got, expected);
  std::exit(1);
}

inline void check_near(const char* what, double got, double expected, double tolerance) {
  check(std::fabs(got - expected) <= tolerance, what, got, expected);
}

inline void check_fault(const char* what, const std::string& fault) {
  if (fault.empty()) return;
  std::printf("%s: %s\n", what, fault.c_str());
  std::exit(1);
}

// A problem: rows, columns, what lies between rows, how far rows begin past a boundary, threads of
// a block and blocks of a row. Tiles, single vectors and ends; aligned and not; one block and
// several.
struct Case {
  int n, v, gap, beyond, threads, parts;
};
inline const Case kCases[] = {{3, 5, 0, 0, 32, 1},     {2, 701, 3, 1, 64, 1},
                              {2, 2501, 0, 5, 64, 1},  {1, 3072, 0, 8, 64, 3},
                              {2, 2085, 11, 2, 32, 2}, {1, 1027, 0, 7, 96, 5}};
