// Counts what a launch moves between the chip and its memory, as the threads ask for it.
#pragma once

#include <vector>

#include "launch.h"

namespace ptx {

// An execution of an instruction by a thread. The lanes of a warp that execute the same
// instruction for the same time make one access: exact unless lanes leave a loop at different
// turns and come back to it.
struct Site {
    u32 id;    // the instruction, numbered within its kernel
    u32 turn;  // how often this thread has come to it, predicated off or not
    int line;  // of the source
};

constexpr u64 kSectorBytes = 32;

class TrafficCounter {
public:
    void start_launch(Traffic* traffic);
    void start_block();
    void load(u64 address, u32 bytes, Site site);
    void store(u64 address, u32 bytes, Site site);

private:
    // Count what no other lane of the warp's access has touched.
    void touch(u64 address, u32 bytes, Site site, bool stores, u64& sectors, u64& distinct_bytes);
    struct Entry {
        u64 access = 0, sector = 0;
        u32 block_number = 0;  // entries of earlier blocks count as empty
        u32 bytes = 0;         // of the sector, as a bit set
    };
    // The entry of a sector in a warp's access; a new one has no bytes.
    Entry& entry_of(u64 access, u64 sector);
    void grow();

    std::vector<Entry> table_;  // open addressing, a power of two long
    u64 used_ = 0;
    u32 block_number_ = 0;
    Traffic* traffic_ = nullptr;
};

}  // namespace ptx
