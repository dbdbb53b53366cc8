// The four ops on the GPU: buffers, stream and device. Nothing here waits for the GPU.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace dimaskdino {
namespace {

using at::Tensor;

gpu::Dtype dtype_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case at::kFloat:
      return gpu::Dtype::kFloat32;
    case at::kDouble:
      return gpu::Dtype::kFloat64;
    case at::kHalf:
      return gpu::Dtype::kFloat16;
    default:  // the checks rule out all other dtypes
      return gpu::Dtype::kBFloat16;
  }
}

gpu::Sizes sizes_of(const Problem& problem, const char* op) {
  TORCH_CHECK_VALUE(problem.levels.size() <= gpu::kMaxLevels, op, ": at most ", gpu::kMaxLevels,
                    " levels on CUDA, got ", problem.levels.size(), ".");
  gpu::Sizes sizes{};
  sizes.batch = problem.batch;
  sizes.tokens = problem.tokens;
  sizes.heads = problem.heads;
  sizes.channels = problem.channels;
  sizes.queries = problem.queries;
  sizes.num_levels = static_cast<int64_t>(problem.levels.size());
  sizes.points = problem.points;
  for (size_t i = 0; i < problem.levels.size(); ++i) {
    const Level& level = problem.levels[i];
    sizes.levels[i] = {static_cast<int>(level.height), static_cast<int>(level.width), static_cast<int>(level.start)};
  }
  return sizes;
}

// A tensor that the kernels can read: contiguous and aligned to 16 bytes, which a view may not be.
Tensor readable(const Tensor& tensor) {
  const Tensor contiguous = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0 ? contiguous : contiguous.clone();
}

// DIMASKDINO_CUDA_SCHEDULE=threads,heads_per_block divides the work in another way, for benchmarks.
gpu::Schedule schedule() {
  gpu::Schedule result;
  const char* text = std::getenv("DIMASKDINO_CUDA_SCHEDULE");
  if (text != nullptr && *text != '\0') {
    TORCH_CHECK_VALUE(std::sscanf(text, "%d,%d", &result.threads, &result.heads_per_block) == 2,
                      "DIMASKDINO_CUDA_SCHEDULE is ", text, "; it takes threads and heads per block, such as 128,2.");
  }
  return result;
}

void check_launch(cudaError_t error, const char* op, const gpu::Sizes& sizes) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // reported here, so that the next launch does not
  TORCH_CHECK_VALUE(error != cudaErrorInvalidValue, op, ": the CUDA kernels are not made for these sizes (batch ",
                    sizes.batch, ", tokens ", sizes.tokens, ", heads ", sizes.heads, ", channels ", sizes.channels,
                    ", queries ", sizes.queries, ", levels ", sizes.num_levels, ", points ", sizes.points, ").");
  TORCH_CHECK(false, op, ": the CUDA kernel could not be launched: ", cudaGetErrorString(error),
              error == cudaErrorNoKernelImageForDevice
                  ? ". dimaskdino was built for other GPUs; TORCH_CUDA_ARCH_LIST chooses them at build time."
                  : ".");
}

// The gradient of value, while it is summed.
class ValueGradient {
 public:
  explicit ValueGradient(const Tensor& value) : value_(value) {
    if (at::globalContext().deterministicAlgorithms()) {
      sums_ = at::zeros_like(value, value.options().dtype(at::kLong), at::MemoryFormat::Contiguous);
      scale_ = at::empty({gpu::kScaleBytes}, value.options().dtype(at::kByte));
      grad_ = {nullptr, sums_.mutable_data_ptr<int64_t>(), scale_.mutable_data_ptr()};
    } else {
      sums_ = at::zeros_like(value, value.options().dtype(accumulate_type(value.scalar_type())),
                             at::MemoryFormat::Contiguous);
      grad_ = {sums_.mutable_data_ptr(), nullptr, nullptr};
    }
  }

  const gpu::ValueGrad& buffers() const { return grad_; }

  Tensor finish(const gpu::Sizes& sizes, cudaStream_t stream, const char* op) const {
    if (grad_.exact_sums == nullptr) return sums_.to(value_.scalar_type());
    Tensor result = at::empty_like(value_, at::MemoryFormat::Contiguous);
    const auto error = gpu::exact_sums_to_grad(dtype_of(value_), sizes, grad_, result.mutable_data_ptr(), stream);
    check_launch(error, op, sizes);
    return result;
  }

 private:
  const Tensor& value_;
  Tensor sums_;
  Tensor scale_;
  gpu::ValueGrad grad_;
};

Tensor contiguous_like(const Tensor& tensor) { return at::empty_like(tensor, at::MemoryFormat::Contiguous); }

Tensor contiguous_zeros(const Tensor& tensor) { return at::zeros_like(tensor, at::MemoryFormat::Contiguous); }

// (B, Q, H * D)
std::array<int64_t, 3> output_shape(const Problem& problem) {
  return {problem.batch, problem.queries, problem.heads * problem.channels};
}

