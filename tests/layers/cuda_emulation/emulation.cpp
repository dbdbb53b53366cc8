// The fibers behind cuda_runtime.h. Not itself compiled for ThreadSanitizer (FOR_THREAD_SANITIZER is defined instead):
// what it does is no thread's work.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change the stack
#include <cuda_runtime.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#elif defined(FOR_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

// The kernels' one block of shared memory, where they look for it. As large as they may ask for, and whole pages.
constexpr size_t kSharedBytes = 48 * 1024;
constexpr size_t kPage = 4096;
namespace dimaskdino {
namespace gpu {
alignas(kPage) uint4 dimaskdino_shared_memory[kSharedBytes / sizeof(uint4)];
}  // namespace gpu
}  // namespace dimaskdino
namespace classical {
alignas(kPage) float classical_shared_memory[kSharedBytes / sizeof(float)];
}  // namespace classical

dim3 threadIdx;
dim3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

// New pages, at a free place (nullptr) or at a given one; whatever was there is forgotten, by sanitizers as well.
char* map_pages(void* place, size_t bytes) {
  const int fixed = place == nullptr ? 0 : MAP_FIXED;
  void* pages = mmap(place, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
  if (pages == MAP_FAILED) {
    perror("mmap");
    abort();
  }
  return static_cast<char*>(pages);
}

struct Fiber {
  ucontext_t context;
  jmp_buf where;  // once it has begun
  bool begun = false;
  const char* waits_at = nullptr;
  bool done = false;
  uint64_t slot = 0;
  void* thread = nullptr;      // ThreadSanitizer's
  unsigned warp_barriers = 0;  // how many it has come to
  unsigned block_barriers = 0;
};

std::vector<Fiber> fibers(kMaxThreads);
char* const stacks = map_pages(nullptr, kMaxThreads * kStackBytes);
Fiber* current = nullptr;

size_t index_of(const Fiber& fiber) { return static_cast<size_t>(&fiber - fibers.data()); }
char* stack_of(const Fiber& fiber) { return stacks + index_of(fiber) * kStackBytes; }
[[maybe_unused]] ucontext_t scheduler;
const std::function<void()>* body = nullptr;

// What is handed on at a barrier: by all who come to it, to all who leave it. The next barrier takes the other one: a
// thread that is there already must hand nothing to those that only now leave the last.
struct Handover {
  char places[2];
};
// Of one block: made anew for each, or it would hand on what the last one did.
struct Handovers {
  Handover warps[kMaxThreads / kWarpSize];
  Handover block;
};
std::unique_ptr<Handovers> handovers;
char start_of_block;
char end_of_launch;

// A sanitizer must be notified of every change of the stack.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

void to_fiber(Fiber& fiber) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_of(fiber), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void to_scheduler() {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(current->done ? nullptr : &fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&current->context, &scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void entered_fiber() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes); }
#elif defined(FOR_THREAD_SANITIZER)
void* scheduler_thread = nullptr;

void to_fiber(Fiber& fiber) {
  scheduler_thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.thread, __tsan_switch_to_fiber_no_sync);
  swapcontext(&scheduler, &fiber.context);
}

void to_scheduler() {
  __tsan_switch_to_fiber(scheduler_thread, __tsan_switch_to_fiber_no_sync);
  swapcontext(&current->context, &scheduler);
}

void entered_fiber() {}
#else
// swapcontext asks the kernel for the signals that are blocked, which takes longer than the kernels do.
jmp_buf in_scheduler;

