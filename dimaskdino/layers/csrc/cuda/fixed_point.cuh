// The scale of the integer sums (ValueGrad::exact_sums).
#pragma once

#include "common.cuh"

namespace dimaskdino {
namespace gpu {

struct FixedPoint {
  unsigned long long largest_grad;    // bits of max|grad_output| as a double: sorted as the numbers are, NaN above Inf
  unsigned long long largest_weight;  // the same of max|weight|
  double scale;                       // the factor of every contribution; a power of two
  double unit;                        // 1 / scale, or NaN
};
static_assert(sizeof(FixedPoint) == kScaleBytes, "the caller reserves kScaleBytes");

// Queues the computation of value_grad.scale. weights are of dtype A, or null if none exceeds 1.
cudaError_t find_scale(Dtype dtype, const Sizes& sizes, const void* grad_output, const void* weights,
                       const ValueGrad& value_grad, cudaStream_t stream);

}  // namespace gpu
}  // namespace dimaskdino
