// Kernels with and without a race, to see that ThreadSanitizer finds the first and lets the second pass.
// The argument is the name of one; the exit status is ThreadSanitizer's, or 0.
#include <cuda_runtime.h>
#include <stdio.h>

#include <string>
#include <vector>

namespace dimaskdino {
namespace gpu {
extern uint4 dimaskdino_shared_memory[];
}  // namespace gpu
}  // namespace dimaskdino

namespace {

struct Args {
  unsigned* out;
  bool ordered;
};

unsigned* shared() { return reinterpret_cast<unsigned*>(dimaskdino::gpu::dimaskdino_shared_memory); }

__global__ void exchange_in_warp(Args args) {
  const unsigned thread = threadIdx.x;
  shared()[thread] = thread;
  if (args.ordered) __syncwarp();
  args.out[blockIdx.x * blockDim.x + thread] = shared()[thread ^ 1];
}

__global__ void exchange_between_warps(Args args) {
  const unsigned thread = threadIdx.x;
  shared()[thread] = thread;
  if (args.ordered) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  args.out[blockIdx.x * blockDim.x + thread] = shared()[thread ^ 32];
}

// The second write comes while slower threads may still be reading the first.
__global__ void write_again(Args args) {
  const unsigned thread = threadIdx.x;
  unsigned sum = 0;
  for (unsigned round = 0; round < 2; ++round) {
    if (args.ordered) __syncwarp();
    shared()[thread] = round;
    __syncwarp();
    sum += shared()[thread ^ 1];
  }
  args.out[blockIdx.x * blockDim.x + thread] = sum;
}

__global__ void add_in_all_blocks(Args args) {
  if (threadIdx.x != 0) return;
  if (args.ordered) {
    atomicAdd(args.out, 1u);
  } else {
    *args.out += 1;
  }
}

}  // namespace

int main(int, char** argv) {
  const std::string name = argv[1];
  void (*kernel)(Args) = name == "warp"     ? exchange_in_warp
                         : name == "block"  ? exchange_between_warps
                         : name == "again"  ? write_again
                         : name == "blocks" ? add_in_all_blocks
                                            : nullptr;
  if (kernel == nullptr) return 2;
  std::vector<unsigned> out(2 * 64);
  cudaLaunchConfig_t config;
  config.gridDim = dim3(2);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 64 * sizeof(unsigned);
  // A second launch comes after the first.
  for (int launch = 0; launch < 2; ++launch) {
    if (cudaLaunchKernelEx(&config, kernel, Args{out.data(), std::string(argv[2]) == "ordered"}) != cudaSuccess) return 3;
  }
  printf("%u\n", out[0]);
  return 0;
}
