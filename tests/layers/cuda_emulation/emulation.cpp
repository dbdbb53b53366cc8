// The fibers behind cuda_runtime.h.
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// The kernels' one block of shared memory, where they look for it. As large as they may ask for.
constexpr size_t kSharedBytes = 48 * 1024;
namespace dimaskdino {
namespace gpu {
uint4 dimaskdino_shared_memory[kSharedBytes / sizeof(uint4)];
}  // namespace gpu
}  // namespace dimaskdino
namespace classical {
float classical_shared_memory[kSharedBytes / sizeof(float)];
}  // namespace classical

dim3 threadIdx;
dim3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kWarpSize = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const char* waits_at = nullptr;
  bool done = false;
  uint64_t slot = 0;
};

std::vector<Fiber> fibers(1024);
Fiber* current = nullptr;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;

// A sanitiser has to be told of every change of the stack.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

void to_fiber(Fiber& fiber) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
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
#else
void to_fiber(Fiber& fiber) { swapcontext(&scheduler, &fiber.context); }
void to_scheduler() { swapcontext(&current->context, &scheduler); }
void entered_fiber() {}
#endif

void fiber_main() {
  entered_fiber();
  (*body)();
  current->done = true;
  to_scheduler();
}

void start(Fiber& fiber) {
  fiber.waits_at = nullptr;
  fiber.done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
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
      threadIdx = dim3(static_cast<unsigned>(current - fibers.data()));
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
  current->waits_at = what;
  to_scheduler();
}

void write_slot(uint64_t value) { current->slot = value; }

uint64_t read_slot(int lane) {
  const auto index = static_cast<unsigned>(current - fibers.data());
  return fibers[index / kWarpSize * kWarpSize + static_cast<unsigned>(lane)].slot;
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  body = &kernel;
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        // What an earlier block left there must not matter.
        memset(dimaskdino::gpu::dimaskdino_shared_memory, 0xff, shared_bytes);
        memset(classical::classical_shared_memory, 0xff, shared_bytes);
        for (unsigned i = 0; i < block.x; ++i) {
          start(fibers[i]);
        }
        blockIdx = dim3(x, y, z);
        run_block(block.x);
      }
    }
  }
}

}  // namespace emulation
