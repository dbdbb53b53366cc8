// The launch functions for ctypes. Includes kernels.h alone, so it also works with a build by nvcc.
#include "kernels.h"

namespace {

using namespace dimaskdino::gpu;

// shapes: height and width of each level.
Sizes make_sizes(const int64_t* sizes, const int64_t* shapes) {
  Sizes out{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], {}};
  int start = 0;
  for (int64_t i = 0; i < out.num_levels && i < kMaxLevels; ++i) {
    out.levels[i] = {static_cast<int>(shapes[2 * i]), static_cast<int>(shapes[2 * i + 1]), start};
    start += out.levels[i].height * out.levels[i].width;
  }
  return out;
}

Schedule make_schedule(const int* schedule) {
  return {schedule[0], schedule[1]};
}

}  // namespace

extern "C" {

int msda_forward(int dtype, const int64_t* sizes, const int64_t* shapes, const int* schedule, void* stream,
                 const void* value, const void* locations, const void* weights, void* output) {
  return forward(static_cast<Dtype>(dtype), make_sizes(sizes, shapes), value, Locations{locations, weights}, output,
                 static_cast<cudaStream_t>(stream), make_schedule(schedule));
}

int msda_forward_fused(int dtype, const int64_t* sizes, const int64_t* shapes, const int* schedule, void* stream,
                       const void* value, const void* reference, int reference_size, const void* offsets,
                       const void* logits, int low_precision, void* output) {
  return forward(static_cast<Dtype>(dtype), make_sizes(sizes, shapes), value,
                 Offsets{reference, reference_size, offsets, logits, low_precision != 0}, output,
                 static_cast<cudaStream_t>(stream), make_schedule(schedule));
}

int msda_backward(int dtype, const int64_t* sizes, const int64_t* shapes, const int* schedule, void* stream,
                  const void* grad_output, const void* value, const void* locations, const void* weights,
                  void* grad_locations, void* grad_weights, void* sums, int64_t* exact_sums, void* scale) {
  return backward(static_cast<Dtype>(dtype), make_sizes(sizes, shapes), grad_output, value,
                  Locations{locations, weights}, LocationGrads{grad_locations, grad_weights},
                  ValueGrad{sums, exact_sums, scale}, static_cast<cudaStream_t>(stream), make_schedule(schedule));
}

int msda_backward_fused(int dtype, const int64_t* sizes, const int64_t* shapes, const int* schedule, void* stream,
                        const void* grad_output, const void* value, const void* reference, int reference_size,
                        const void* offsets, const void* logits, int low_precision, void* grad_reference,
                        void* grad_offsets, void* grad_logits, void* sums, int64_t* exact_sums, void* scale) {
  return backward(static_cast<Dtype>(dtype), make_sizes(sizes, shapes), grad_output, value,
                  Offsets{reference, reference_size, offsets, logits, low_precision != 0},
                  OffsetGrads{grad_reference, grad_offsets, grad_logits}, ValueGrad{sums, exact_sums, scale},
                  static_cast<cudaStream_t>(stream), make_schedule(schedule));
}

int msda_exact_sums_to_grad(int dtype, const int64_t* sizes, const int64_t* shapes, void* stream, int64_t* exact_sums,
                            void* scale, void* grad_value) {
  return exact_sums_to_grad(static_cast<Dtype>(dtype), make_sizes(sizes, shapes),
                            ValueGrad{nullptr, exact_sums, scale}, grad_value, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
