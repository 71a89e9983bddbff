// One thread block: its threads, its barriers, the meetings of its warps, and who runs next.
#pragma once

#include <string>
#include <vector>

#include "fiber.h"
#include "launch.h"

namespace ptx {

constexpr u32 kLanes = 32;
constexpr u32 kMostThreads = 1024;
constexpr int kExchangeWords = 12;  // mma.sync deposits the most: 4 + 4 operands, and some room

// Basic blocks that a thread may go through without waiting for others. A thread that spins on a
// lock never lets its holder run, so it would never end.
constexpr u32 kMostSteps = 1u << 22;

struct Index3 {
    u32 x = 1, y = 1, z = 1;
};

struct Thread {
    enum class State { runnable, waiting, finished };
    Fiber fiber;
    State state = State::finished;
    const char* waits_at = "";  // what it waits for, and the source line
    int line = 0;
};

// What the lanes of a warp have laid down in an exchange.
struct Deposits {
    u32 lanes = 0;  // who took part: a member that had returned did not
    u64 words[kLanes][kExchangeWords];

    const u64* operator[](u32 lane) const { return words[lane]; }
};

// Plain arrays: ThreadSanitizer would take what containers call for accesses of the threads.
struct Warp {
    // Lanes with the same member mask that have arrived at a collective.
    struct Meeting {
        u32 members, arrived, room;
    };
    // Where a meeting takes place: taken until the last lane has left.
    struct Room {
        u32 inside = 0;
        Deposits deposits;
    };
    u32 live = 0;  // lanes that have not returned
    u32 meeting_count = 0;
    Meeting meetings[kLanes];
    Room rooms[kLanes];  // each lane is in one at most
};

struct Barrier {
    u32 arrived = 0;
    u32 expected = 0;  // 0: every live thread
    u32 first = 0;     // the thread that arrived first
    u32 openings = 0;
    const char* at = "";
    int line = 0;
    u32 waiting[kMostThreads / kLanes] = {0};  // bit sets, one for each warp
    char order[2];  // addresses that stand for an opening, even or odd, in happens-before
};

class Block {
public:
    // Run all threads of one block; false if something failed, error() then says what.
    bool run(const LaunchRequest& request, u32 linear_index);
    const std::string& error() const { return error_; }

    // ---- asked by the running thread
    Index3 thread_index() const;
    u32 thread() const { return current_; }
    u32 lane() const { return current_ % kLanes; }
    u32 warp_index() const { return current_ / kLanes; }
    u32 live_lanes() const { return warps_[warp_index()].live; }
    bool owns_local(u64 address) const;
    u64 random();

    // bar.sync: wait for `expected` threads, or for all that live.
    void barrier(u32 id, u32 expected, const char* at, int line);
    // bar.warp.sync: wait for the lanes in `members`.
    void meet(u32 members, const char* at, int line);
    // Lay down `count` words, and see what each lane in `members` laid down; to be read at once.
    const Deposits& exchange(u32 members, const u64* words, int count, const char* at, int line);
    // Stop the launch with this message, extended by who and where. Does not return.
    [[noreturn]] void fail(const std::string& what, int line);

    Index3 index, block_size, grid_size;
    u32 linear = 0;  // index in the grid
    u32 epoch = 1;   // counts the barriers that have opened
    u32 steps = 0;   // basic blocks that the running thread went through since it was resumed

private:
    static constexpr int kBarriers = 16;

    static void thread_main();
    [[noreturn]] void stop(const std::string& message);
    void finish_thread();
    void open_if_complete(Barrier& barrier);
    Warp::Meeting& arrive(u32 members, const char* at, int line);
    void wait(const Warp::Meeting& meeting);
    void release_complete_meetings(u32 warp);
    void start(const LaunchRequest& request);
    int next_thread(u32 start) const;
    std::string describe_deadlock() const;

    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    Barrier barriers_[kBarriers];
    u32 count_ = 0, live_ = 0, current_ = 0;
    u64 random_state_ = 1;
    KernelBody body_ = nullptr;
    const u8* parameters_ = nullptr;
    bool failed_ = false;
    std::string error_;
};

// The block that is being run: one at a time, on one operating-system thread.
extern Block block;

}  // namespace ptx
