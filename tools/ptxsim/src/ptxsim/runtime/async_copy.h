// cp.async: copies from global to shared memory that are complete only once waited for.
#pragma once

#include "traffic.h"

namespace ptx {

// Copy `source_bytes` and fill up to `bytes` with zeros.
void async_copy(u64 shared_offset, u64 address, u32 bytes, u32 source_bytes, Site site);
void commit_async_copies();
// Wait until at most `pending` of the thread's groups are open.
void wait_async_copies(u32 pending);
void wait_all_async_copies();
// Forget what the last block has left open.
void reset_async_copies(u32 threads);

}  // namespace ptx
