// Enough of CUDA to run the kernels on the CPU, compiled by g++ alone: found before the toolkit's header of that name.
//
// The threads of a block are fibers, and the blocks run one after the other. A fiber runs until a barrier or shuffle,
// and goes on when all 32 threads of its warp have come to the same one (all of the block, for __syncthreads); a thread
// that is missing there, which a GPU may not notice, ends the process with a message. Memory is the host's, so that a
// sanitizer sees every access. For ThreadSanitizer, fibers are threads that only barriers and shuffles put in order:
// it finds the races of a block and, in global memory, those between blocks.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cstddef>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct int4 {
  int x, y, z, w;
} __attribute__((aligned(16)));

struct float4 {
  float x, y, z, w;
} __attribute__((aligned(16)));
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImageForDevice = 209 };
typedef struct EmulatedStream* cudaStream_t;

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "an error of the emulation";
}

// Of the fiber that runs.
extern dim3 threadIdx;
extern dim3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace emulation {

// Waits for the warp, or the block. what names the call, so that threads at different ones are found out.
void barrier(const char* what);
constexpr const char* kBlockBarrier = "__syncthreads";

// 8 bytes of each thread of the warp.
void write_slot(uint64_t value);
uint64_t read_slot(int lane);

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

template <typename T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= 8, "as on a GPU");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  write_slot(bits);
  barrier("__shfl_xor_sync");
  bits = read_slot(static_cast<int>(threadIdx.x % 32) ^ mask);
  barrier("__shfl_xor_sync (end)");
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncwarp(unsigned = 0xffffffffu) {
  emulation::barrier("__syncwarp");
}

inline void __syncthreads() {
  emulation::barrier(emulation::kBlockBarrier);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle_xor(value, mask);
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}

// One fiber runs at a time; the atomic accesses are for ThreadSanitizer, which has to tell them from others.
template <typename T, typename Change>
T atomic_change(T* pointer, Change change) {
  T old;
  __atomic_load(pointer, &old, __ATOMIC_RELAXED);
  T changed = change(old);
  __atomic_store(pointer, &changed, __ATOMIC_RELAXED);
  return old;
}

template <typename T>
T atomicAdd(T* pointer, T value) {
  return atomic_change(pointer, [=](T old) { return old + value; });
}

// From 9.0 on: four additions.
inline float4 atomicAdd(float4* pointer, float4 value) {
  return {atomicAdd(&pointer->x, value.x), atomicAdd(&pointer->y, value.y), atomicAdd(&pointer->z, value.z),
          atomicAdd(&pointer->w, value.w)};
}

template <typename T>
T atomicMax(T* pointer, T value) {
  return atomic_change(pointer, [=](T old) { return value > old ? value : old; });
}

inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
// To the nearest; out of range to the ends, NaN to the lowest, as on a GPU.
inline long long __double2ll_rn(double x) {
  if (!(x >= -9223372036854775808.0)) return -9223372036854775807LL - 1;
  if (x >= 9223372036854775808.0) return 9223372036854775807LL;
  return llrint(x);
}

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3& grid = config->gridDim;
  const dim3& block = config->blockDim;
  const bool possible = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
                        grid.z <= 65535 && block.x > 0 && block.x <= 1024 && config->dynamicSmemBytes <= 48 * 1024;
  if (!possible) return cudaErrorInvalidValue;
  emulation::run(grid, block, config->dynamicSmemBytes, [&] { kernel(Params(args)...); });
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  memset(pointer, value, bytes);
  return cudaSuccess;
}
