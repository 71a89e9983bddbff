#include "block.h"

#include <cstdlib>
#include <cstring>

namespace ptx {

Block block;

Index3 Block::thread_index() const {
    return {current_ % block_size.x, current_ / block_size.x % block_size.y,
            current_ / block_size.x / block_size.y};
}

bool Block::owns_local(u64 address) const {
    return threads_[current_].fiber.owns(reinterpret_cast<const void*>(address));
}

u64 Block::random() {  // xorshift64
    random_state_ ^= random_state_ << 13;
    random_state_ ^= random_state_ >> 7;
    random_state_ ^= random_state_ << 17;
    return random_state_;
}

void Block::stop(const std::string& message) {
    failed_ = true;
    error_ = message;
    threads_[current_].fiber.switch_out();
    std::abort();  // the scheduler never resumes a block that failed
}

void Block::fail(const std::string& what, int line) {
    const Index3 thread = thread_index();
    const auto spell = [](const Index3& i) {
        const std::string x = std::to_string(i.x), y = std::to_string(i.y);
        return "(" + x + "," + y + "," + std::to_string(i.z) + ")";
    };
    stop(what + "; thread " + spell(thread) + " of block " + spell(index) + ", source line " +
         std::to_string(line));
}

// ---- barriers

void Block::barrier(u32 id, u32 expected, const char* at, int line) {
    Barrier& bar = barriers_[id % kBarriers];
    Thread& me = threads_[current_];
    if (bar.arrived && (std::strcmp(bar.at, at) != 0 || bar.line != line)) {
        fail(std::string("divergent barrier: one thread is at ") + at + " while thread " +
                 std::to_string(bar.first) + " waits at " + bar.at + ", source line " +
                 std::to_string(bar.line),
             line);
    }
    if (!bar.arrived) bar.first = current_;
    bar.at = at;
    bar.line = line;
    bar.arrived++;
    bar.expected = expected;
    bar.waiting[warp_index()] |= 1u << lane();
    me.state = Thread::State::waiting;
    me.waits_at = at;
    me.line = line;
    // Two addresses in turn: nobody comes to the opening after next before all have left this one,
    // and what others do after the opening must not seem to have happened before it.
    void* const order = &bar.order[bar.openings % 2];
    release(order);
    open_if_complete(bar);
    me.fiber.switch_out();
    acquire(order);
}

void Block::open_if_complete(Barrier& bar) {
    if (!bar.arrived || bar.arrived < (bar.expected ? bar.expected : live_)) return;
    for (u32 t = 0; t < count_; t++) {
        if (bar.waiting[t / kLanes] >> t % kLanes & 1) {
            threads_[t].state = Thread::State::runnable;
        }
    }
    for (u32& lanes : bar.waiting) lanes = 0;
    bar.arrived = bar.expected = 0;
    bar.openings++;
    epoch++;
}

// ---- meetings of a warp

Warp::Meeting& Block::arrive(u32 members, const char* at, int line) {
    Warp& warp = warps_[warp_index()];
    Thread& me = threads_[current_];
    const u32 bit = 1u << lane();
    if (!(members & bit)) {
        fail(std::string(at) + ": the thread is not in its own member mask", line);
    }
    me.state = Thread::State::waiting;
    me.waits_at = at;
    me.line = line;
    u32 i = 0;
    while (i < warp.meeting_count && warp.meetings[i].members != members) i++;
    if (i == warp.meeting_count) {
        u32 room = 0;
        while (warp.rooms[room].inside) room++;
        warp.rooms[room].deposits.lanes = 0;
        warp.meetings[warp.meeting_count++] = {members, 0, room};
    }
    Warp::Meeting& meeting = warp.meetings[i];
    meeting.arrived |= bit;
    warp.rooms[meeting.room].inside++;
    return meeting;
}

void Block::wait(const Warp::Meeting& meeting) {
    Warp::Room& room = warps_[warp_index()].rooms[meeting.room];
    release_complete_meetings(warp_index());
    threads_[current_].fiber.switch_out();
    room.inside--;
}

void Block::meet(u32 members, const char* at, int line) {
    const Warp::Meeting& meeting = arrive(members, at, line);
    Warp::Room* const room = &warps_[warp_index()].rooms[meeting.room];
    release(room);
    wait(meeting);
    acquire(room);
}

const Deposits& Block::exchange(u32 members, const u64* words, int count, const char* at,
                                int line) {
    const Warp::Meeting& meeting = arrive(members, at, line);
    Deposits& deposits = warps_[warp_index()].rooms[meeting.room].deposits;
    for (int i = 0; i < count; i++) deposits.words[lane()][i] = words[i];
    deposits.lanes |= 1u << lane();
    wait(meeting);
    return deposits;
}

void Block::release_complete_meetings(u32 warp_number) {
    Warp& warp = warps_[warp_number];
    for (u32 i = 0; i < warp.meeting_count;) {
        const Warp::Meeting meeting = warp.meetings[i];
        const u32 needed = meeting.members & warp.live;
        if ((meeting.arrived & needed) != needed) {
            i++;
            continue;
        }
        for (u32 l = 0; l < kLanes; l++) {
            if (meeting.arrived >> l & 1) {
                threads_[warp_number * kLanes + l].state = Thread::State::runnable;
            }
        }
        warp.meetings[i] = warp.meetings[--warp.meeting_count];
    }
}

// ---- scheduling

void Block::thread_main() {
    block.body_(block.parameters_);
    block.finish_thread();
}

void Block::finish_thread() {
    Thread& me = threads_[current_];
    release(this);
    me.state = Thread::State::finished;
    live_--;
    warps_[warp_index()].live &= ~(1u << lane());
    // Those who wait no longer wait for this thread.
    for (Barrier& bar : barriers_) open_if_complete(bar);
    release_complete_meetings(warp_index());
    me.fiber.switch_out();
}

void Block::start(const LaunchRequest& request) {
    count_ = live_ = block_size.x * block_size.y * block_size.z;
    body_ = request.body;
    parameters_ = request.parameters;
    epoch = 1;
    failed_ = false;
    error_.clear();
    if (threads_.size() < count_) threads_.resize(count_);
    warps_.resize((count_ + kLanes - 1) / kLanes);
    for (Warp& warp : warps_) {
        warp.live = warp.meeting_count = 0;
        for (Warp::Room& room : warp.rooms) room.inside = 0;
    }
    for (Barrier& bar : barriers_) bar = Barrier();
    for (u32 t = 0; t < count_; t++) {
        Thread& thread = threads_[t];
        thread.fiber.prepare(thread_main);
        thread.state = Thread::State::runnable;
        warps_[t / kLanes].live |= 1u << t % kLanes;
    }
}

int Block::next_thread(u32 start) const {
    for (u32 k = 0; k < count_; k++) {
        const u32 t = (start + k) % count_;
        if (threads_[t].state == Thread::State::runnable) return static_cast<int>(t);
    }
    return -1;
}

bool Block::run(const LaunchRequest& request, u32 linear_index) {
    grid_size = {request.grid[0], request.grid[1], request.grid[2]};
    block_size = {request.block[0], request.block[1], request.block[2]};
    linear = linear_index;
    index = {linear % grid_size.x, linear / grid_size.x % grid_size.y,
             linear / grid_size.x / grid_size.y};
    random_state_ = (u64(request.seed) << 32 | linear) * 0x9E3779B97F4A7C15ull + 1;
    start(request);
    u32 from = 0;
    while (live_ && !failed_) {
        if (request.random_threads) from = random() % count_;
        const int next = next_thread(from);
        if (next < 0) {
            error_ = describe_deadlock();
            return false;
        }
        current_ = static_cast<u32>(next);
        steps = 0;
        threads_[current_].fiber.switch_in();
        from = current_;  // in sequence: a thread runs until it waits, then the one after it
    }
    acquire(this);
    return !failed_;
}

std::string Block::describe_deadlock() const {
    std::string text = "divergent barrier: " + std::to_string(live_) + " of " +
                       std::to_string(count_) + " threads wait for ever";
    const Thread* last = nullptr;
    for (u32 t = 0; t < count_; t++) {
        const Thread& thread = threads_[t];
        if (thread.state != Thread::State::waiting) continue;
        if (last && last->line == thread.line && last->waits_at == thread.waits_at) continue;
        text += "; thread " + std::to_string(t) + " at " + thread.waits_at + ", source line " +
                std::to_string(thread.line);
        last = &thread;
    }
    return text;
}

}  // namespace ptx