void to_fiber(Fiber& fiber) {
  if (_setjmp(in_scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.where, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

void to_scheduler() {
  if (_setjmp(current->where) == 0) _longjmp(in_scheduler, 1);
}

void entered_fiber() {}
#endif

// Who gets what is handed on comes after those who handed it on; all others are in no order, as threads of a GPU are.
#if defined(FOR_THREAD_SANITIZER)
void hand_on(char& place) { __tsan_release(&place); }
void get(char& place) { __tsan_acquire(&place); }

// Making one takes a millisecond, so they are used in turn. Neighboring blocks get different ones: what a thread has
// seen in one block comes before all that it does in another.
void new_thread(Fiber& fiber) {
  static void* threads[kMaxThreads] = {};
  static size_t turn = 0;
  void*& thread = threads[turn++ % kMaxThreads];
  if (thread == nullptr) thread = __tsan_create_fiber(0);
  fiber.thread = thread;
}

void new_memory(void* pages, size_t bytes) { map_pages(pages, bytes); }
#else
void hand_on(char&) {}
void get(char&) {}
void new_thread(Fiber&) {}
void new_memory(void*, size_t) {}
#endif

void fiber_main() {
  entered_fiber();
  get(start_of_block);
  (*body)();
  hand_on(end_of_launch);
  current->done = true;
  to_scheduler();
}

void start(Fiber& fiber) {
  fiber.waits_at = nullptr;
  fiber.done = false;
  fiber.begun = false;
  fiber.warp_barriers = 0;
  fiber.block_barriers = 0;
  new_thread(fiber);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(fiber);
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

struct Warp {
  Fiber* threads;
  unsigned size;

  // Runs it to its next barrier, or its end; its threads must be at the same one.
  void step() const {
    for (unsigned i = 0; i < size; ++i) {
      current = &threads[i];
      threadIdx = dim3(static_cast<unsigned>(index_of(*current)));
      to_fiber(*current);
    }
    for (unsigned i = 1; i < size; ++i) {
      const bool together = threads[i].done == threads[0].done &&
                            (threads[i].done || strcmp(threads[i].waits_at, threads[0].waits_at) == 0);
      if (together) continue;
      fprintf(stderr, "The threads of a warp are at different barriers.\n");
      abort();
    }
  }

  bool waits_for_block() const { return !threads->done && strcmp(threads->waits_at, kBlockBarrier) == 0; }
};

// Every warp goes on alone until it ends or waits for the others.
void run_block(unsigned size) {
  std::vector<Warp> warps;
  for (unsigned i = 0; i < size; i += kWarpSize) {
    warps.push_back({&fibers[i], std::min(kWarpSize, size - i)});
  }
  while (!warps.empty()) {
    for (const Warp& warp : warps) {
      do {
        warp.step();
      } while (!warp.threads->done && !warp.waits_for_block());
    }
    warps.erase(std::remove_if(warps.begin(), warps.end(), [](const Warp& warp) { return warp.threads->done; }),
                warps.end());
  }
}

}  // namespace

void barrier(const char* what) {
  Fiber& fiber = *current;
  const bool of_block = strcmp(what, kBlockBarrier) == 0;
  Handover& handover = of_block ? handovers->block : handovers->warps[index_of(fiber) / kWarpSize];
  char& place = handover.places[(of_block ? fiber.block_barriers++ : fiber.warp_barriers++) % 2];
  hand_on(place);
  fiber.waits_at = what;
  to_scheduler();
  get(place);
}

void write_slot(uint64_t value) { current->slot = value; }

uint64_t read_slot(int lane) {
  return fibers[index_of(*current) / kWarpSize * kWarpSize + static_cast<unsigned>(lane)].slot;
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  body = &kernel;
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        // What an earlier block left there must not matter.
        for (void* shared : {static_cast<void*>(dimaskdino::gpu::dimaskdino_shared_memory),
                             static_cast<void*>(classical::classical_shared_memory)}) {
          new_memory(shared, kSharedBytes);
          memset(shared, 0xff, shared_bytes);
        }
        new_memory(stacks, block.x * kStackBytes);
        handovers = std::make_unique<Handovers>();
        hand_on(start_of_block);
        for (unsigned i = 0; i < block.x; ++i) {
          start(fibers[i]);
        }
        blockIdx = dim3(x, y, z);
        run_block(block.x);
      }
    }
  }
  get(end_of_launch);
}

}  // namespace emulation
