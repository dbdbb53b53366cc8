// Shared by all kernels: dtypes, 16-byte accesses, how the work is divided, and the choice of a specialization.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

#include <type_traits>

#include "kernels.h"

namespace dimaskdino {
namespace gpu {

constexpr unsigned kWarp = 0xffffffffu;

template <typename T>
using Acc = std::conditional_t<std::is_same<T, double>::value, double, float>;

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(__half x) { return __half2float(x); }
__device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_acc(Acc<T> x) {
  if constexpr (std::is_same<T, __half>::value) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// The address of a token. The factors are 32-bit, so that it takes a single multiply-add into 64 bits. For a negative
// token, the address is meaningless.
template <typename T>
__device__ inline T* at_token(T* first, int token, unsigned bytes_per_token) {
  using Byte = std::conditional_t<std::is_const<T>::value, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) +
                              static_cast<uint64_t>(static_cast<unsigned>(token)) * bytes_per_token);
}

// 16 bytes, as channels.
template <typename T, int N>
__device__ inline void unpack(uint4 bits, Acc<T> (&out)[N]) {
  static_assert(N * sizeof(T) == sizeof(bits), "all of them");
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    // A bfloat16 is the upper half of a float. This takes one instruction per number; the conversion takes two.
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
    T raw[N];
    memcpy(raw, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_acc(raw[i]);
  }
}

// Loads N neighboring channels, in one access if they are 16 bytes. If not wanted, reads nothing and returns zeros.
template <typename T, int N>
__device__ inline void load_channels(const T* pointer, bool wanted, Acc<T> (&out)[N]) {
  if constexpr (N == 1) {
    out[0] = wanted ? to_acc(*pointer) : 0;
  } else {
    unpack<T, N>(wanted ? __ldg(reinterpret_cast<const uint4*>(pointer)) : make_uint4(0, 0, 0, 0), out);
  }
}

template <typename T, int N>
__device__ inline void store_channels(T* pointer, const Acc<T> (&values)[N]) {
  if constexpr (N == 1) {
    *pointer = from_acc<T>(values[0]);
  } else {
    static_assert(N * sizeof(T) == sizeof(uint4), "one access");
    T raw[N];
#pragma unroll
    for (int i = 0; i < N; ++i) raw[i] = from_acc<T>(values[i]);
    uint4 bits;
    memcpy(&bits, raw, sizeof(bits));
    *reinterpret_cast<uint4*>(pointer) = bits;
  }
}

// What a kernel is compiled for. kLanes neighboring lanes of a warp work on a query-head, each on kVector neighboring
// channels; if D is not known at compile time, they step through the channels. 0 means known only at run time.
template <typename T, int kVectorSize, int kNumLanes, int kFixedChannels, int kFixedSamples>
struct Config {
  using Value = T;
  static constexpr int kVector = kVectorSize;
  static constexpr int kLanes = kNumLanes;
  static constexpr int kStep = kVector * kLanes;  // channels that the lanes hold at a time
  static constexpr int kChannels = kFixedChannels;
  static constexpr int kSamples = kFixedSamples;
  static_assert(kLanes <= 32 && (kLanes & (kLanes - 1)) == 0, "the lanes of a query-head lie in one warp");
  static_assert(kChannels == 0 || kChannels == kStep, "a fixed D is done in one step");
};

// The arguments that all kernels have in common.
struct Grid {
  int batch;
  int tokens;
  int heads;
  int queries;
  int channels;
  int points;
  int samples;                 // L * P
  unsigned points_reciprocal;  // of 2^32, to divide by P
  int heads_shift;             // log2 of the heads per block
  Level levels[kMaxLevels];

  template <class C>
  __device__ int num_channels() const {
    return C::kChannels ? C::kChannels : channels;
  }
  template <class C>
  __device__ int num_samples() const {
    return C::kSamples ? C::kSamples : samples;
  }
  // sample / P. Exact below 2^16, because the reciprocal is less than 2^-32 too large.
  __device__ const Level& level_of(int sample) const {
    const auto quotient = static_cast<unsigned>((static_cast<uint64_t>(sample) * points_reciprocal) >> 32);
    return levels[points == 1 ? sample : quotient];
  }
};

// A query and head, and the lanes that work on it.
struct QueryHead {
  int batch;
  int query;
  int head;
  bool exists;  // false past the end; its lanes still run, because a warp's shuffles need all lanes
  int lane;

