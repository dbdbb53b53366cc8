// The scale of the sums that are made of integers (ValueGrad::exact_sums).
#pragma once

#include "common.cuh"

namespace dimaskdino {
namespace gpu {

struct FixedPoint {
  unsigned long long largest_grad;    // bits of max|grad_output| as a double: ordered as the numbers, NaN above Inf
  unsigned long long largest_weight;  // of max|weight|
  double scale;                       // what contributions are multiplied by; a power of two
  double unit;                        // 1 / scale, or NaN
};
static_assert(sizeof(FixedPoint) == kScaleBytes, "the caller reserves kScaleBytes");

// Queues the computation of value_grad.scale. weights are of A, or null where none is larger than 1.
cudaError_t find_scale(Dtype dtype, const Sizes& sizes, const void* grad_output, const void* weights,
                       const ValueGrad& value_grad, cudaStream_t stream);

}  // namespace gpu
}  // namespace dimaskdino
