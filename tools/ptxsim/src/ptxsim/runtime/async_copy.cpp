#include "async_copy.h"

#include <algorithm>
#include <deque>
#include <vector>

#include "block.h"
#include "memory.h"

namespace ptx {

namespace {

constexpr u32 kLargestCopy = 16;

struct Copy {
    u64 shared_offset, address;
    u32 bytes, source_bytes;
    int line;
};
using Group = std::vector<Copy>;

struct ThreadCopies {
    Group open;  // not yet committed
    std::deque<Group> groups;
};
std::vector<ThreadCopies> copies;

ThreadCopies& mine() { return copies[block.thread()]; }

void check(const Copy& copy, const void* incoming) {
    if (copy.source_bytes) {
        check_global_load(copy.address, copy.source_bytes, copy.bytes, Access::plain, copy.line);
    }
    check_shared_store(copy.shared_offset, copy.bytes, Access::plain, incoming, copy.line);
}

void move(const Copy& copy) {
    u8 bytes[kLargestCopy] = {0};
    std::memcpy(bytes, pointer(copy.address), copy.source_bytes);
    check(copy, bytes);
    std::memcpy(machine.shared + copy.shared_offset, bytes, copy.bytes);
}

}  // namespace

// The bytes may arrive at any time between the issue and the wait. Both ends are checked as
// accesses, and the copy takes place at either end, so that a kernel which is right only for one
// of them is found out.
void async_copy(u64 shared_offset, u64 address, u32 bytes, u32 source_bytes, Site site) {
    const Copy copy{static_cast<u32>(shared_offset), address, bytes, std::min(source_bytes, bytes),
                    site.line};
    check(copy, nullptr);
    if (copy.source_bytes) machine.traffic.load(address, copy.source_bytes, site);
    const CopyTiming timing = machine.request->copy_timing;
    const bool early =
        timing == CopyTiming::early || (timing == CopyTiming::at_random && block.random() % 2 == 0);
    if (early) move(copy);
    mine().open.push_back(copy);
}

void commit_async_copies() {
    mine().groups.push_back(std::move(mine().open));
    mine().open.clear();
}

void wait_async_copies(u32 pending) {
    std::deque<Group>& groups = mine().groups;
    while (groups.size() > pending) {
        for (const Copy& copy : groups.front()) move(copy);
        groups.pop_front();
    }
}

void wait_all_async_copies() {
    commit_async_copies();
    wait_async_copies(0);
}

void reset_async_copies(u32 threads) { copies.assign(threads, ThreadCopies()); }

}  // namespace ptx
