// Data races, at the granularity of a warp.
//
// Every granule of memory remembers who wrote and who read it last, and in which barrier epoch of
// its block. Two accesses are ordered if the same warp made both, or if both are of one block and a
// barrier opened in between; accesses of different blocks never are. Unordered accesses of which
// at least one writes are a race, unless both are atomic.
//
// The lanes of a warp count as one agent: they run in lock step here. A write that does not change
// the bytes is not reported, since warps that hold the same value may all store it.
#pragma once

#include <string>

#include "launch.h"

namespace ptx {

struct AccessKind {
    bool writes;
    bool atomic;
    bool silent;  // writes what is there already
};

struct Race {
    const char* conflict;  // null if there is none
    u32 other;             // the agent of the earlier access
};

// Record an access to one granule, unless it is part of a race.
Race record_access(Shadow& shadow, AccessKind kind);
std::string describe(const Race& race);

// Blocks that fit the numbering of agents.
constexpr u32 kMostBlocks = 1u << 25;

}  // namespace ptx
