// A stack of its own to run a function on, and the switch between two of them: seven instructions on x86-64, ucontext elsewhere.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
// Saves what a call preserves on the old stack, stores its pointer in *save, and continues on the stack `load`.
extern "C" void emu_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
  .text
  .hidden emu_switch
  .globl emu_switch
  .type emu_switch, @function
emu_switch:
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
  .size emu_switch, .-emu_switch
)");

namespace emu {

struct Context {
  void* pointer = nullptr;

  // The next switch here calls entry, which must not return.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~static_cast<uintptr_t>(15);
    auto slots = reinterpret_cast<void**>(top);
    *--slots = nullptr;
    *--slots = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--slots = nullptr;
    pointer = slots;
  }
  static void swap(Context& from, Context& to) { emu_switch(&from.pointer, to.pointer); }
};

}  // namespace emu

#else
#include <ucontext.h>

namespace emu {

struct Context {
  ucontext_t state;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = bytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};

}  // namespace emu
#endif
