// Kernels for the executor's own tests, compiled by nvcc to PTX, and by g++ through cuda_cpu.h. BUG
// picks one of five bugs.

#ifndef BUG
#define BUG 0
#endif

namespace {

constexpr int kMissingBarrier = 1;
constexpr int kReuseWithoutBarrier = 2;
constexpr int kRaceInPlace = 3;
constexpr int kOneTooMany = 4;
constexpr int kDivergentBarrier = 5;

using bfloat16 = unsigned short;

__device__ float to_float(bfloat16 bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

__device__ bfloat16 to_bfloat16(float value) {
    bfloat16 bits;
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    const unsigned word = __float_as_uint(value);
    bits = static_cast<bfloat16>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
#endif
    return bits;
}

__device__ float infinity() { return __uint_as_float(0x7f800000u); }

template <class Combine>
__device__ float reduce_block(float* partial, float value, float neutral, Combine combine) {
    for (int distance = 16; distance; distance /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    if (lane == 0) partial[warp] = value;
    if (BUG != kMissingBarrier) __syncthreads();
    value = lane < warps ? partial[lane] : neutral;
    for (int distance = 16; distance; distance /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    if (BUG != kReuseWithoutBarrier) __syncthreads();  // `partial` is used again
    return value;
}

}  // namespace

// One block a row: the loss in float32, its gradient written over the logits.
extern "C" __global__ void cross_entropy(bfloat16* __restrict__ logits,
                                         const long long* __restrict__ labels,
                                         float* __restrict__ losses, int v, int stride) {
    __shared__ float partial[32];
    bfloat16* row = logits + static_cast<size_t>(blockIdx.x) * stride;
    float largest = -infinity(), total = 0;
    for (int i = threadIdx.x; i < v; i += blockDim.x) {
        largest = fmaxf(largest, to_float(row[i]));
    }
    largest =
        reduce_block(partial, largest, -infinity(), [](float a, float b) { return fmaxf(a, b); });
    for (int i = threadIdx.x; i < v; i += blockDim.x) {
        total += expf(to_float(row[i]) - largest);
    }
    total = reduce_block(partial, total, 0.f, [](float a, float b) { return a + b; });
    const int label = static_cast<int>(labels[blockIdx.x]);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = largest + logf(total) - to_float(row[label]);
    }
    if (BUG != kRaceInPlace) __syncthreads();  // thread 0 reads what another one overwrites
    const int end = BUG == kOneTooMany ? v + 1 : v;
    for (int i = threadIdx.x; i < end; i += blockDim.x) {
        const float probability = expf(to_float(row[i]) - largest) / total;
        row[i] = to_bfloat16(probability - (i == label ? 1.f : 0.f));
    }
    if (BUG == kDivergentBarrier) {
        if (threadIdx.x < 64) {
            __syncthreads();
        } else {
            __syncthreads();
            __syncthreads();
        }
    }
}

// Dynamic shared memory, a grid and blocks of two dimensions.
extern "C" __global__ void matmul(const float* a, const float* b, float* c, int m, int n, int k) {
#if defined(__CUDACC__)
    extern __shared__ float tiles[];
#else
    __shared__ float tiles[512];
#endif
    float* left = tiles;
    float* right = tiles + 256;
    const int x = threadIdx.x, y = threadIdx.y;
    const int row = blockIdx.y * 16 + y, column = blockIdx.x * 16 + x;
    float sum = 0;
    for (int start = 0; start < k; start += 16) {
        left[y * 16 + x] = row < m && start + x < k ? a[row * k + start + x] : 0;
        right[y * 16 + x] = start + y < k && column < n ? b[(start + y) * n + column] : 0;
        __syncthreads();
        for (int i = 0; i < 16; i++) sum += left[y * 16 + i] * right[i * 16 + x];
        __syncthreads();
    }
    if (row < m && column < n) c[row * n + column] = sum;
}

// Atomics in shared and in global memory, and a ballot.
extern "C" __global__ void histogram(const int* x, unsigned* bins, int n) {
    __shared__ unsigned mine[64];
    if (threadIdx.x < 64) mine[threadIdx.x] = 0;
    __syncthreads();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(&mine[x[i] & 63], 1u);
    const unsigned inside = __ballot_sync(0xffffffffu, i < n);
    if (threadIdx.x % 32 == 0) atomicAdd(&bins[64], __popc(inside));
    __syncthreads();
    if (threadIdx.x < 64) atomicAdd(&bins[threadIdx.x], mine[threadIdx.x]);
}

// An array that is indexed at run time lives in local memory; float4 is loaded in one piece.
#if defined(__CUDACC__)
extern "C" __global__ void rotate(const float4* x, float* out, int by) {
    float local[4];
    const float4 value = x[threadIdx.x];
    local[0] = value.x;
    local[1] = value.y;
    local[2] = value.z;
    local[3] = value.w;
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = local[(i + by) & 3];
}
#endif
