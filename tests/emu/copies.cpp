// Asynchronous copies, checks of addresses, and the order between blocks.
#include <algorithm>

#include "machine.h"

namespace emu {

void check_global(const void* p, int bytes, const char* what, Site at) {
  Quiet quiet;
  auto first = reinterpret_cast<uint64_t>(p), last = first + static_cast<uint64_t>(bytes);
  if (first % static_cast<uint64_t>(bytes)) fail(at, "%s: global address %p is not aligned to %d bytes", what, p, bytes);
  const Launch& l = machine.launch;
  for (int i = 0; i < l.extents; i++)
    if (first >= l.extent[2 * i] && last <= l.extent[2 * i + 1]) return;
  if (l.extents) fail(at, "%s: out of bounds: %d bytes at %p are in none of the tensors", what, bytes, p);
}

void check_shared(const void* p, int bytes, const char* what, Site at) {
  Quiet quiet;
  auto offset = static_cast<const char*>(p) - running.shared;
  if (offset < 0 || offset + bytes > running.shared_bytes)
    fail(at, "%s: out of bounds: byte %td of %d of the dynamic shared memory", what, offset, running.shared_bytes);
  if (offset % bytes) fail(at, "%s: byte %td of the shared memory is not aligned to %d bytes", what, offset, bytes);
}

void start_copy(void* shared, const void* global, int bytes, bool valid, Site at) {
  check_shared(shared, bytes, "cp.async", at);
  if (valid)
    check_global(global, bytes, "cp.async", at);
  else if (reinterpret_cast<uintptr_t>(global) % static_cast<uintptr_t>(bytes))
    fail(at, "cp.async: global address %p is not aligned to %d bytes", global, bytes);
  __builtin_memset(shared, 0xff, bytes);
  declare_write(shared, bytes);
  Quiet quiet;
  machine.counters.copies++;
  Fiber* me = machine.current;
  me->copies.push_back({shared, global, valid, bytes, me->group});
}

void close_group() {
  Quiet quiet;
  machine.current->group++;
}

// Takes this thread's copies of all groups but the latest `pending` off its list.
static std::vector<Copy> due(int pending) {
  Quiet quiet;
  Fiber* me = machine.current;
  auto last = std::find_if(me->copies.begin(), me->copies.end(), [=](const Copy& c) { return c.group >= me->group - pending; });
  std::vector<Copy> taken(me->copies.begin(), last);
  me->copies.erase(me->copies.begin(), last);
  return taken;
}

void land_groups(int pending) {
  for (const Copy& c : due(pending)) {
    if (c.valid) {
      declare_read(c.from, c.bytes);
      __builtin_memcpy(c.to, c.from, c.bytes);
    } else {
      __builtin_memset(c.to, 0, c.bytes);
    }
    declare_write(c.to, c.bytes);
  }
}

// ---- order between blocks

void fence() {
  Quiet quiet;
  Fiber* me = machine.current;
  for (const void* flag : me->flags) acquire(flag);
  me->flags.clear();
  me->fenced = true;
  release(&me->fence);
}

#if EMU_TSAN
// Makes what the thread had done at its last fence visible to whoever acquires `flag`; by a messenger that knows nothing else,
// since the thread's own release would publish what came after the fence too.
__attribute__((no_sanitize("thread"))) static void publish(const void* flag) {
  void* me = machine.current->tsan;
  __tsan_switch_to_fiber(machine.scheduler_tsan, 1);
  void* messenger = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(messenger, 1);
  __tsan_acquire(&machine.current->fence);
  __tsan_release(const_cast<void*>(flag));
  __tsan_switch_to_fiber(me, 1);
  __tsan_destroy_fiber(messenger);
}
#else
static void publish(const void*) {}
#endif

void before_atomic(const void* p, int bytes, Site at) {
  Quiet quiet;
  if (Block* b = owner(p)) {
    if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes))
      fail(at, "atomic: byte %td of the shared memory is not aligned to %d bytes", static_cast<const char*>(p) - b->memory, bytes);
    if (static_cast<const char*>(p) - b->memory + bytes > running.shared_bytes)
      fail(at, "atomic: out of bounds: byte %td of %d of the dynamic shared memory", static_cast<const char*>(p) - b->memory,
           running.shared_bytes);
    if (!b->started || !b->alive) fail(at, "atomic: %s", closed(*b).c_str());
  } else {
    check_global(p, bytes, "atomic", at);
  }
  waver();
  if (machine.current->fenced) publish(p);
}

void after_atomic([[maybe_unused]] const void* p) {
  Quiet quiet;
  machine.idle_polls = 0;
#if EMU_TSAN
  machine.current->flags.push_back(p);
#endif
  waver();
}

}  // namespace emu
