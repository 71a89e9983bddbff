// Loads, stores and atomics, each checked before it is done.
#pragma once

#include <cstring>
#include <vector>

#include "block.h"
#include "launch.h"
#include "traffic.h"

namespace ptx {

// The state of the launch that is running.
struct Machine {
    LaunchRequest* request = nullptr;
    u8* shared = nullptr;  // the block's shared memory
    u64 shared_bytes = 0;
    std::vector<Shadow> shared_shadow;  // one entry per byte
    TrafficCounter traffic;
    u64* visits = nullptr;
};
extern Machine machine;

// Several values that one instruction moves together.
template <class T, int count>
struct Vector {
    T values[count];
};

enum class Access { plain, atomic };

// Fail unless the access is aligned, inside a region, permitted and not part of a race. `incoming`
// points to the bytes that a store is about to write, and is null where they are not known yet.
void check_global_load(u64 address, u32 bytes, u32 alignment, Access access, int line);
void check_global_store(u64 address, u32 bytes, Access access, const void* incoming, int line);
void check_shared_load(u64 offset, u32 bytes, Access access, int line);
void check_shared_store(u64 offset, u32 bytes, Access access, const void* incoming, int line);

// Generic addresses: shared memory is where the block's copy of it lies, local memory is on the
// thread's own stack, and everything else is global.
u64 shared_to_generic(u64 offset);
u64 generic_to_shared(u64 address);
bool is_shared(u64 address);
bool is_local(u64 address);
[[noreturn]] void stop_kernel(const char* reason, int line);

template <class T>
T read_bytes(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
void write_bytes(void* to, const T& value) {
    std::memcpy(to, &value, sizeof value);
}

inline void* pointer(u64 address) { return reinterpret_cast<void*>(address); }

template <class T>
T load_global(u64 address, Site site, Access access = Access::plain) {
    check_global_load(address, sizeof(T), sizeof(T), access, site.line);
    machine.traffic.load(address, sizeof(T), site);
    return read_bytes<T>(pointer(address));
}

template <class T>
void store_global(u64 address, T value, Site site, Access access = Access::plain) {
    check_global_store(address, sizeof(T), access, &value, site.line);
    machine.traffic.store(address, sizeof(T), site);
    write_bytes(pointer(address), value);
}

// Constant memory has a cache of its own: not counted as traffic.
template <class T>
T load_constant(u64 address, Site site) {
    check_global_load(address, sizeof(T), sizeof(T), Access::plain, site.line);
    return read_bytes<T>(pointer(address));
}

template <class T>
T load_shared(u64 offset, int line, Access access = Access::plain) {
    offset = static_cast<u32>(offset);
    check_shared_load(offset, sizeof(T), access, line);
    return read_bytes<T>(machine.shared + offset);
}

template <class T>
void store_shared(u64 offset, T value, int line, Access access = Access::plain) {
    offset = static_cast<u32>(offset);
    check_shared_store(offset, sizeof(T), access, &value, line);
    write_bytes(machine.shared + offset, value);
}

template <class T>
T load_generic(u64 address, Site site, Access access = Access::plain) {
    if (is_shared(address)) return load_shared<T>(generic_to_shared(address), site.line, access);
    if (is_local(address)) return read_bytes<T>(pointer(address));
    return load_global<T>(address, site, access);
}

template <class T>
void store_generic(u64 address, T value, Site site, Access access = Access::plain) {
    if (is_shared(address)) {
        store_shared<T>(generic_to_shared(address), value, site.line, access);
    } else if (is_local(address)) {
        write_bytes(pointer(address), value);
    } else {
        store_global<T>(address, value, site, access);
    }
}

// Replace what is there by `update` of it, and return what was there.
template <class T, class Update>
T atomic_shared(u64 offset, Update update, Site site) {
    offset = static_cast<u32>(offset);
    check_shared_store(offset, sizeof(T), Access::atomic, nullptr, site.line);
    const T before = read_bytes<T>(machine.shared + offset);
    write_bytes<T>(machine.shared + offset, update(before));
    return before;
}

// Counts as a load and a store.
template <class T, class Update>
T atomic_generic(u64 address, Update update, Site site) {
    if (is_shared(address)) return atomic_shared<T>(generic_to_shared(address), update, site);
    check_global_store(address, sizeof(T), Access::atomic, nullptr, site.line);
    machine.traffic.load(address, sizeof(T), site);
    machine.traffic.store(address, sizeof(T), site);
    const T before = read_bytes<T>(pointer(address));
    write_bytes<T>(pointer(address), update(before));
    return before;
}

// A thread enters a basic block.
inline void enter(u32 basic_block, int line) {
    machine.visits[basic_block]++;
    if (++block.steps > kMostSteps) stop_kernel("a loop does not end", line);
}

}  // namespace ptx
