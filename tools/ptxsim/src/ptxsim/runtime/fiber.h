// Cooperative threads: a CUDA thread is a fiber that runs until it has to wait for others.
#pragma once

#include <cstddef>

#include "sanitizers.h"

namespace ptx {

class Fiber {
public:
    Fiber() = default;
    Fiber(Fiber&& other) noexcept
        : stack_(other.stack_), top_(other.top_), entry_(other.entry_), state_(other.state_) {
        other.stack_ = nullptr;
    }
    Fiber(const Fiber&) = delete;
    ~Fiber();

    // Make the next switch_in() call `entry`, which must never return.
    void prepare(void (*entry)());
    // Run the fiber until it calls switch_out(); called by the scheduler.
    void switch_in();
    // Give control back to the scheduler; called by the running fiber.
    void switch_out();
    // Whether an address is on the fiber's stack, which is where a thread's local memory is.
    bool owns(const void* address) const;

private:
    static constexpr std::size_t kStackBytes = 256 * 1024;
    [[noreturn]] static void start();

    char* stack_ = nullptr;
    void* top_ = nullptr;
    void (*entry_)() = nullptr;
    SanitizerState state_;
};

}  // namespace ptx
