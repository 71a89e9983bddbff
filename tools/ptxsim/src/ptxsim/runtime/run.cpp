// The entry point that Python calls.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "async_copy.h"
#include "block.h"
#include "memory.h"
#include "races.h"

namespace ptx {

namespace {

constexpr u64 kSharedAlignment = 1024;

void poison_shared_memory() {
    u16* words = reinterpret_cast<u16*>(machine.shared);
    std::fill(words, words + (machine.shared_bytes + 1) / 2, kPoisonHalfWord);
    std::fill(machine.shared_shadow.begin(), machine.shared_shadow.end(), Shadow{});
}

void allocate_shared_memory(const LaunchRequest& request) {
    const u64 rounded = (request.shared_bytes / kSharedAlignment + 1) * kSharedAlignment;
    machine.shared = static_cast<u8*>(std::aligned_alloc(kSharedAlignment, rounded));
    machine.shared_bytes = request.shared_bytes;
    machine.shared_shadow.assign(request.check_races ? request.shared_bytes : 0, Shadow{});
}

}  // namespace

// Run the blocks in the given order; 0, or 1 with a message in the request.
extern "C" int ptx_run(LaunchRequest* request) {
    machine.request = request;
    machine.visits = request->visits;
    machine.traffic.start_launch(&request->traffic);
    allocate_shared_memory(*request);
    bool succeeded = true;
    for (u32 i = 0; i < request->block_count && succeeded; i++) {
        poison_shared_memory();
        reset_async_copies(request->block[0] * request->block[1] * request->block[2]);
        machine.traffic.start_block();
        succeeded = block.run(*request, request->blocks[i]);
    }
    if (!succeeded) {
        std::snprintf(request->message, request->message_size, "%s", block.error().c_str());
    }
    std::free(machine.shared);
    machine.shared = nullptr;
    machine.shared_bytes = 0;
    return succeeded ? 0 : 1;
}

extern "C" u32 ptx_most_blocks() { return kMostBlocks; }

}  // namespace ptx
