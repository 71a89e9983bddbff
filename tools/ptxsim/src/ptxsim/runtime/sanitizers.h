// Tells AddressSanitizer and ThreadSanitizer which fiber runs, and what its barriers order. The
// runtime itself is built without them, with PTX_ASAN or PTX_TSAN for what it runs; for PTX, which
// has checks of its own, with neither.
#pragma once

#include <cstddef>

#if defined(PTX_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(PTX_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace ptx {

// What a sanitizer keeps of a stack that is not running.
struct SanitizerState {
    void* fake_stack = nullptr;
    void* fiber = nullptr;
};

// The stack of the scheduler, which is the one that Python or main() runs on.
struct SchedulerStack {
    const void* bottom = nullptr;
    std::size_t bytes = 0;
};

inline void begin_switch(SanitizerState& from, const SanitizerState& to, const void* bottom,
                         std::size_t bytes) {
    (void)from, (void)to, (void)bottom, (void)bytes;
#if defined(PTX_ASAN)
    __sanitizer_start_switch_fiber(&from.fake_stack, bottom, bytes);
#endif
#if defined(PTX_TSAN)
    constexpr unsigned kNotOrdered = 1;  // the switch itself is no synchronisation
    __tsan_switch_to_fiber(to.fiber, kNotOrdered);
#endif
}

// On the stack that was switched to; `left` receives where the other one lies.
inline void end_switch(const SanitizerState& to, SchedulerStack* left) {
    (void)to, (void)left;
#if defined(PTX_ASAN)
    __sanitizer_finish_switch_fiber(to.fake_stack, left ? &left->bottom : nullptr,
                                    left ? &left->bytes : nullptr);
#endif
}

// A fiber begins anew on its stack: what ran there before happened before.
inline void renew(SanitizerState& state) {
    state.fake_stack = nullptr;
#if defined(PTX_TSAN)
    if (state.fiber) __tsan_destroy_fiber(state.fiber);
    state.fiber = __tsan_create_fiber(0);
#endif
}

inline void note_scheduler(SanitizerState& state) {
    (void)state;
#if defined(PTX_TSAN)
    state.fiber = __tsan_get_current_fiber();
#endif
}

// What came before release(x) happened before what comes after acquire(x).
inline void release(void* address) {
    (void)address;
#if defined(PTX_TSAN)
    __tsan_release(address);
#endif
}

inline void acquire(void* address) {
    (void)address;
#if defined(PTX_TSAN)
    __tsan_acquire(address);
#endif
}

}  // namespace ptx
