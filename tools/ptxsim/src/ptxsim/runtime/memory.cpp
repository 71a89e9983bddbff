#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <string>

#include "block.h"
#include "races.h"

namespace ptx {

Machine machine;

namespace {

std::string hexadecimal(u64 value) {
    char text[32];
    std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
    return text;
}

std::string bytes_text(u32 bytes) { return std::to_string(bytes) + " bytes"; }

// launch.py replaces `argument #i` by the argument's name.
std::string argument_text(const Region& region) {
    return "argument #" + std::to_string(&region - machine.request->regions);
}

u64 distance(const Region& region, u64 address) {
    if (address < region.begin) return region.begin - address;
    return address < region.end ? 0 : address - region.end;
}

[[noreturn]] void fail_out_of_bounds(const char* what, u64 address, u32 bytes, int line) {
    std::string text =
        std::string("out-of-bounds global ") + what + " of " + bytes_text(bytes) + "; ";
    const Region* first = machine.request->regions;
    const Region* last = first + machine.request->region_count;
    const Region* nearest = std::min_element(first, last, [&](const Region& a, const Region& b) {
        return distance(a, address) < distance(b, address);
    });
    if (nearest == last) {
        text += "the kernel has no tensor argument";
    } else {
        text += "nearest is " + argument_text(*nearest) + " of " +
                std::to_string(nearest->end - nearest->begin) + " bytes, at its byte offset " +
                std::to_string(static_cast<s64>(address - nearest->begin));
    }
    block.fail(text, line);
}

const Region& region_of(const char* what, u64 address, u32 bytes, int line) {
    static u32 last_hit = 0;  // consecutive accesses mostly go to the same tensor
    const Region* regions = machine.request->regions;
    const u32 count = machine.request->region_count;
    const auto holds = [&](const Region& region) {
        return address >= region.begin && address + bytes <= region.end;
    };
    if (last_hit < count && holds(regions[last_hit])) return regions[last_hit];
    for (u32 i = 0; i < count; i++) {
        if (holds(regions[i])) return regions[last_hit = i];
    }
    fail_out_of_bounds(what, address, bytes, line);
}

void check_global_alignment(u64 address, u32 alignment, int line) {
    if (address % alignment == 0) return;
    block.fail("misaligned global access: address " + hexadecimal(address) +
                   " is not a multiple of " + std::to_string(alignment),
               line);
}

void check_global_races(const Region& region, u64 address, u32 bytes, AccessKind kind, int line) {
    if (!region.shadow) return;
    const u64 first = (address - region.begin) >> region.granule_log2;
    const u64 last = (address + bytes - 1 - region.begin) >> region.granule_log2;
    for (u64 granule = first; granule <= last; granule++) {
        const Race race = record_access(region.shadow[granule], kind);
        if (!race.conflict) continue;
        block.fail(describe(race) + "; on " + argument_text(region) + " at its byte offset " +
                       std::to_string(address - region.begin),
                   line);
    }
}

void check_shared(u64 offset, u32 bytes, AccessKind kind, int line) {
    if (offset + bytes > machine.shared_bytes) {
        block.fail("shared memory access outside the allocation: " + bytes_text(bytes) +
                       " at offset " + std::to_string(offset) + " of " +
                       std::to_string(machine.shared_bytes),
                   line);
    }
    if (offset % bytes != 0) {
        block.fail("misaligned shared access: offset " + std::to_string(offset) +
                       " is not a multiple of " + std::to_string(bytes),
                   line);
    }
    if (!machine.request->check_races) return;
    for (u64 byte = offset; byte < offset + bytes; byte++) {
        const Race race = record_access(machine.shared_shadow[byte], kind);
        if (!race.conflict) continue;
        block.fail(describe(race) + "; in shared memory at offset " + std::to_string(offset), line);
    }
}

bool leaves_unchanged(const void* present, const void* incoming, u32 bytes) {
    return incoming && std::memcmp(present, incoming, bytes) == 0;
}

}  // namespace

void check_global_load(u64 address, u32 bytes, u32 alignment, Access access, int line) {
    check_global_alignment(address, alignment, line);
    const Region& region = region_of("read", address, bytes, line);
    check_global_races(region, address, bytes, {false, access == Access::atomic, false}, line);
}

void check_global_store(u64 address, u32 bytes, Access access, const void* incoming, int line) {
    check_global_alignment(address, bytes, line);
    const Region& region = region_of("write", address, bytes, line);
    if (!region.writable) block.fail("write to read-only " + argument_text(region), line);
    const bool atomic = access == Access::atomic;
    const bool silent = !atomic && leaves_unchanged(pointer(address), incoming, bytes);
    check_global_races(region, address, bytes, {true, atomic, silent}, line);
}

void check_shared_load(u64 offset, u32 bytes, Access access, int line) {
    check_shared(offset, bytes, {false, access == Access::atomic, false}, line);
}

void check_shared_store(u64 offset, u32 bytes, Access access, const void* incoming, int line) {
    const bool atomic = access == Access::atomic;
    const bool inside = offset + bytes <= machine.shared_bytes;
    const bool silent =
        inside && !atomic && leaves_unchanged(machine.shared + offset, incoming, bytes);
    check_shared(offset, bytes, {true, atomic, silent}, line);
}

u64 shared_to_generic(u64 offset) { return offset + reinterpret_cast<u64>(machine.shared); }
u64 generic_to_shared(u64 address) { return address - reinterpret_cast<u64>(machine.shared); }
bool is_shared(u64 address) { return generic_to_shared(address) < machine.shared_bytes; }
bool is_local(u64 address) { return block.owns_local(address); }
void stop_kernel(const char* reason, int line) { block.fail(reason, line); }

}  // namespace ptx