  // Its place in (B, Q) and in (B, Q, H), and the place of its values in (B, S, H).
  __device__ int64_t query_row(const Grid& grid) const { return static_cast<int64_t>(batch) * grid.queries + query; }
  __device__ int64_t row(const Grid& grid) const { return query_row(grid) * grid.heads + head; }
  __device__ int64_t value_row(const Grid& grid) const {
    return static_cast<int64_t>(batch) * grid.tokens * grid.heads + head;
  }
};

// Calls body for each query-head of this group of lanes: once, unless there are over 65,535 heads or batch elements.
//
// A block takes neighboring queries of one head (or of a few), and the blocks of a head come one after the other. In
// the encoder, queries are pixels in raster order, neighbors sample the same places, and a token's channels of one
// head are a cache line. Not yet measured on a GPU; Schedule changes it.
template <class C, class Body>
__device__ inline void for_each_query_head(const Grid& grid, Body body) {
  const int lane = threadIdx.x % C::kLanes;
  const int group = threadIdx.x / C::kLanes;
  const int queries_per_block = (blockDim.x / C::kLanes) >> grid.heads_shift;
  const int query = blockIdx.x * queries_per_block + (group >> grid.heads_shift);
  const int head_in_block = group & ((1 << grid.heads_shift) - 1);
  const int head_step = static_cast<int>(gridDim.y) << grid.heads_shift;
  for (int batch = blockIdx.z; batch < grid.batch; batch += gridDim.z) {
    for (int first = static_cast<int>(blockIdx.y) << grid.heads_shift; first < grid.heads; first += head_step) {
      const int head = first + head_in_block;
      body(QueryHead{batch, query, head, query < grid.queries && head < grid.heads, lane});
    }
  }
}

// A launch's only block of shared memory; kernels divide it up.
__device__ inline uint4* shared_memory() {
  extern __shared__ uint4 dimaskdino_shared_memory[];
  return dimaskdino_shared_memory;
}

constexpr int kMaxSharedBytes = 48 * 1024;  // more would have to be asked for on each device

inline bool fits(const Sizes& sizes) {
  // In the kernels, sizes and the bytes of a token are 32-bit, with room for another block or grid; their products
  // are 64-bit.
  constexpr int64_t kMax = 1 << 30;
  return sizes.num_levels <= kMaxLevels && sizes.num_levels * sizes.points < 65536 && sizes.batch <= kMax &&
         sizes.queries <= kMax && sizes.tokens <= kMax && sizes.heads * sizes.channels <= kMax / 8;
}

inline bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

inline bool is_valid(const Schedule& schedule, int max_threads, int lanes) {
  return schedule.threads >= 32 && schedule.threads <= max_threads && schedule.threads % 32 == 0 &&
         is_power_of_two(schedule.heads_per_block) && (schedule.threads / lanes) % schedule.heads_per_block == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline dim3 grid_dimensions(const Sizes& sizes, const Schedule& schedule, int lanes) {
  const int64_t queries_per_block = schedule.threads / lanes / schedule.heads_per_block;
  const auto limited = [](int64_t blocks) { return static_cast<unsigned>(blocks < 65535 ? blocks : 65535); };
  return dim3(static_cast<unsigned>(ceil_div(sizes.queries, queries_per_block)),
              limited(ceil_div(sizes.heads, schedule.heads_per_block)), limited(sizes.batch));
}

// Fills in what the caller left open. bytes_per_thread is the shared memory that the kernel needs.
template <class C>
Schedule choose(const Sizes& sizes, Schedule schedule, int max_threads, int64_t bytes_per_thread) {
  if (schedule.heads_per_block == 0) schedule.heads_per_block = 1;
  if (schedule.threads == 0) {
    // Small blocks if there is little work, as in the decoder: two for each multiprocessor of a large GPU.
    constexpr int64_t kEnoughBlocks = 264;
    schedule.threads = max_threads;
    const int64_t threads = sizes.batch * sizes.queries * sizes.heads * C::kLanes;
    while (schedule.threads > 64 && threads < kEnoughBlocks * schedule.threads) schedule.threads /= 2;
    while (schedule.threads > 32 && schedule.threads * bytes_per_thread > kMaxSharedBytes) schedule.threads /= 2;
  }
  return schedule;
}

inline Grid make_grid(const Sizes& sizes, const Schedule& schedule) {
  Grid grid{};
  grid.batch = static_cast<int>(sizes.batch);
  grid.tokens = static_cast<int>(sizes.tokens);
  grid.heads = static_cast<int>(sizes.heads);
  grid.queries = static_cast<int>(sizes.queries);
  grid.channels = static_cast<int>(sizes.channels);
  grid.points = static_cast<int>(sizes.points);
  grid.samples = static_cast<int>(sizes.num_levels * sizes.points);
  grid.points_reciprocal = static_cast<unsigned>((uint64_t{1} << 32) / sizes.points + 1);
  while ((1 << grid.heads_shift) < schedule.heads_per_block) ++grid.heads_shift;
  for (int64_t level = 0; level < sizes.num_levels; ++level) grid.levels[level] = sizes.levels[level];
  return grid;
}

// Launches kernel(args) for C, with the shared memory that it needs per thread.
template <class C, class Args>
cudaError_t launch(void (*kernel)(Args), Args args, const Sizes& sizes, Schedule schedule, int max_threads,
                   int64_t bytes_per_thread, cudaStream_t stream) {
  if (!fits(sizes)) return cudaErrorInvalidValue;
  schedule = choose<C>(sizes, schedule, max_threads, bytes_per_thread);
  const int64_t bytes = schedule.threads * bytes_per_thread;
  if (!is_valid(schedule, max_threads, C::kLanes) || bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  args.grid = make_grid(sizes, schedule);
  cudaLaunchConfig_t config{};
  config.gridDim = grid_dimensions(sizes, schedule, C::kLanes);
  config.blockDim = dim3(schedule.threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Calls run with a Config that works for any sizes.
template <typename T, class Run>
cudaError_t with_any_config(const Sizes& sizes, Run run) {
  constexpr int kFull = 16 / sizeof(T);
  if (sizes.channels % kFull == 0) return run(Config<T, kFull, 8, 0, 0>{});
  return run(Config<T, 1, 16, 0, 0>{});
}

// Calls run with the best Config for these sizes. In nearly every published model, D (the width of a head) is 32, and
// L * P is 12, 16 or 20 (3, 4 or 5 levels).
template <typename T, class Run>
cudaError_t with_config(const Sizes& sizes, Run run) {
  constexpr int kFull = 16 / sizeof(T);
  if constexpr (!std::is_same<T, double>::value) {
    const int64_t samples = sizes.num_levels * sizes.points;
    switch (sizes.channels) {
      case 16:
        return run(Config<T, kFull, 16 / kFull, 16, 0>{});
      case 32:
        switch (samples) {
          case 12:
            return run(Config<T, kFull, 32 / kFull, 32, 12>{});
          case 16:
            return run(Config<T, kFull, 32 / kFull, 32, 16>{});
          case 20:
            return run(Config<T, kFull, 32 / kFull, 32, 20>{});
          default:
            return run(Config<T, kFull, 32 / kFull, 32, 0>{});
        }
      case 64:
        if (samples == 16) return run(Config<T, kFull, 64 / kFull, 64, 16>{});
        return run(Config<T, kFull, 64 / kFull, 64, 0>{});
      case 128:
        return run(Config<T, kFull, 128 / kFull, 128, 0>{});
      default:
        break;
    }
  }
  return with_any_config<T>(sizes, run);
}

template <typename T>
struct Type {
  using type = T;
};

template <class Run>
cudaError_t with_dtype(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(Type<float>{});
    case Dtype::kFloat64:
      return run(Type<double>{});
    case Dtype::kFloat16:
      return run(Type<__half>{});
    case Dtype::kBFloat16:
      return run(Type<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace gpu
}  // namespace dimaskdino
