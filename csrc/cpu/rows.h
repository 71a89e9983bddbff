// Rows, their blocks and scratch memory: what the row kernels of every instruction set share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "api.h"
#include "parallel.h"

namespace unilogit {

// What of `needs` takes moments of blocks.
constexpr std::int32_t kMomentNeeds = kUnilogitMean | kUnilogitEntropy | kUnilogitVariance;

// Of the instruction set in use.
const Kernels& current_kernels();

// Outputs from this size on bypass the cache: they would not be there when they are read.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// Columns that are worth handing out to a thread by themselves.
constexpr int64_t kGrainColumns = 8 * kBlock;

// What is taken off before an exponential: the maximum, or 0 where there is nothing but -inf.
inline float finite_shift(float max) {
  return max == -std::numeric_limits<float>::infinity() ? 0.0f : max;
}

inline int64_t element_size(std::int32_t type) { return type == kUnilogitFloat32 ? 4 : 2; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline char* element(const UnilogitMatrix& m, int64_t row, int64_t column) {
  return static_cast<char*>(m.data) +
         (row * m.row_stride + column * m.column_stride) * element_size(m.type);
}

// The columns of block `b` of a row.
struct Columns {
  int64_t first;
  int64_t count;
};

inline Columns block_columns(int64_t columns, int64_t b) {
  return {b * kBlock, std::min(kBlock, columns - b * kBlock)};
}

// Memory that outlives a call, so that its pages are faulted in once. One for each calling thread.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // `bytes` aligned to a cache line, or null. Earlier contents are lost.
  void* reserve(int64_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      const int64_t rounded = divide_up(bytes, kCacheLine) * kCacheLine;
      data_ = std::aligned_alloc(kCacheLine, static_cast<std::size_t>(rounded));
      capacity_ = data_ == nullptr ? 0 : rounded;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

inline thread_local Scratch scratch;

inline RowWriter make_writer(const UnilogitMatrix& out, int64_t row, int64_t column, bool stream) {
  RowWriter writer;
  writer.out = element(out, row, column);
  writer.stride = out.column_stride;
  writer.stream = stream && out.column_stride == 1;
  const auto address = reinterpret_cast<std::uintptr_t>(writer.out);
  const auto misaligned = static_cast<int64_t>(address % static_cast<std::uintptr_t>(kCacheLine));
  writer.head =
      writer.stream && misaligned != 0 ? (kCacheLine - misaligned) / element_size(out.type) : 0;
  return writer;
}

inline bool worth_streaming(const UnilogitMatrix& out) {
  return out.rows * out.columns * element_size(out.type) >= kStreamBytes;
}

// Threads that have enough to do: waking one costs about as much as a grain of columns.
inline int useful_threads(const UnilogitMatrix& logits, int threads) {
  const int64_t grains = divide_up(logits.rows * logits.columns, kGrainColumns);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, grains)));
}

// Rows of logits as their model means them.
struct Side {
  const UnilogitMatrix& logits;
  const UnilogitTransform& transform;
};

// A block of one row, without the label's column: where it lies if it can be read there, else a
// copy in float32.
struct Block {
  alignas(kCacheLine) float z[kBlock];
  alignas(kCacheLine) float cap_slope[kBlock];  // written only where there is a cap
  Label label;
  const void* data;
  std::int32_t type;
  int64_t padded;

  void read(const Kernels& kernels, const Side& side, int64_t row, int64_t first, int64_t count,
            int64_t label_offset) {
    const UnilogitMatrix& m = side.logits;
    label = {label_offset, 0.0f, 1.0f};
    data = element(m, row, first);
    type = m.type;
    padded = count;
    if (m.column_stride == 1 && count % kWholeStep == 0 && side.transform.scale == 1.0f &&
        side.transform.softcap == 0.0f && (label_offset < 0 || label_offset >= count)) {
      return;
    }
    padded = kernels.stage[type](data, m.column_stride, count, side.transform, label, z, cap_slope);
    data = z;
    type = kUnilogitFloat32;
  }
};

// Zeros for a whole row, or for some of its blocks.
inline void write_zeros(const Kernels& kernels, const UnilogitMatrix& out, int64_t row,
                        bool stream) {
  alignas(kCacheLine) static const float zeros[kBlock] = {};
  RowWriter writer = make_writer(out, row, 0, stream);
  const int64_t blocks = divide_up(out.columns, kBlock);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t count = block_columns(out.columns, b).count;
    kernels.write_block[out.type](writer, {zeros, count, 0.0f, -1, 0.0f, b + 1 == blocks});
  }
}

// Rows are cut into segments of blocks where there are too few rows to keep the threads busy.
struct Segments {
  int64_t blocks;    // of a row
  int64_t segments;  // of a row
  int64_t grain;     // items that a thread takes at once

  Segments(int64_t rows, int64_t columns, int threads) : blocks(divide_up(columns, kBlock)) {
    constexpr int64_t kItemsPerThread = 8;  // keeps the threads even within 1/8 at worst
    const int64_t wanted = divide_up(kItemsPerThread * threads, std::max<int64_t>(rows, 1));
    segments = threads == 1 ? 1 : std::min(blocks, wanted);
    grain = std::max<int64_t>(1, kGrainColumns / std::max<int64_t>(1, columns / segments));
  }

  int64_t first_block(int64_t segment) const { return blocks * segment / segments; }
};

// Statistics of every row: `compute(row, first_block, last_block, parts)` fills in the parts of
// some of a row's blocks, `merge(row, parts, blocks)` folds all of them, and has room for one part
// more.
template <class Piece, class Compute, class Merge>
std::int32_t fold_rows(const UnilogitMatrix& logits, int threads, const Compute& compute,
                       const Merge& merge) {
  const Segments cut(logits.rows, logits.columns, threads);
  const bool whole_rows = cut.segments == 1;
  const int64_t bytes = (cut.blocks + 1) * int64_t{sizeof(Piece)};
  const int64_t stride = divide_up(bytes, kCacheLine) * kCacheLine;
  auto* base = static_cast<char*>(scratch.reserve((whole_rows ? threads : logits.rows) * stride));
  if (base == nullptr) return kUnilogitOutOfMemory;
  const auto parts_of = [&](int64_t k) { return reinterpret_cast<Piece*>(base + k * stride); };
  if (whole_rows) {
    ItemQueue queue(logits.rows, cut.grain);
    run_team(threads, [&](int thread) {
      Piece* parts = parts_of(thread);
      ItemQueue::Cursor cursor;
      int64_t row;
      while (queue.next(cursor, row)) {
        compute(row, 0, cut.blocks, parts);
        merge(row, parts, cut.blocks);
      }
    });
    return kUnilogitOk;
  }
  parallel_for(threads, logits.rows * cut.segments, 1, [&](int64_t item) {
    const int64_t row = item / cut.segments, segment = item % cut.segments;
    compute(row, cut.first_block(segment), cut.first_block(segment + 1), parts_of(row));
  });
  parallel_for(threads, logits.rows, divide_up(kGrainColumns, cut.blocks),
               [&](int64_t row) { merge(row, parts_of(row), cut.blocks); });
  return kUnilogitOk;
}

// Calls body(row, first_block, last_block) for all blocks of all rows.
template <class Body>
void for_row_segments(const UnilogitMatrix& logits, int threads, const Body& body) {
  const Segments cut(logits.rows, logits.columns, threads);
  parallel_for(threads, logits.rows * cut.segments, cut.grain, [&](int64_t item) {
    const int64_t segment = item % cut.segments;
    body(item / cut.segments, cut.first_block(segment), cut.first_block(segment + 1));
  });
}

}  // namespace unilogit
