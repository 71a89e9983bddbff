// Compiles CUDA C++ for the CPU. Force-include it before sources that include no header of CUDA:
//
//     g++ -std=c++17 -x c++ -include cuda_cpu.h ...        (ptxsim.cuda_cpu.build does it)
//
// Each CUDA thread is a fiber. Under -fsanitize=thread it is a thread to ThreadSanitizer, although
// one thread of the operating system runs them all; under -fsanitize=address arrays in shared
// memory have red zones. Not there: dynamic shared memory (`extern __shared__`), poison (ptxsim
// has it), and what is not declared below.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <string>
#include <type_traits>

namespace cuda_cpu {

struct Index3 {
    unsigned x = 1, y = 1, z = 1;
};

// What a launch may leave open: blocks and threads in sequence, or drawn at random.
constexpr unsigned kInSequence = 0;

// Run a kernel: `launch(grid, block, seed, [&] { kernel(a, b); })`. Returns what went wrong, or an
// empty string. Blocks and threads run in sequence for seed 0, in an order of the seed otherwise.
std::string launch(Index3 grid, Index3 block, unsigned seed, const std::function<void()>& kernel);

// ---- what the macros and functions below are made of; defined in cuda_cpu.cpp
Index3 thread_index();
Index3 block_index();
Index3 block_size();
Index3 grid_size();
unsigned lane();
unsigned live_lanes();
void barrier(const char* at, int line);
void meet(unsigned members, int line);
[[noreturn]] void fail(const char* what, int line);

struct Deposit {
    uint64_t word;
    bool there;  // whether the lane took part
};
// Lay down a word and see those of all lanes.
void exchange(Deposit (&deposits)[32], unsigned members, uint64_t word, const char* at, int line);

template <class T>
T shuffle(unsigned members, T value, int from, bool in_range, const char* at) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles exchange 64 bits at most");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    Deposit deposits[32];
    exchange(deposits, members, word, at, 0);
    if (!in_range) return value;
    if (!(members >> from & 1)) fail("a shuffle reads a lane outside its member mask", 0);
    if (!deposits[from].there) fail("a shuffle reads a lane that returned", 0);
    memcpy(&value, &deposits[from].word, sizeof value);
    return value;
}

template <class T, class Update>
T replace(T* address, Update update) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are of 32 or 64 bits");
    using Word = typename std::conditional<sizeof(T) == 8, uint64_t, uint32_t>::type;
    Word* const cell = reinterpret_cast<Word*>(address);
    Word before = __atomic_load_n(cell, __ATOMIC_RELAXED), after;
    T value;
    do {
        memcpy(&value, &before, sizeof value);
        const T updated = update(value);
        memcpy(&after, &updated, sizeof updated);
    } while (!__atomic_compare_exchange_n(cell, &before, after, false, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return value;
}

// A parameter that takes no part in deducing T.
template <class T>
using Like = typename std::common_type<T>::type;

constexpr unsigned kWholeWarp = 0xffffffffu;

}  // namespace cuda_cpu

// ---- language
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

#define threadIdx (cuda_cpu::thread_index())
#define blockIdx (cuda_cpu::block_index())
#define blockDim (cuda_cpu::block_size())
#define gridDim (cuda_cpu::grid_size())
#define warpSize 32

// ---- threads
#define __syncthreads() cuda_cpu::barrier("__syncthreads", __LINE__)
inline void __syncwarp(unsigned members = cuda_cpu::kWholeWarp) { cuda_cpu::meet(members, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline unsigned __activemask() { return cuda_cpu::live_lanes(); }

template <class T>
T __shfl_sync(unsigned members, T value, int from, int width = 32) {
    const int me = cuda_cpu::lane(), first = me & ~(width - 1);
    return cuda_cpu::shuffle(members, value, first | (from & (width - 1)), true, "__shfl_sync");
}

template <class T>
T __shfl_xor_sync(unsigned members, T value, int distance, int width = 32) {
    const int me = cuda_cpu::lane(), last = me | (width - 1), from = me ^ distance;
    return cuda_cpu::shuffle(members, value, from & 31, from <= last, "__shfl_xor_sync");
}

template <class T>
T __shfl_down_sync(unsigned members, T value, unsigned distance, int width = 32) {
    const int me = cuda_cpu::lane(), last = me | (width - 1),
              from = me + static_cast<int>(distance);
    return cuda_cpu::shuffle(members, value, from & 31, from <= last, "__shfl_down_sync");
}

template <class T>
T __shfl_up_sync(unsigned members, T value, unsigned distance, int width = 32) {
    const int me = cuda_cpu::lane(), first = me & ~(width - 1);
    const int from = me - static_cast<int>(distance);
    return cuda_cpu::shuffle(members, value, from & 31, from >= first, "__shfl_up_sync");
}

inline unsigned __ballot_sync(unsigned members, int predicate) {
    cuda_cpu::Deposit deposits[32];
    cuda_cpu::exchange(deposits, members, predicate != 0, "__ballot_sync", 0);
    unsigned ballot = 0;
    for (int i = 0; i < 32; i++) {
        if (deposits[i].there) ballot |= static_cast<unsigned>(deposits[i].word) << i;
    }
    return ballot;
}
inline int __any_sync(unsigned members, int predicate) {
    return __ballot_sync(members, predicate) != 0;
}
inline int __all_sync(unsigned members, int predicate) {
    return __ballot_sync(members, !predicate) == 0;
}

// ---- memory. Atomics are atomics to ThreadSanitizer as well, so mixing in plain accesses shows.
template <class T>
T atomicAdd(T* address, cuda_cpu::Like<T> value) {
    return cuda_cpu::replace(address, [&](T before) { return static_cast<T>(before + value); });
}
template <class T>
T atomicMax(T* address, cuda_cpu::Like<T> value) {
    return cuda_cpu::replace(address, [&](T before) { return std::max(before, value); });
}
template <class T>
T atomicMin(T* address, cuda_cpu::Like<T> value) {
    return cuda_cpu::replace(address, [&](T before) { return std::min(before, value); });
}
template <class T>
T atomicExch(T* address, cuda_cpu::Like<T> value) {
    return cuda_cpu::replace(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, cuda_cpu::Like<T> expected, cuda_cpu::Like<T> value) {
    return cuda_cpu::replace(address,
                             [&](T before) { return before == expected ? value : before; });
}
template <class T>
T __ldg(const T* address) {
    return *address;
}

// ---- numbers
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
