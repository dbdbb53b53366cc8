#include "forward.cuh"

namespace dimaskdino {
namespace gpu {

cudaError_t forward(Dtype dtype, const Sizes& sizes, const void* value, const Offsets& inputs, void* output,
                    cudaStream_t stream, Schedule schedule) {
  return launch_forward<OffsetReader>(dtype, sizes, value, inputs, output, stream, schedule);
}

}  // namespace gpu
}  // namespace dimaskdino
