#include "backward.cuh"

namespace dimaskdino {
namespace gpu {

cudaError_t backward(Dtype dtype, const Sizes& sizes, const void* grad_output, const void* value, const Offsets& inputs,
                     const OffsetGrads& grads, const ValueGrad& value_grad, cudaStream_t stream, Schedule schedule) {
  return launch_backward<OffsetWriter>(dtype, sizes, grad_output, value, inputs, grads, value_grad, stream, schedule);
}

}  // namespace gpu
}  // namespace dimaskdino