Tensor forward(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& locations, const Tensor& weights) {
  constexpr const char* op = "dimaskdino::ms_deform_attn";
  const Problem problem = check_locations_form(value, spatial_shapes, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  if (problem.empty()) return at::zeros(output_shape(problem), value.options());
  const gpu::Sizes sizes = sizes_of(problem, op);
  const Tensor values = readable(value), places = readable(locations), factors = readable(weights);
  Tensor output = at::empty(output_shape(problem), value.options());
  const auto error =
      gpu::forward(dtype_of(value), sizes, values.const_data_ptr(),
                   gpu::Locations{places.const_data_ptr(), factors.const_data_ptr()}, output.mutable_data_ptr(),
                   c10::cuda::getCurrentCUDAStream(), schedule());
  check_launch(error, op, sizes);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            at::IntArrayRef spatial_shapes, const Tensor& locations,
                                            const Tensor& weights) {
  constexpr const char* op = "dimaskdino::ms_deform_attn_backward";
  const Problem problem = check_locations_form(value, spatial_shapes, locations, weights);
  check_grad_output(grad_output, value, problem, op);
  const c10::cuda::CUDAGuard guard(value.device());
  if (problem.empty()) return {contiguous_zeros(value), contiguous_zeros(locations), contiguous_zeros(weights)};
  const gpu::Sizes sizes = sizes_of(problem, op);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Tensor grads = readable(grad_output), values = readable(value);
  const Tensor places = readable(locations), factors = readable(weights);
  Tensor grad_locations = contiguous_like(locations), grad_weights = contiguous_like(weights);
  const ValueGradient grad_value(value);
  const auto error =
      gpu::backward(dtype_of(value), sizes, grads.const_data_ptr(), values.const_data_ptr(),
                    gpu::Locations{places.const_data_ptr(), factors.const_data_ptr()},
                    gpu::LocationGrads{grad_locations.mutable_data_ptr(), grad_weights.mutable_data_ptr()},
                    grad_value.buffers(), stream, schedule());
  check_launch(error, op, sizes);
  return {grad_value.finish(sizes, stream, op), grad_locations, grad_weights};
}

// Offsets and logits in the form that the kernels take. The checks made sure that both have the same dtype.
struct FusedInputs {
  FusedInputs(const Tensor& value, const Tensor& reference, const Tensor& offsets, const Tensor& logits)
      : reference(readable(reference)), offsets(readable(offsets)), logits(readable(logits)) {
    kernel = {this->reference.const_data_ptr(), static_cast<int>(reference.size(2)), this->offsets.const_data_ptr(),
              this->logits.const_data_ptr(), offsets.scalar_type() != accumulate_type(value.scalar_type())};
  }

  Tensor reference;
  Tensor offsets;
  Tensor logits;
  gpu::Offsets kernel;
};

Tensor fused_forward(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& reference,
                     const Tensor& offsets, const Tensor& logits) {
  constexpr const char* op = "dimaskdino::ms_deform_attn_fused";
  const Problem problem = check_fused_form(value, spatial_shapes, reference, offsets, logits);
  const c10::cuda::CUDAGuard guard(value.device());
  if (problem.empty()) return at::zeros(output_shape(problem), value.options());
  const gpu::Sizes sizes = sizes_of(problem, op);
  const Tensor values = readable(value);
  const FusedInputs inputs(value, reference, offsets, logits);
  Tensor output = at::empty(output_shape(problem), value.options());
  const auto error = gpu::forward(dtype_of(value), sizes, values.const_data_ptr(), inputs.kernel,
                                  output.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream(), schedule());
  check_launch(error, op, sizes);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(const Tensor& grad_output, const Tensor& value,
                                                          at::IntArrayRef spatial_shapes, const Tensor& reference,
                                                          const Tensor& offsets, const Tensor& logits,
                                                          bool reference_grad) {
  constexpr const char* op = "dimaskdino::ms_deform_attn_fused_backward";
  const Problem problem = check_fused_form(value, spatial_shapes, reference, offsets, logits);
  check_grad_output(grad_output, value, problem, op);
  const c10::cuda::CUDAGuard guard(value.device());
  const Tensor nothing = at::empty({0}, reference.options());
  if (problem.empty()) {
    return {contiguous_zeros(value), reference_grad ? contiguous_zeros(reference) : nothing,
            contiguous_zeros(offsets), contiguous_zeros(logits)};
  }
  const gpu::Sizes sizes = sizes_of(problem, op);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Tensor grads = readable(grad_output), values = readable(value);
  const FusedInputs inputs(value, reference, offsets, logits);
  Tensor grad_offsets = contiguous_like(offsets), grad_logits = contiguous_like(logits);
  Tensor parts;  // of the gradient of the reference: one per head, summed in a fixed order below
  if (reference_grad) {
    parts = at::empty({problem.batch, problem.queries, problem.heads, reference.size(2)}, reference.options());
  }
  const ValueGradient grad_value(value);
  const auto error = gpu::backward(
      dtype_of(value), sizes, grads.const_data_ptr(), values.const_data_ptr(), inputs.kernel,
      gpu::OffsetGrads{reference_grad ? parts.mutable_data_ptr() : nullptr, grad_offsets.mutable_data_ptr(),
                       grad_logits.mutable_data_ptr()},
      grad_value.buffers(), stream, schedule());
  check_launch(error, op, sizes);
  return {grad_value.finish(sizes, stream, op), reference_grad ? parts.sum(2) : nothing, grad_offsets, grad_logits};
}

}  // namespace

TORCH_LIBRARY_IMPL(dimaskdino, CUDA, m) {
  m.impl("ms_deform_attn", &forward);
  m.impl("ms_deform_attn_backward", &backward);
  m.impl("ms_deform_attn_fused", &fused_forward);
  m.impl("ms_deform_attn_fused_backward", &fused_backward);
}

}  // namespace dimaskdino
