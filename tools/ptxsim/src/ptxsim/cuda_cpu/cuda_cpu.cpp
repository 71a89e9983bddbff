// The run time of cuda_cpu.h. Built without -fsanitize, so that only the kernels' own accesses are
// seen, and with PTX_ASAN or PTX_TSAN where they are.
#include "cuda_cpu.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <random>
#include <vector>

#include "block.h"

namespace cuda_cpu {

namespace {

Index3 of(const ptx::Index3& index) { return {index.x, index.y, index.z}; }

void call(const u8* kernel) { (*reinterpret_cast<const std::function<void()>*>(kernel))(); }

}  // namespace

Index3 thread_index() { return of(ptx::block.thread_index()); }
Index3 block_index() { return of(ptx::block.index); }
Index3 block_size() { return of(ptx::block.block_size); }
Index3 grid_size() { return of(ptx::block.grid_size); }
unsigned lane() { return ptx::block.lane(); }
unsigned live_lanes() { return ptx::block.live_lanes(); }
void barrier(const char* at, int line) { ptx::block.barrier(0, 0, at, line); }
void meet(unsigned members, int line) { ptx::block.meet(members, "__syncwarp", line); }
void fail(const char* what, int line) { ptx::block.fail(what, line); }

void exchange(Deposit (&deposits)[32], unsigned members, uint64_t word, const char* at, int line) {
    const ptx::Deposits& words = ptx::block.exchange(members, &word, 1, at, line);
    for (u32 l = 0; l < ptx::kLanes; l++) deposits[l] = {words[l][0], (words.lanes >> l & 1) != 0};
}

std::string launch(Index3 grid, Index3 block, unsigned seed, const std::function<void()>& kernel) {
    ptx::LaunchRequest request{};
    request.body = call;
    request.parameters = reinterpret_cast<const u8*>(&kernel);
    const u32 sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
    std::copy(sizes, sizes + 3, request.grid);
    std::copy(sizes + 3, sizes + 6, request.block);
    request.random_threads = seed != kInSequence;
    request.seed = seed;
    std::vector<u32> order(grid.x * grid.y * grid.z);
    for (u32 i = 0; i < order.size(); i++) order[i] = i;
    if (seed != kInSequence) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    for (const u32 index : order) {
        if (!ptx::block.run(request, index)) return ptx::block.error();
    }
    return "";
}

}  // namespace cuda_cpu
