// Deformable attention on the GPU: the interface between the binding (or a benchmark) and the kernels. Has no torch.
//
// T is the dtype of value; A is the dtype of locations and sums: double for double, otherwise float. All pointers are
// to device memory, contiguous and aligned to 16 bytes. Functions only queue work on the stream.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace dimaskdino {
namespace gpu {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

// The kernels' arguments hold the level shapes, so that nothing has to be copied to the device or waited for.
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

// How the work is divided; zeros let the launch choose. A benchmark can try others.
struct Schedule {
  int threads = 0;          // per block: a multiple of 32, up to the kernel's limit
  int heads_per_block = 0;  // a power of two; the block's other query-heads belong to neighboring queries
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

// The fused form: the kernel computes locations and weights.
struct Offsets {
  const void* reference;  // A (B, Q, 2 or 4)
  int reference_size;     // 2 or 4
  const void* offsets;    // (B, Q, H, L, P, 2), of dtype T with low_precision, otherwise A
  const void* logits;     // (B, Q, H, L, P), the same dtype
  bool low_precision;
};

struct OffsetGrads {
  void* reference;  // A (B, Q, H, 2 or 4), to be summed over the heads, or null
  void* offsets;
  void* logits;
};

// Where grad_value is summed. The caller fills it with zeros.
struct ValueGrad {
  void* sums;          // A (B, S, H, D); the caller converts it to T
  int64_t* exact_sums;  // or int64 (B, S, H, D), if the result must not depend on the order of the additions
  void* scale;         // with exact_sums, kScaleBytes of scratch memory
};

constexpr int kScaleBytes = 32;

cudaError_t forward(Dtype, const Sizes&, const void* value, const Locations&, void* output, cudaStream_t,
                    Schedule = {});
cudaError_t forward(Dtype, const Sizes&, const void* value, const Offsets&, void* output, cudaStream_t, Schedule = {});

cudaError_t backward(Dtype, const Sizes&, const void* grad_output, const void* value, const Locations&,
                     const LocationGrads&, const ValueGrad&, cudaStream_t, Schedule = {});
cudaError_t backward(Dtype, const Sizes&, const void* grad_output, const void* value, const Offsets&,
                     const OffsetGrads&, const ValueGrad&, cudaStream_t, Schedule = {});

// Converts the exact sums to the dtype of value. They are multiples of a power of two, chosen so that no sum can
// overflow: each contribution keeps at least 61 - log2(Q * P) bits below the largest possible one, max|grad_output| *
// max|weight| (44 bits for 21,760 queries of 4 points; a float has 24). If grad_output or the weights hold an Inf or a
// NaN, all of grad_value is NaN.
cudaError_t exact_sums_to_grad(Dtype, const Sizes&, const ValueGrad&, void* grad_value, cudaStream_t);

}  // namespace gpu
}  // namespace dimaskdino
