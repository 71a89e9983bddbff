#include "races.h"

#include "block.h"

namespace ptx {

namespace {

// An agent is a warp of a block: 1 + 64 * block + warp. Blocks have at most 32 warps, so the last
// of the 64 numbers is free to mean "several warps of this block". Zero is nobody.
constexpr u32 kAgentsPerBlock = 64;
constexpr u32 kSeveralBlocks = ~0u;
constexpr u32 kAtomic = 1u << 31;  // mark on a write's epoch

u32 current_agent() { return 1 + kAgentsPerBlock * block.linear + block.warp_index(); }
u32 block_of(u32 agent) { return (agent - 1) / kAgentsPerBlock; }
u32 several_warps_of(u32 agent) { return (block_of(agent) + 1) * kAgentsPerBlock; }

// Whether an earlier access is ordered before what the running thread does now.
bool ordered(u32 agent, u32 epoch) {
    if (agent == kSeveralBlocks) return false;
    if (agent == current_agent()) return true;
    return block_of(agent) == block.linear && (epoch & ~kAtomic) < block.epoch;
}

Race record_write(Shadow& shadow, AccessKind kind) {
    const bool both_atomic = kind.atomic && (shadow.write_epoch & kAtomic);
    if (shadow.writer && !kind.silent && !both_atomic &&
        !ordered(shadow.writer, shadow.write_epoch)) {
        return Race{"write after unordered write", shadow.writer};
    }
    if (shadow.reader && !kind.silent && !kind.atomic &&
        !ordered(shadow.reader, shadow.read_epoch)) {
        return Race{"write after unordered read", shadow.reader};
    }
    shadow.writer = current_agent();
    shadow.write_epoch = block.epoch | (kind.atomic ? kAtomic : 0);
    if (!kind.atomic) shadow.reader = shadow.read_epoch = 0;
    return Race{nullptr, 0};
}

Race record_read(Shadow& shadow, AccessKind kind) {
    const bool both_atomic = kind.atomic && (shadow.write_epoch & kAtomic);
    if (shadow.writer && !both_atomic && !ordered(shadow.writer, shadow.write_epoch)) {
        return Race{"read after unordered write", shadow.writer};
    }
    if (kind.atomic) return Race{nullptr, 0};
    const u32 me = current_agent();
    if (shadow.reader == 0 || shadow.reader == me) {
        shadow.reader = me;
    } else if (shadow.reader == kSeveralBlocks || block_of(shadow.reader) != block.linear) {
        shadow.reader = kSeveralBlocks;
    } else {
        // Readers of earlier epochs are ordered before any later write of this block.
        shadow.reader = shadow.read_epoch < block.epoch ? me : several_warps_of(me);
    }
    shadow.read_epoch = block.epoch;
    return Race{nullptr, 0};
}

}  // namespace

Race record_access(Shadow& shadow, AccessKind kind) {
    return kind.writes ? record_write(shadow, kind) : record_read(shadow, kind);
}

std::string describe(const Race& race) {
    std::string text = std::string("data race, ") + race.conflict + ", other access by ";
    if (race.other == kSeveralBlocks) return text + "several blocks";
    text += "block #" + std::to_string(block_of(race.other));
    if (race.other == several_warps_of(race.other)) return text + ", several warps";
    return text + ", warp " + std::to_string((race.other - 1) % kAgentsPerBlock);
}

}  // namespace ptx
