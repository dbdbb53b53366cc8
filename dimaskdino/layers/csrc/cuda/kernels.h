// Deformable attention on the GPU: what the binding (or a benchmark) asks of the kernels. Knows CUDA, but not torch.
//
// T is the dtype of value; A the one that locations and sums are kept in: double for double, else float. All pointers
// are device memory, contiguous and aligned to 16 bytes. Every function only queues work on the stream.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace dimaskdino {
namespace gpu {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Level shapes travel in the kernel's arguments, so that nothing is copied to the device, nor waited for.
constexpr int kMaxLevels = 16;

struct Level {
  int height;
  int width;
  int start;  // the first token of the level in value
};

struct Sizes {
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t channels;
  int64_t queries;
  int64_t num_levels;
  int64_t points;
  Level levels[kMaxLevels];
};

// How the work is cut up; zeros let the launch choose. Here so that a benchmark can try others.
struct Schedule {
  int threads = 0;          // of a block: a multiple of 32, up to the kernel's limit
  int heads_per_block = 0;  // a power of two; the rest of a block's query-heads are neighbouring queries
};

constexpr int kMaxForwardThreads = 256;
constexpr int kMaxBackwardThreads = 128;

struct Locations {
  const void* locations;  // A (B, Q, H, L, P, 2)
  const void* weights;    // A (B, Q, H, L, P)
};

struct LocationGrads {
  void* locations;
  void* weights;
};

// The fused form: locations and weights are made in the kernel.
struct Offsets {
  const void* reference;  // A (B, Q, 2 or 4)
  int reference_size;     // 2 or 4
  const void* offsets;    // (B, Q, H, L, P, 2), of T where low_precision is set, else of A
  const void* logits;     // (B, Q, H, L, P), the same dtype
  bool low_precision;
};

struct OffsetGrads {
  void* reference;  // A (B, Q, H, 2 or 4), to be summed over the heads, or null
  void* offsets;
  void* logits;
};

// Where grad_value is summed. Zeros when handed over.
struct ValueGrad {
  void* sums;          // A (B, S, H, D); the caller converts it to T
  int64_t* exact_sums;  // or int64 (B, S, H, D), where the result must not depend on the order of the additions
  void* scale;         // and kScaleBytes of scratch for them
};

constexpr int kScaleBytes = 32;

cudaError_t forward(Dtype, const Sizes&, const void* value, const Locations&, void* output, cudaStream_t,
                    Schedule = {});
cudaError_t forward(Dtype, const Sizes&, const void* value, const Offsets&, void* output, cudaStream_t, Schedule = {});

cudaError_t backward(Dtype, const Sizes&, const void* grad_output, const void* value, const Locations&,
                     const LocationGrads&, const ValueGrad&, cudaStream_t, Schedule = {});
cudaError_t backward(Dtype, const Sizes&, const void* grad_output, const void* value, const Offsets&,
                     const OffsetGrads&, const ValueGrad&, cudaStream_t, Schedule = {});

// The exact sums in the dtype of value. They are multiples of a power of two, chosen so that no sum can overflow:
// at least 61 - log2(Q * P) bits below the largest possible contribution, max|grad_output| * max|weight|, are kept of
// each one (44 bits for 21,760 queries of 4 points; a float has 24). Where grad_output or the weights hold an Inf or
// NaN, all of grad_value is NaN.
cudaError_t exact_sums_to_grad(Dtype, const Sizes&, const ValueGrad&, void* grad_value, cudaStream_t);

}  // namespace gpu
}  // namespace dimaskdino
