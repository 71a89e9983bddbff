#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the executor switches stacks in x86-64 assembly, for Linux"
#endif

// Save the callee-saved registers on this stack, leave its top in *save, continue from `load`.
extern "C" void ptx_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl ptx_switch_stack
.type ptx_switch_stack,@function
ptx_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ptx_switch_stack,.-ptx_switch_stack
)");

namespace ptx {

namespace {
constexpr int kSavedRegisters = 6;
void* scheduler_top = nullptr;
SanitizerState scheduler_state;
SchedulerStack scheduler_stack;
Fiber* running = nullptr;
}  // namespace

Fiber::~Fiber() {
    if (stack_) munmap(stack_, kStackBytes);
}

void Fiber::prepare(void (*entry)()) {
    if (!stack_) {
        // Pages that no thread touches cost nothing.
        void* pages = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pages == MAP_FAILED) {
            std::perror("no memory for a fiber's stack");
            std::abort();
        }
        stack_ = static_cast<char*>(pages);
    }
    entry_ = entry;
    renew(state_);
    // start() finds its stack as after a call: a return address on a multiple of 16, minus 8.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(start);
    for (int i = 0; i < kSavedRegisters; i++) *--top = nullptr;
    top_ = top;
}

void Fiber::start() {
    end_switch(running->state_, &scheduler_stack);
    running->entry_();
    std::abort();  // a finished thread is never resumed
}

void Fiber::switch_in() {
    running = this;
    note_scheduler(scheduler_state);
    begin_switch(scheduler_state, state_, stack_, kStackBytes);
    ptx_switch_stack(&scheduler_top, top_);
    end_switch(scheduler_state, nullptr);
}

void Fiber::switch_out() {
    begin_switch(state_, scheduler_state, scheduler_stack.bottom, scheduler_stack.bytes);
    ptx_switch_stack(&top_, scheduler_top);
    end_switch(state_, &scheduler_stack);
}

bool Fiber::owns(const void* address) const {
    return address >= stack_ && address < stack_ + kStackBytes;
}

}  // namespace ptx
