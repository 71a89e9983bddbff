// The only place that starts threads: a team that takes items from a shared counter.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(UNILOGIT_STD_THREADS)  // ThreadSanitizer cannot see the barriers of libgomp
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace unilogit {

// While it lives, results below the smallest normal float are 0 on this thread. Next to a row's
// other entries they are nothing, but a GEMM that reads them takes a microcode assist for each.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

// Calls body(thread) once on each thread of a team of at most `threads`.
template <class Body>
void run_team(int threads, const Body& member) {
  const auto body = [&member](int thread) {
    const FlushSubnormals flush;
    member(thread);
  };
  if (threads <= 1) {
    body(0);
    return;
  }
#if defined(UNILOGIT_STD_THREADS)
  std::vector<std::thread> team;
  for (int thread = 1; thread < threads; ++thread) {
    team.emplace_back([&body, thread] { body(thread); });
  }
  body(0);
  for (std::thread& member : team) member.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num());
#else
  body(0);
#endif
}

// Hands out 0 .. count-1 in runs of `grain`, whichever thread asks first: results must not depend
// on who computes an item.
class ItemQueue {
 public:
  ItemQueue(std::int64_t count, std::int64_t grain) : count_(count), grain_(grain) {}

  // The next item of the run [item, end), or of a new run; false when none is left.
  struct Cursor {
    std::int64_t item = 0;
    std::int64_t end = 0;
  };

  bool next(Cursor& cursor, std::int64_t& item) {
    if (cursor.item == cursor.end) {
      cursor.item = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (cursor.item >= count_) {
        cursor.item = cursor.end = count_;
        return false;
      }
      cursor.end = cursor.item + grain_ < count_ ? cursor.item + grain_ : count_;
    }
    item = cursor.item++;
    return true;
  }

 private:
  std::atomic<std::int64_t> next_{0};
  std::int64_t count_;
  std::int64_t grain_;
};

// Calls body(item) for 0 .. count-1 on at most `threads` threads.
template <class Body>
void parallel_for(int threads, std::int64_t count, std::int64_t grain, const Body& body) {
  const std::int64_t runs = (count + grain - 1) / grain;
  ItemQueue queue(count, grain);
  run_team(runs < threads ? static_cast<int>(runs) : threads, [&](int) {
    ItemQueue::Cursor cursor;
    std::int64_t item;
    while (queue.next(cursor, item)) body(item);
  });
}

}  // namespace unilogit
