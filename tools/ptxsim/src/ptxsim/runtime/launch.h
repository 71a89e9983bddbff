// What Python hands over for one launch, and what comes back. launch.py mirrors these structures
// field by field.
#pragma once

#include "values.h"

namespace ptx {

// Who last touched one granule of memory: see races.h.
struct Shadow {
    u32 writer, write_epoch, reader, read_epoch;
};

// Bytes that the kernel may touch: a tensor argument or a variable of the module.
struct Region {
    u64 begin, end;
    Shadow* shadow;    // one entry per granule, or null where races are not looked for
    u32 granule_log2;  // bytes per granule
    u32 writable;
};

struct Traffic {
    u64 bytes_loaded, bytes_stored;        // asked for by the threads, duplicates included
    u64 distinct_loaded, distinct_stored;  // ... each byte once for each warp's access
    u64 sectors_loaded, sectors_stored;    // distinct 32-byte sectors of each warp's access
};

enum class CopyTiming : u32 {
    late,      // cp.async moves its bytes when the thread waits for them
    early,     // ... at once
    at_random  // ... one or the other, copy by copy
};

using KernelBody = void (*)(const u8* parameters);

struct LaunchRequest {
    KernelBody body;
    const u8* parameters;
    const Region* regions;
    const u32* blocks;  // linear indices, in the order of execution
    u64* visits;        // per basic block of the kernel: how many threads entered it
    u64 shared_bytes;   // static and dynamic together
    u32 region_count, block_count;
    u32 grid[3], block[3];
    u32 check_races;
    u32 random_threads;  // whether the next thread to run is drawn at random
    u32 seed;
    CopyTiming copy_timing;
    Traffic traffic;
    char* message;  // why the launch failed
    u64 message_size;
};

}  // namespace ptx
